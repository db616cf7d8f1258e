"""Everything ASE reads: extxyz (also .gz, .bz2, .xz), traj, ASE databases, VASP, ..."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip.data.readers.policy import Part, Reader, ReadPolicy
from escaip.data.structure import LabelKeys, labels_found
from escaip.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ase import Atoms

    from escaip.data.structure import AtomicData

GROUP_BY = ("formula", "file", "structure")
DATABASES = (".db",)
XYZ = (".xyz", ".extxyz")
COMPRESSED = (".gz", ".bz2", ".xz")
SMALL_FILE = 1 << 24
"""Bytes below which dividing an (ext)xyz file is not worth reading it twice."""


def read_ase(
    path: Path,
    policy: ReadPolicy,
    *,
    name: str | None = None,
    keys: LabelKeys | None = None,
    part: Part | None = None,
    index: str | int | None = None,
    group_by: str = "formula",
) -> Iterator[AtomicData]:
    """Structures of one file, in order.

    Args:
        path: the file.
        policy: units and error policy.
        name: what ids begin with; default the file's name. Ids are ``name:position in the file``.
        keys: label names; see :class:`LabelKeys`.
        part: frames of an (ext)xyz file, or row ids of a database, from :func:`divide`.
        index: ASE index or slice (``"-1"``, ``"::10"``), or for a database also a query (``"natoms<20"``).
        group_by: where no ``keys.group`` is named: ``formula``, ``file`` or ``structure`` (each on its own).

    Raises:
        DataError: a file that is missing, empty, truncated or of unknown format, or a bad structure.
        ConfigError: an unknown ``group_by``.
    """
    from escaip.data.structure import AtomicData

    if group_by not in GROUP_BY:
        raise ConfigError(f"group_by: {group_by!r} is not one of {', '.join(GROUP_BY)}")
    name = name or path.name
    keys = keys or LabelKeys()
    if part is not None:
        if index is not None:
            raise ConfigError(f"index: {index!r} cannot be combined with reading a part of a file")
        index = f"{part[0]}:{part[1]}" if path.suffix not in DATABASES else f"id>={part[0]},id<{part[1]}"
    frames = _database(path, index) if path.suffix in DATABASES else _frames(path, index)
    for position, atoms in frames:
        structure_id = None if keys.structure_id else f"{name}:{position}"
        group = {"file": name, "structure": structure_id}.get(group_by) if keys.group is None else None
        data = policy.admit(
            lambda atoms=atoms, structure_id=structure_id, group=group: AtomicData.from_ase(  # type: ignore[misc]
                atoms, keys=keys, structure_id=structure_id, group=group, units=policy.units
            ),
            lambda atoms=atoms: labels_found(atoms),  # type: ignore[misc]
        )
        if data is not None:
            yield data


def matches(path: Path, head: bytes) -> bool:
    """Any file: ASE says itself what it cannot read."""
    return not path.is_dir()


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of frames of a plain (ext)xyz file, or of row ids of a database; other files are one range.

    Raises:
        DataError: a damaged file.
    """
    if path.suffix in DATABASES:
        ids = [row_id for row_id, _ in _database(path, None, with_atoms=False)]
        blocks = [ids[start : start + size] for start in range(0, len(ids), size)]
        return [(block[0], block[-1] + 1) for block in blocks]
    if path.suffix not in XYZ or path.stat().st_size < SMALL_FILE:
        return []
    with open(path, encoding="utf-8") as file:
        count = sum(1 for _ in _xyz_frames(file))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _frames(path: Path, index: str | int | None) -> Iterator[tuple[int, Atoms]]:
    """Frames with their position in the file, streamed unless the index counts from the end."""
    chosen = _slice(index)
    start, step = chosen.start or 0, chosen.step or 1
    if start >= 0 and step > 0 and (chosen.stop is None or chosen.stop >= 0):
        text = f"{start}:{'' if chosen.stop is None else chosen.stop}:{step}"
        for count, atoms in enumerate(_iterate(path, text)):
            yield start + count * step, atoms
        return
    yield from list(enumerate(_iterate(path, ":")))[chosen]


def _slice(index: str | int | None) -> slice:
    from ase.io.formats import string2index

    try:
        value = string2index(str(index)) if index is not None else slice(None)
    except ValueError:
        value = None
    if isinstance(value, int):
        return slice(value, value + 1 or None)
    if not isinstance(value, slice):
        raise ConfigError(f"index: {index!r} is neither a number nor a slice like '0:100' or '::10'")
    return value


def _iterate(path: Path, index: str) -> Iterator[Atoms]:
    """ASE's reader; whatever it raises becomes one line that names file and frame."""
    import ase.io
    from ase.io.formats import UnknownFileTypeError

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty")
    count = 0
    try:
        for atoms in _iterate_xyz(path, index) if _is_xyz(path) else ase.io.iread(path, index):
            yield atoms
            count += 1
    except UnknownFileTypeError as error:
        raise DataError(f"{path}: ASE does not know this format; convert it to extxyz first") from error
    except (GeneratorExit, DataError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: damaged or truncated after {count} structures were read ({reason})") from error


def _is_xyz(path: Path) -> bool:
    return path.suffix in XYZ or (path.suffix in COMPRESSED and Path(path.stem).suffix in XYZ)


def _iterate_xyz(path: Path, index: str) -> Iterator[Atoms]:
    """Frames of an (ext)xyz file in one pass, each parsed by ASE; ASE alone seeks back in compressed files."""
    import ase.io
    from ase.io.formats import open_with_compression

    chosen = _slice(index)
    wanted = range(chosen.start or 0, sys.maxsize if chosen.stop is None else chosen.stop, chosen.step or 1)
    if not wanted:
        return
    with open_with_compression(str(path), "r") as file:
        for position, lines in enumerate(_xyz_frames(file)):
            if position in wanted:
                frames = ase.io.read(io.StringIO("".join(lines)), index=":", format="extxyz")
                yield frames[0]  # type: ignore[misc]
            if position >= wanted[-1]:
                return


def _xyz_frames(file: Any) -> Iterator[list[str]]:
    """Lines of each frame: number of atoms, comment, atoms, and cell vectors where they follow."""
    line = file.readline()
    while line.strip():
        count = int(line)
        lines = [line, *itertools.islice(file, count + 1)]
        if len(lines) != count + 2:
            raise ValueError(f"the last frame has {max(len(lines) - 2, 0)} atoms, expected {count}")
        line = file.readline()
        while line.lstrip().startswith("VEC"):
            lines.append(line)
            line = file.readline()
        yield lines
    if any(rest.strip() for rest in file):
        raise ValueError("a blank line stands between frames; remove it")


def _database(path: Path, index: str | int | None, with_atoms: bool = True) -> Iterator[tuple[int, Any]]:
    """Rows of an ASE database; key-value pairs and data can be named as labels. Positions are row ids."""
    import ase.db

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    selection: Any = None
    chosen = slice(None)
    try:
        chosen = _slice(index)
    except ConfigError:
        selection = index
    try:
        with ase.db.connect(path, serial=True) as database:
            ids = [row.id for row in database.select(selection, columns=["id"], include_data=False)]
            for row_id in ids[chosen]:
                if not with_atoms:
                    yield row_id, None
                    continue
                row = database.get(id=row_id)
                atoms = row.toatoms()
                atoms.info.update(row.key_value_pairs)
                atoms.info.update(row.data)
                yield row_id, atoms
    except (GeneratorExit, DataError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a readable ASE database or a bad query ({reason})") from error


READER = Reader("ase", "everything ASE reads: extxyz, traj, db, VASP, ...", read_ase, matches, parts=divide)
