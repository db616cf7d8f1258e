"""What a data card offers for download, what of it was asked for, and what of that is there already."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from escaip.data.transfer_disk import Record, disk_errors, part_path
from escaip.data.transfer_http import RemoteFile, RetryPolicy, remote_size
from escaip.data.unpack import SUFFIXES, archive_suffix, is_unpacked
from escaip.errors import ConfigError, DataError
from escaip.files import DatasetCard

_DIGESTS = {"md5": r"[0-9a-f]{32}", "sha256": r"[0-9a-f]{64}"}


@dataclass(frozen=True)
class PlannedFile:
    """A file that was asked for, and what there is of it.

    Attributes:
        remote: as published.
        path: where it goes.
        size: bytes, as the card or the server says; None where neither does.
        exact: the size is not an estimate.
        there: bytes that are there already.
        whole: the file has its name; else what is there is a part.
    """

    remote: RemoteFile
    path: Path
    size: int | None
    exact: bool
    there: int
    whole: bool

    @property
    def missing(self) -> int | None:
        """Bytes still to come; None where nobody knows."""
        if self.whole:
            return 0
        return None if self.size is None else max(0, self.size - self.there)

    @property
    def unpacking(self) -> int:
        """Bytes that its contents may take, a guess; 0 for what is no archive or unpacked already."""
        suffix = archive_suffix(self.path.name)
        record = Record.read(self.path) if self.whole else None
        if suffix is None or (record is not None and is_unpacked(self.path, record.digest)):
            return 0
        return SUFFIXES[suffix] * (self.there if self.whole else self.size or 0)


def read_files(card: DatasetCard) -> list[RemoteFile]:
    """The files that a card names.

    Raises:
        DataError: an entry that is incomplete or unsafe; the message names the manifest and the entry.
    """
    manifest = card.path / "manifest.toml"
    entries = card.manifest.get("files", [])
    if not entries:
        raise DataError(f"{manifest}: names no files to download")
    found: list[RemoteFile] = []
    homepage = str(card.manifest.get("dataset", {}).get("homepage", ""))
    for number, entry in enumerate(entries):
        where = f"{manifest}: [[files]] number {number + 1}"
        name, url = entry.get("name"), entry.get("url")
        if not isinstance(name, str) or not _is_safe(name) or name in {file.name for file in found}:
            raise DataError(f"{where}: name {name!r} is no plain file name, or occurs twice")
        if not isinstance(url, str) or urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise DataError(f"{where}: url {url!r} is no http or https address")
        sizes = [entry.get("size"), entry.get("approximate_size")]
        if any(size is not None and (type(size) is not int or size < 0) for size in sizes):
            raise DataError(f"{where}: size and approximate_size must be whole numbers of bytes, not {sizes}")
        algorithm = next((key for key in ("sha256", "md5") if key in entry), "sha256")
        digest = entry.get(algorithm)
        if digest is not None and not re.fullmatch(_DIGESTS[algorithm], str(digest).lower()):
            raise DataError(f"{where}: {algorithm} {digest!r} is no checksum of that kind")
        found.append(
            RemoteFile(
                name=name,
                url=url,
                size=sizes[0],
                approximate_size=sizes[1],
                algorithm=algorithm,
                digest=None if digest is None else str(digest).lower(),
                split=str(entry.get("split", "")),
                gated=bool(entry.get("gated", False)),
                how=str(entry.get("how", "")),
                homepage=homepage,
            )
        )
    return found


def _is_safe(name: str) -> bool:
    """A relative path without tricks, and none that a part or record of another file could have."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and not path.is_absolute() and str(path) == name
    taken = name.endswith((".part", ".part.json", ".corrupt"))
    return plain and not taken and not any(part.startswith(".") for part in path.parts)


def choose_files(
    card: DatasetCard, remotes: Sequence[RemoteFile], split: str | None, patterns: Sequence[str] | None
) -> list[RemoteFile]:
    """Files of a split, by name or pattern; None means all.

    Raises:
        ConfigError: no such split or file; the message lists those there are.
    """
    chosen = list(remotes)
    if split is not None:
        splits = sorted({remote.split for remote in remotes if remote.split})
        if split not in splits:
            known = ", ".join(splits) or "none: leave out --split"
            raise ConfigError(f"split: {card.name} has no files of a split {split!r}; its splits are {known}")
        chosen = [remote for remote in chosen if remote.split == split]
    if patterns is None:
        return chosen
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(remote.name, pattern) for remote in chosen):
            names = ", ".join(remote.name for remote in chosen)
            raise ConfigError(f"file: {card.name} has no {pattern!r}; there are {names}")
    return [remote for remote in chosen if any(fnmatch.fnmatchcase(remote.name, pattern) for pattern in patterns)]


def plan_file(remote: RemoteFile, folder: Path, policy: RetryPolicy) -> PlannedFile:
    """Looks what there is of a file, and asks the server for its size where the card says nothing.

    Raises:
        DataError: something else has its place.
    """
    path = folder / remote.name
    with disk_errors(remote.name):
        if path.is_dir():
            raise DataError(f"{path}: is a folder, where a file should go: move it away")
        if path.exists():
            return PlannedFile(remote, path, path.stat().st_size, exact=True, there=path.stat().st_size, whole=True)
        part = part_path(path)
        there = part.stat().st_size if part.exists() else 0
    size, exact = remote.size, True
    if size is None and remote.approximate_size is not None:
        size, exact = remote.approximate_size, False
    elif size is None and not remote.gated:
        size = remote_size(remote, policy)
    return PlannedFile(remote, path, size, exact, there, whole=False)
