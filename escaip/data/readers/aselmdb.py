"""ASE databases in LMDB (``.aselmdb``): OMat24, sAlex, OMol25 and OC20 as recomputed.

Rows have the keys ``"1"`` to ``nextid − 1``, less ``deleted_ids``; each is zlib-compressed JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip.data.readers.ase import GROUP_BY
from escaip.data.readers.ase_row import Row, decode_json, decode_row, structure_of
from escaip.data.readers.ocp_lmdb import open_environment
from escaip.data.readers.policy import Part, Reader, ReadPolicy
from escaip.data.structure import LabelKeys
from escaip.errors import ConfigError, DataError

if TYPE_CHECKING:
    from escaip.data.structure import AtomicData

SUFFIX = ".aselmdb"
_NOT_ROWS = (b"nextid", b"deleted_ids", b"metadata")


@dataclass(frozen=True)
class _Ids:
    """Which rows there are: ``1 <= id < stop`` without ``deleted``."""

    stop: int
    deleted: frozenset[int]

    def within(self, part: Part | None) -> Iterator[int]:
        first, stop = (1, self.stop) if part is None else (max(part[0], 1), min(part[1], self.stop))
        return (row_id for row_id in range(first, stop) if row_id not in self.deleted)


def read_aselmdb(
    path: Path,
    policy: ReadPolicy,
    *,
    name: str | None = None,
    keys: LabelKeys | None = None,
    part: Part | None = None,
    group_by: str = "formula",
) -> Iterator[AtomicData]:
    """Rows of one file in the order of their ids.

    Ids are ``file:row``. Labels are those of the row; keys that are named are looked for in the row's ``data``, its
    key-value pairs and the row itself. Charge comes from ``charge`` and spin multiplicity from ``spin_multiplicity``
    or ``spin`` in ``data`` or the pairs (OMol25). Atoms under ``FixAtoms`` are fixed. The default group is the
    formula: no structure of a material that was strained or rattled is ever parted from the others.

    Args:
        path: LMDB file.
        policy: units and error policy.
        name: what ids begin with; default the file's name.
        keys: label names; see :class:`LabelKeys`.
        part: row ids to read.
        group_by: where no ``keys.group`` is named: ``formula``, ``file`` or ``structure`` (each on its own).

    Raises:
        DataError: no LMDB file, a truncated one, a missing or damaged row, a named key that is absent.
        ConfigError: an unknown ``group_by``.
    """
    if group_by not in GROUP_BY:
        raise ConfigError(f"group_by: {group_by!r} is not one of {', '.join(GROUP_BY)}")
    name = name or path.name
    keys = keys or LabelKeys()
    last: list[Row] = []

    def build(value: memoryview | None, row_id: int) -> AtomicData:
        last.clear()
        label = f"{name}:{row_id}"
        if value is None:
            raise DataError(
                f"{label}: row {row_id} is missing in {path} and not among deleted_ids; copy or unpack the file again"
            )
        row = decode_row(value, label)
        last.append(row)
        structure_id = None if keys.structure_id else label
        group = {"file": name, "structure": label}.get(group_by) if keys.group is None else None
        return structure_of(row, keys, policy.units, structure_id, group)

    with open_environment(path) as environment, environment.begin(buffers=True) as transaction:
        for row_id in _ids(environment, path).within(part):
            value = transaction.get(b"%d" % row_id)
            data = policy.admit(
                lambda value=value, row_id=row_id: build(value, row_id),  # type: ignore[misc]
                lambda: last[0].found() if last else "nothing",
            )
            if data is not None:
                yield data


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of row ids of about ``size`` rows.

    Raises:
        DataError: no LMDB file, or a damaged one.
    """
    with open_environment(path) as environment:
        ids = _ids(environment, path)
    parts: list[Part] = []
    start, count = 1, 0
    if not ids.deleted:
        return [(first, min(first + size, ids.stop)) for first in range(1, ids.stop, size)]
    for row_id in ids.within(None):
        if count == size:
            parts.append((start, row_id))
            start, count = row_id, 0
        count += 1
    return [*parts, (start, ids.stop)]


def list_aselmdb_files(path: Path) -> list[Path]:
    """The ``.aselmdb`` files of a folder and of the folders in it, as the parts of OMat24 are unpacked."""
    return sorted(file for pattern in (f"*{SUFFIX}", f"*/*{SUFFIX}") for file in path.glob(pattern) if file.is_file())


def matches(path: Path, head: bytes) -> bool:
    """Files named ``.aselmdb``, and folders of them."""
    if path.is_dir():
        return bool(list_aselmdb_files(path))
    return path.suffix == SUFFIX


def read_metadata(path: Path) -> dict[str, Any]:
    """What a file says of itself, as ASE keeps it under ``metadata``; empty where it says nothing.

    Raises:
        DataError: no LMDB file, or a damaged one.
    """
    with open_environment(path) as environment, environment.begin() as transaction:
        value = transaction.get(b"metadata")
        content = {} if value is None else decode_json(value, f"{path}: metadata")
    return content if isinstance(content, dict) else {}


def _ids(environment: Any, path: Path) -> _Ids:
    """The ids of the rows, checked against the number of entries."""
    with environment.begin() as transaction:
        raw = {key: transaction.get(key) for key in _NOT_ROWS}
    if raw[b"nextid"] is None:
        raise DataError(f"{path}: has no nextid, so it is no ASE database in LMDB, or an empty one")
    stop = decode_json(raw[b"nextid"], f"{path}: nextid")
    given = [] if raw[b"deleted_ids"] is None else decode_json(raw[b"deleted_ids"], f"{path}: deleted_ids")
    if type(stop) is not int or not isinstance(given, list) or any(type(row_id) is not int for row_id in given):
        raise DataError(f"{path}: nextid or deleted_ids holds something else than whole numbers; the file is damaged")
    deleted = frozenset(row_id for row_id in given if 0 < row_id < stop)
    rows = stop - 1 - len(deleted)
    held = int(environment.stat()["entries"]) - sum(value is not None for value in raw.values())
    if rows <= 0:
        raise DataError(f"{path}: holds no rows")
    with environment.begin() as transaction:
        beyond = transaction.get(b"%d" % stop) is not None
    # Single holes are named as they are met; a file without most of its rows would only be a long list of them.
    if held < rows / 2 or beyond:
        raise DataError(
            f"{path}: should have {rows} rows (nextid {stop}, {len(deleted)} deleted) and has {held}; "
            "it is damaged or was not finished"
        )
    return _Ids(stop, deleted)


READER = Reader(
    "aselmdb", "ASE databases in LMDB: OMat24, sAlex, OMol25", read_aselmdb, matches, divide, list_aselmdb_files
)
