"""What a download keeps on the disk: the part that is being received, its state, the record of a whole file.

``NAME.part`` holds the bytes received and ``NAME.part.json`` what they are the beginning of. ``.NAME.verified``
remembers the size, time and checksum under which the whole file took its name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from escaip.errors import DataError

_READ = 1 << 22
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(DataError):
    """No space is left: there is no point in going on with other files."""


@dataclass(frozen=True)
class Record:
    """What is remembered of a whole file.

    Attributes:
        url: where it came from.
        size: bytes.
        mtime_ns: its time of modification, which changes when someone writes to it.
        algorithm: of the checksum.
        digest: the checksum as computed.
        published: it agreed with a published one.
    """

    url: str
    size: int
    mtime_ns: int
    algorithm: str
    digest: str
    published: bool

    @classmethod
    def read(cls, target: Path) -> Record | None:
        """The record of a file; None where there is none that can be read."""
        return _read_json(cls, _record_path(target))

    def fits(self, target: Path) -> bool:
        """The file has not been written to since."""
        status = target.stat()
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)

    def write(self, target: Path) -> None:
        """Remembers."""
        _write_json(_record_path(target), self)


@dataclass(frozen=True)
class State:
    """What the bytes of a part are the beginning of.

    Attributes:
        url: of the file.
        validator: names the version of the file, as the server does; None where it does not.
        size: bytes of the whole file; None where nobody said.
        boot: of the machine, :func:`boot_id`.
        synced: bytes that are on the disk whatever happens to the machine.
    """

    url: str
    validator: str | None
    size: int | None
    boot: str
    synced: int

    @classmethod
    def read(cls, part: Path) -> State | None:
        """The state of a part; None where there is none that can be read."""
        return _read_json(cls, _state_path(part))

    @staticmethod
    def remove(part: Path) -> None:
        """Nothing is known of a part any more."""
        _state_path(part).unlink(missing_ok=True)

    def write(self, part: Path) -> None:
        """Replaces the state of a part."""
        _write_json(_state_path(part), self)


@contextmanager
def disk_errors(name: str) -> Iterator[None]:
    """Turns what a disk can say into one line.

    Raises:
        DiskFullError: no space left, or none left to this user.
        DataError: anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DiskFullError(
                f"{name}: the disk is full; what was received is kept: free space and run the same command again"
            ) from error
        raise DataError(
            f"{name}: cannot be written ({error.strerror or error}): check the folder {error.filename or ''}".rstrip()
        ) from error


@contextmanager
def locked(part: Path, name: str) -> Iterator[int]:
    """An open part that no other process writes to; the lock of a killed one is gone with it."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have given it its final name between the two calls: never write to that.
            if part.exists() and os.path.samestat(os.fstat(descriptor), part.stat()):
                break
        except BlockingIOError as error:
            os.close(descriptor)
            raise DataError(f"{name}: another process is downloading it; wait for that one") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def part_path(target: Path) -> Path:
    """Where the bytes are until the file is whole."""
    return target.with_name(f"{target.name}.part")


def corrupt_path(target: Path) -> Path:
    """Where a file is kept whose checksum is wrong."""
    return target.with_name(f"{target.name}.corrupt")


def _state_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _record_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.verified")


def forget(part: Path) -> None:
    """Removes a part and its state."""
    part.unlink(missing_ok=True)
    _state_path(part).unlink(missing_ok=True)


def hash_file(descriptor: int, algorithm: str, length: int, listener: Listener, stop: Event) -> Any:
    """The hash object of the first ``length`` bytes of an open file.

    Raises:
        Stopped: ``stop`` was set.
    """
    total, position = hashlib.new(algorithm, usedforsecurity=False), 0
    while position < length:
        if stop.is_set():
            raise Stopped
        block = os.pread(descriptor, min(_READ, length - position), position)
        if not block:
            break
        total.update(block)
        position += len(block)
        listener.advance(len(block))
    return total


def _read_json(kind: type[Any], path: Path) -> Any:
    """A record or state; None where it is absent, damaged or of another version."""
    try:
        content = json.loads(path.read_bytes())
        given = kind(**content)
        numbers = [content[name] for name in ("size", "mtime_ns", "synced") if content.get(name) is not None]
        others = [value for value in content.values() if not isinstance(value, str | bool | None)]
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return None
    fits = all(type(number) is int and number >= 0 for number in numbers) and len(others) == len(numbers)
    return given if fits else None


def _write_json(path: Path, content: Any) -> None:
    """Writes aside, syncs and renames; the lock on the part keeps others away."""
    aside = path.with_name(f"{path.name}.new")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(asdict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Makes names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def boot_id() -> str:
    """What changes when the machine starts; empty, and then never trusted, where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def bytes_text(count: int | None) -> str:
    """A size as people write it, in decimal units."""
    if count is None:
        return "?"
    size, unit = float(count), 0
    while size >= 999.5 and unit < 4:
        size, unit = size / 1000, unit + 1
    return f"{count} B" if unit == 0 else f"{size:.3g} {' kMGT'[unit]}B"


class Listener:
    """Hears what happens; this one does nothing."""

    def begin(self, there: int, size: int | None) -> None:
        """So many bytes are there, of so many in all."""

    def advance(self, count: int) -> None:
        """So many more bytes."""

    def say(self, text: str) -> None:
        """A line for the user."""


class Stopped(Exception):
    """Someone asked to stop; what was received is kept."""
