"""A zip of many (ext)xyz files, as MPTrj is also published: one member per material. Nothing is unpacked to disk."""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from escaip.data.readers.ase import XYZ, held, parse_xyz, record_of, xyz_frames
from escaip.data.readers.policy import Part, Reader, ReadPolicy, Record, ranges_by_weight
from escaip.data.structure import AtomicData, LabelKeys
from escaip.errors import DataError
from escaip.files import one_line

if TYPE_CHECKING:
    from ase import Atoms

GROUP_KEY = "material_id"
MAX_LINE = 1 << 20
MAX_FRAME = 1 << 28
MIN_LINE = 1 << 6
"""Bytes of a line and of a frame, and what a shorter line counts as; a small zip can hold a member of any size."""

_SAMPLED = 16


def read_xyz_zip(
    path: Path, name: str, policy: ReadPolicy, *, keys: LabelKeys | None = None, part: Part | None = None
) -> Iterator[AtomicData]:
    """Yields the frames of every (ext)xyz member, in the sorted order of the members' names; others are left alone.

    Ids are ``name:member:index``. Without ``keys.group`` the group is ``material_id`` where the frame has it, else the
    member's name. The energy of MPTrj with MP2020 corrections has the key ``mp2020_corrected_energy``. A part is a
    range of members.

    Raises:
        DataError: no zip, no xyz member in it, an encrypted, damaged or truncated member, or a bad structure.
    """
    yield from policy.admit(_records(path, name, policy, keys or LabelKeys(), part))


def _records(path: Path, name: str, policy: ReadPolicy, keys: LabelKeys, part: Part | None) -> Iterator[Record]:
    with _opened(path) as archive:
        members = _members(archive, path)
        for info in members[slice(*part)] if part else members:
            for index, atoms in enumerate(_frames(archive, info, path)):
                # The group counts as the file: a material, else the member.
                group = str(atoms.info.get(GROUP_KEY, info.filename))
                yield record_of(held(atoms), f"{name}:{info.filename}:{index}", group, keys, policy, "file")


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of members with about ``size`` frames together, judged by the frames per byte of a few members."""
    with _opened(path) as archive:
        members = _members(archive, path)
        sampled = members[:: max(len(members) // _SAMPLED, 1)]
        frames = sum(sum(1 for _ in _frames(archive, info, path)) for info in sampled)
    allowed = size * max(sum(info.file_size for info in sampled) / max(frames, 1), 1.0)
    return ranges_by_weight((info.file_size for info in members), allowed)


def matches(path: Path, head: bytes) -> bool:
    """Zip files named ``.zip``."""
    return path.suffix == ".zip" and head.startswith(b"PK\x03\x04")


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path}: not a readable zip, or truncated ({error}); download it again") from error


def _members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """(Ext)xyz members by name, without those that macOS adds."""
    places = [(PurePosixPath(info.filename), info) for info in archive.infolist()]
    found = [info for place, info in places if place.suffix in XYZ and not place.name.startswith("._")]
    if not found:
        held = ", ".join(archive.namelist()[:5]) or "nothing"
        raise DataError(f"{path}: holds no .xyz or .extxyz member; it holds {held}")
    found.sort(key=lambda info: info.filename)
    for one, two in itertools.pairwise(found):
        if one.filename == two.filename:
            raise DataError(f"{path}: holds two members named {one.filename}; it is damaged")
    return found


def _frames(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Iterator[Atoms]:
    """Frames of a member."""
    count = 0
    try:
        with archive.open(info) as stream:
            lines = _BoundedLines(stream)
            for text in xyz_frames(lines):
                lines.used = 0
                yield parse_xyz(text)
                count += 1
    except (GeneratorExit, DataError):
        raise
    except Exception as error:
        raise DataError(
            f"{path}: member {info.filename} is damaged after {count} frames ({one_line(error)}); download it again"
        ) from error


class _BoundedLines(io.TextIOBase):
    """Lines of a stream as text; ``used`` counts the bytes of a frame."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.used = 0

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        line = self.stream.readline(MAX_LINE)
        self.used += max(len(line), MIN_LINE)
        if len(line) == MAX_LINE or self.used > MAX_FRAME:
            raise ValueError("a line or a frame larger than any structure needs")
        return line.decode()


READER = Reader("xyz_zip", read_xyz_zip, matches, divide)
