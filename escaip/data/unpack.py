"""Archives from the internet, unpacked into a folder of their own: nothing is written outside it, no links are made."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from threading import Event
from typing import IO

from escaip.data.transfer_disk import DiskFullError, Listener, Stopped, bytes_text, disk_errors, sync_folder
from escaip.errors import DataError

SUFFIXES = {".tar": 1, ".tar.gz": 3, ".tgz": 3, ".tar.bz2": 3, ".tar.xz": 3, ".zip": 3}
"""Of archives, and how many times their size their contents may take: a guess, made before there is a file to ask."""
MARKER = ".unpacked.json"
_COPY = 1 << 20
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError, NotImplementedError, OSError)


@dataclass(frozen=True)
class _Entry:
    """A file of an archive."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def archive_suffix(name: str) -> str | None:
    """The suffix by which a file is known as an archive; None for other files."""
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix)), None)


def unpacked_path(archive: Path) -> Path:
    """The folder of an archive's contents: its name without the suffix."""
    return archive.with_name(archive.name[: -len(archive_suffix(archive.name) or "")])


def is_unpacked(archive: Path, digest: str) -> bool:
    """Whether the folder is there and holds the contents of this very archive."""
    return _marker(unpacked_path(archive)) == {"archive": archive.name, "digest": digest}


def unpack(archive: Path, digest: str, listener: Listener, stop: Event) -> Path:
    """Unpacks an archive into :func:`unpacked_path`; after an interruption it starts again.

    Files are written to a folder aside, which takes its name when they are all there.

    Args:
        archive: tar, also compressed, or zip.
        digest: checksum of the archive, remembered in the folder.
        listener: told of the bytes written.
        stop: set by someone else to stop.

    Returns:
        The folder.

    Raises:
        DataError: a damaged archive; a name that leads outside the folder; a link, a device or an encrypted file; a
            folder of that name that was not made from this archive; a full disk.
        Stopped: ``stop`` was set; nothing is left.
    """
    target = unpacked_path(archive)
    aside = archive.with_name(f".{archive.name}.unpacking")
    with disk_errors(archive.name), open(archive, "rb") as file, _alone(file, archive.name):
        if is_unpacked(archive, digest):
            return target
        before = _marker(target)
        if target.exists() and (before is None or before.get("archive") != archive.name):
            raise DataError(f"{target}: is there already and was not unpacked from {archive.name}: move it away")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        listener.begin(0, None)
        try:
            with _damage(archive):
                _write_entries(archive, file, aside, listener, stop)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        (aside / MARKER).write_text(json.dumps({"archive": archive.name, "digest": digest}), encoding="utf-8")
        sync_folder(aside)
        if target.exists():  # of an archive that was published anew
            shutil.rmtree(target)
        os.replace(aside, target)
        sync_folder(target.parent)
    return target


def _write_entries(archive: Path, file: IO[bytes], folder: Path, listener: Listener, stop: Event) -> None:
    is_zip = archive.name.lower().endswith(".zip")
    entries = _zip_entries(file, archive.name) if is_zip else _tar_entries(file, folder, archive.name)
    for entry in entries:
        free = shutil.disk_usage(folder).free
        if entry.size > free:
            raise DiskFullError(
                f"{archive.name}: {entry.name} needs {bytes_text(entry.size)}, {bytes_text(free)} are free: free "
                "space and run the same command again"
            )
        path = folder / _inside(entry.name, archive.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with entry.open() as source, open(path, "wb") as target:
            while block := source.read(_COPY):
                if stop.is_set():
                    raise Stopped
                target.write(block)
                listener.advance(len(block))
            target.flush()
            os.fsync(target.fileno())


def _tar_entries(file: IO[bytes], folder: Path, name: str) -> Iterator[_Entry]:
    """Files in their order, each to be read before the next: a compressed archive is decompressed once."""
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else it remembers every one of them
            if member.isdir():
                continue
            if not member.isfile():
                raise DataError(f"{name}: {member.name!r} is a link or a device: unpack it by hand")
            safe = tarfile.data_filter(member, str(folder))
            yield _Entry(member.name, safe.size, partial(_opened, archive, safe))
        # To the end of the compressed stream, where its own checksum is.
        while archive.fileobj is not None and archive.fileobj.read(_COPY):
            pass


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    opened = archive.extractfile(member)
    assert opened is not None  # only links and devices have no contents
    return opened


def _zip_entries(file: IO[bytes], name: str) -> Iterator[_Entry]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise DataError(f"{name}: {info.filename!r} is a link or a device: unpack it by hand")
            if info.flag_bits & 1:
                raise DataError(f"{name}: {info.filename!r} is encrypted: unpack it by hand")
            yield _Entry(info.filename, info.file_size, partial(archive.open, info))


def _inside(name: str, archive: str) -> PurePosixPath:
    """A name that stays below the folder it is joined to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
        raise DataError(f"{archive}: holds {name!r}, which leads outside its folder: it is not unpacked")
    return path


def _marker(folder: Path) -> dict[str, str] | None:
    try:
        content = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def _alone(file: IO[bytes], name: str) -> Iterator[None]:
    """One process at a time; the lock ends with the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"{name}: another process is unpacking it; wait for that one") from error
    yield


@contextmanager
def _damage(archive: Path) -> Iterator[None]:
    """One line for what a damaged archive can raise."""
    try:
        yield
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        LZMAError,
        EOFError,
        NotImplementedError,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; those of gzip and bz2 have no number
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(":")
        raise DataError(f"{archive}: cannot be unpacked ({reason}): run it with --verify, or unpack by hand") from error
