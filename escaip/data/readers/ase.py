"""Everything ASE reads: extxyz (also .gz, .bz2, .xz), traj, ASE databases, VASP, ..."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from escaip.data.readers.policy import Part, Reader, ReadPolicy, Record, ranges
from escaip.data.structure import AtomicData, LabelKeys, labels_found
from escaip.data.validation import check_choice
from escaip.errors import ConfigError, DataError
from escaip.files import one_line
from escaip.units import Units

if TYPE_CHECKING:
    from ase import Atoms
    from ase.db.core import Database

GROUP_BY = ("formula", "file", "structure")
DATABASE = ".db"
XYZ = (".xyz", ".extxyz")
COMPRESSED = (".gz", ".bz2", ".xz")
SMALL_FILE = 1 << 24
"""Bytes below which dividing an (ext)xyz file is not worth reading it twice."""


def read_ase(
    path: Path,
    name: str,
    policy: ReadPolicy,
    *,
    keys: LabelKeys | None = None,
    part: Part | None = None,
    index: str | int | None = None,
    group_by: str = "formula",
) -> Iterator[AtomicData]:
    """Yields the structures of one file; ids are ``name:position in the file``, or row ids of a database.

    Options:
        index: ASE index or slice (``"-1"``, ``"::10"``), or for a database also a query (``"natoms<20"``).
        group_by: where no ``keys.group`` is named: ``formula``, ``file`` or ``structure`` (each on its own).

    Raises:
        DataError: a file that is missing, empty, truncated or of unknown format, or a bad structure.
        ConfigError: an unknown ``group_by`` or ``index``.
    """
    check_choice("group_by", group_by, GROUP_BY)
    database = path.suffix == DATABASE
    if part is not None:
        if index is not None:
            raise ConfigError(f"index: {index!r} cannot be combined with reading a part of a file")
        index = f"id>={part[0]},id<{part[1]}" if database else f"{part[0]}:{part[1]}"
    frames = _database(path, index) if database else _frames(path, index)
    yield from policy.admit(
        record_of(held(atoms), f"{name}:{position}", name, keys or LabelKeys(), policy, group_by)
        for position, atoms in frames
    )


def held(atoms: Atoms) -> Callable[[], Atoms]:
    """Returns a function that returns ``atoms``."""
    return lambda: atoms


def record_of(
    make: Callable[[], Atoms],
    structure_id: str,
    file: str,
    keys: LabelKeys,
    policy: ReadPolicy,
    group_by: str = "formula",
) -> Record:
    """Returns the record of an ``ase.Atoms``; ``keys`` go before ``structure_id`` and ``group_by``."""
    group = {"file": file, "structure": structure_id}.get(group_by) if keys.group is None else None
    own = None if keys.structure_id else structure_id

    def build() -> AtomicData:
        atoms = make()
        if level := atoms.info.get("level_of_theory"):
            policy.report.levels.add(str(level))
        return AtomicData.from_ase(atoms, keys=keys, structure_id=own, group=group, units=policy.units or Units())

    return Record(build, lambda: labels_found(make()))


def matches(path: Path, head: bytes) -> bool:
    """Any file: ASE says itself what it cannot read."""
    return not path.is_dir()


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of frames of a plain (ext)xyz file, or of row ids of a database; other files are read whole."""
    if path.suffix == DATABASE:
        with _open_database(path) as database:
            ids = [row.id for row in database.select(columns=["id"], include_data=False)]
        blocks = [ids[start : start + size] for start in range(0, len(ids), size)]
        return [(block[0], block[-1] + 1) for block in blocks]
    if path.suffix not in XYZ or path.stat().st_size < SMALL_FILE:
        return []
    with open(path, encoding="utf-8") as file:
        return ranges(sum(1 for _ in xyz_frames(file)), size)


def xyz_frames(file: io.TextIOBase | IO[str]) -> Iterator[str]:
    """Yields the text of each frame: number of atoms, comment, atoms, and cell vectors where they follow."""
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
        yield "".join(lines)
    if any(rest.strip() for rest in file):
        raise ValueError("a blank line stands between frames; remove it")


def parse_xyz(text: str) -> Atoms:
    """Returns the structure of one frame, as ASE reads it."""
    import ase.io

    return ase.io.read(io.StringIO(text), index=":", format="extxyz")[0]  # type: ignore[return-value]


def _frames(path: Path, index: str | int | None) -> Iterator[tuple[int, Atoms]]:
    """Frames with their position in the file, streamed unless the index counts from the end."""
    chosen = _slice(index)
    start, step = chosen.start or 0, chosen.step or 1
    if start >= 0 and step > 0 and (chosen.stop is None or chosen.stop >= 0):
        positions = range(start, sys.maxsize if chosen.stop is None else chosen.stop, step)
        yield from zip(positions, _iterate(path, positions), strict=False)
    else:
        yield from list(enumerate(_iterate(path, range(sys.maxsize))))[chosen]


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


def _iterate(path: Path, positions: range) -> Iterator[Atoms]:
    """ASE's reader; whatever it raises becomes one line that names file and frame."""
    import ase.io
    from ase.io.formats import UnknownFileTypeError

    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty")
    stop = "" if positions.stop == sys.maxsize else positions.stop
    is_xyz = path.suffix in XYZ or (path.suffix in COMPRESSED and Path(path.stem).suffix in XYZ)
    count = 0
    try:
        index = f"{positions.start}:{stop}:{positions.step}"
        read = partial(ase.io.iread, do_not_split_by_at_sign=True)  # an @ belongs to the name
        for atoms in _iterate_xyz(path, positions) if is_xyz else read(path, index):
            yield atoms
            count += 1
    except UnknownFileTypeError as error:
        raise DataError(f"{path}: ASE does not know this format; convert it to extxyz first") from error
    except (GeneratorExit, DataError):
        raise
    except Exception as error:
        reason = one_line(error)
        raise DataError(f"{path}: damaged or truncated after {count} structures were read ({reason})") from error


def _iterate_xyz(path: Path, positions: range) -> Iterator[Atoms]:
    """Frames of an (ext)xyz file in one pass; ASE alone seeks back in compressed files."""
    from ase.io.formats import open_with_compression

    if not positions:
        return
    with open_with_compression(str(path), "r") as file:
        for position, text in enumerate(xyz_frames(file)):
            if position in positions:
                yield parse_xyz(text)
            if position >= positions[-1]:
                return


@contextmanager
def _open_database(path: Path) -> Iterator[Database]:
    import ase.db

    try:
        with ase.db.connect(path, serial=True) as database:
            yield database
    except (GeneratorExit, DataError):
        raise
    except Exception as error:
        raise DataError(f"{path}: not a readable ASE database or a bad query ({one_line(error)})") from error


def _database(path: Path, index: str | int | None) -> Iterator[tuple[int, Atoms]]:
    """Rows of an ASE database by id; key-value pairs and data can be named as labels."""
    query, chosen = None, slice(None)
    try:
        chosen = _slice(index)
    except ConfigError:
        query = index
    with _open_database(path) as database:
        for row_id in [row.id for row in database.select(query, columns=["id"], include_data=False)][chosen]:
            row = database.get(id=row_id)
            atoms = row.toatoms()
            atoms.info.update(row.key_value_pairs)
            atoms.info.update(row.data)
            yield row_id, atoms


READER = Reader("ase", read_ase, matches, divide)
