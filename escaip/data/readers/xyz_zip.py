"""A zip of many (ext)xyz files, as MPTrj is also published: one member per material. Nothing is unpacked to disk."""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from escaip.data.readers.ase import XYZ, _xyz_frames
from escaip.data.readers.policy import Part, Reader, ReadPolicy
from escaip.data.structure import LabelKeys, labels_found
from escaip.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

    from escaip.data.structure import AtomicData

GROUP_KEY = "material_id"
MAX_LINE = 1 << 20
MAX_FRAME = 1 << 28
MIN_LINE = 1 << 6
"""Bytes of a line and of a frame, and what a shorter line counts as; a small zip can hold a member of any size."""

_SAMPLED = 16


def read_xyz_zip(
    path: Path, policy: ReadPolicy, *, name: str | None = None, keys: LabelKeys | None = None, part: Part | None = None
) -> Iterator[AtomicData]:
    """Frames of every (ext)xyz member, in the sorted order of the members' names; other members are left alone.

    Ids are ``zip:member:index``. Without ``keys.group`` the group is ``material_id`` where the frame has it, else the
    member's name.

    Args:
        path: zip file.
        policy: units and error policy.
        name: what ids begin with; default the file's name.
        keys: label names; see :class:`LabelKeys`. The energy corrected by MP2020 of MPTrj is
            ``mp2020_corrected_energy``.
        part: members to read, by their place in the sorted order.

    Raises:
        DataError: no zip, no xyz member in it, an encrypted, damaged or truncated member, or a bad structure.
    """
    from escaip.data.structure import AtomicData

    name = name or path.name
    keys = keys or LabelKeys()
    with _opened(path) as archive:
        members = _members(archive, path)
        for info in members if part is None else members[part[0] : part[1]]:
            for index, atoms in enumerate(_frames(archive, info, path)):
                structure_id = None if keys.structure_id else f"{name}:{info.filename}:{index}"
                group = str(atoms.info.get(GROUP_KEY, info.filename)) if keys.group is None else None
                data = policy.admit(
                    lambda atoms=atoms, structure_id=structure_id, group=group: AtomicData.from_ase(  # type: ignore[misc]
                        atoms, keys=keys, structure_id=structure_id, group=group, units=policy.units
                    ),
                    lambda atoms=atoms: labels_found(atoms),  # type: ignore[misc]
                )
                if data is not None:
                    yield data


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of members with about ``size`` frames together, judged by the frames per byte of a few members.

    Raises:
        DataError: no zip, or no xyz member in it.
    """
    with _opened(path) as archive:
        members = _members(archive, path)
        sampled = members[:: max(len(members) // _SAMPLED, 1)]
        frames = sum(sum(1 for _ in _texts(archive, info, path)) for info in sampled)
    allowed = size * max(sum(info.file_size for info in sampled) / max(frames, 1), 1.0)
    parts: list[Part] = []
    start, held = 0, 0
    for place, info in enumerate(members):
        if place > start and held + info.file_size > allowed:
            parts.append((start, place))
            start, held = place, 0
        held += info.file_size
    return [*parts, (start, len(members))]


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
    found = [
        info
        for info in archive.infolist()
        if PurePosixPath(info.filename).suffix in XYZ and not PurePosixPath(info.filename).name.startswith("._")
    ]
    if not found:
        held = ", ".join(archive.namelist()[:5]) or "nothing"
        raise DataError(f"{path}: holds no .xyz or .extxyz member; it holds {held}")
    names = sorted(found, key=lambda info: info.filename)
    for one, two in itertools.pairwise(names):
        if one.filename == two.filename:
            raise DataError(f"{path}: holds two members named {one.filename}; it is damaged")
    return names


def _frames(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Iterator[Atoms]:
    import ase.io

    for count, text in enumerate(_texts(archive, info, path)):
        try:
            yield ase.io.read(io.StringIO(text), index=":", format="extxyz")[0]  # type: ignore[misc]
        except GeneratorExit:
            raise
        except Exception as error:
            raise _damaged(path, info, count, error) from error


def _texts(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Iterator[str]:
    """Frames of a member as text."""
    count = 0
    try:
        with archive.open(info) as stream:
            lines = _Lines(stream)
            for frame in _xyz_frames(lines):
                lines.used = 0
                yield "".join(frame)
                count += 1
    except (GeneratorExit, DataError):
        raise
    except Exception as error:
        raise _damaged(path, info, count, error) from error


class _Lines:
    """Lines of a stream as text, within bounds."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.used = 0

    def readline(self) -> str:
        line = self.stream.readline(MAX_LINE)
        self.used += max(len(line), MIN_LINE)
        if len(line) == MAX_LINE or self.used > MAX_FRAME:
            raise ValueError("a line or a frame larger than any structure needs")
        return line.decode()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.readline()
        if not line:
            raise StopIteration
        return line


def _damaged(path: Path, info: zipfile.ZipInfo, count: int, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path}: member {info.filename} is damaged after {count} frames ({reason}); download it again")


READER = Reader("xyz_zip", "zip of (ext)xyz files, as of MPTrj", read_xyz_zip, matches, parts=divide)
