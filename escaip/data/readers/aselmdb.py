"""ASE databases in LMDB (``.aselmdb``): OMat24, sAlex, OMol25 and OC20 as recomputed.

Rows have the keys ``"1"`` to ``nextid − 1``, less ``deleted_ids``; each is zlib-compressed JSON. ASE writes an array as
``{"__ndarray__": [shape, dtype, flat]}``; other writers use nested lists. Nothing that a row names is imported or
called, and sizes are checked before memory is taken for them.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.readers.ase import GROUP_BY, record_of
from escaip.data.readers.ocp_lmdb import open_environment
from escaip.data.readers.policy import Part, Reader, ReadPolicy, Record
from escaip.data.structure import AtomicData, LabelKeys, floats, integers
from escaip.data.validation import check_choice
from escaip.errors import DataError
from escaip.files import one_line
from escaip.types import TARGETS

if TYPE_CHECKING:
    import lmdb
    from ase import Atoms

SUFFIX = ".aselmdb"

MAX_BYTES = 1 << 26
"""Bytes that a row may decompress to, half a million atoms with forces; parsed, JSON takes many times as much."""

_DTYPES = frozenset({"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "float32", "float64"})


def read_aselmdb(
    path: Path,
    name: str,
    policy: ReadPolicy,
    *,
    keys: LabelKeys | None = None,
    part: Part | None = None,
    group_by: str = "formula",
) -> Iterator[AtomicData]:
    """Yields the rows of one file in the order of their ids; ids of structures are ``name:row``.

    Labels are those of the row; keys that are named are looked for in the row's ``data``, its key-value pairs and its
    labels. Charge comes from ``charge`` and spin multiplicity from ``spin_multiplicity`` or ``spin`` in ``data`` or the
    pairs (OMol25). Atoms under ``FixAtoms`` are fixed. The default group is the formula, so that all structures of a
    material that was strained or rattled stay in one part of a split.

    Options:
        group_by: where no ``keys.group`` is named: ``formula``, ``file`` or ``structure`` (each on its own).

    Raises:
        DataError: no LMDB file, a truncated one, a missing or damaged row, a named key that is absent.
        ConfigError: an unknown ``group_by``.
    """
    check_choice("group_by", group_by, GROUP_BY)
    yield from policy.admit(_records(path, name, policy, keys or LabelKeys(), part, group_by))


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of row ids with ``size`` rows."""
    with open_environment(path) as environment:
        stop, deleted = _ids(environment, path)
    ids = [row_id for row_id in range(1, stop) if row_id not in deleted]
    return list(pairwise([1, *ids[size::size], stop]))


def list_aselmdb_files(path: Path) -> list[Path]:
    """Lists the ``.aselmdb`` files of a folder and of the folders in it, as the parts of OMat24 are unpacked."""
    return sorted(file for pattern in (f"*{SUFFIX}", f"*/*{SUFFIX}") for file in path.glob(pattern) if file.is_file())


def matches(path: Path, head: bytes) -> bool:
    """Files named ``.aselmdb``, and folders of them."""
    return bool(list_aselmdb_files(path)) if path.is_dir() else path.suffix == SUFFIX


def decode_json(value: bytes | memoryview, name: str) -> Any:
    """Returns the content of zlib-compressed JSON; NaN and Infinity count as numbers, since ASE writes them."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(value, MAX_BYTES)
    except zlib.error as error:
        raise DataError(f"{name}: is no zlib-compressed JSON, or damaged ({error})") from error
    if stream.unconsumed_tail:
        raise DataError(f"{name}: decompresses to more than {MAX_BYTES >> 20} MiB, which no row needs; it is damaged")
    if not stream.eof:
        raise DataError(f"{name}: is truncated; copy or unpack the file again")
    return _parsed(text, name)


def _records(
    path: Path, name: str, policy: ReadPolicy, keys: LabelKeys, part: Part | None, group_by: str
) -> Iterator[Record]:
    with open_environment(path) as environment, environment.begin(buffers=True) as transaction:
        stop, deleted = _ids(environment, path)
        first, stop = (1, stop) if part is None else (max(part[0], 1), min(part[1], stop))
        for row_id in range(first, stop):
            if row_id not in deleted:
                label = f"{name}:{row_id}"
                make = partial(_atoms_of, transaction.get(b"%d" % row_id), label)
                yield record_of(make, label, name, keys, policy, group_by)


def _ids(environment: lmdb.Environment, path: Path) -> tuple[int, frozenset[int]]:
    """``stop`` and ``deleted``: there are the rows ``1 <= id < stop`` without the deleted, as the entries confirm."""
    with environment.begin() as transaction:
        raw = {key: transaction.get(key) for key in (b"nextid", b"deleted_ids", b"metadata")}
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
    return stop, deleted


def _atoms_of(value: memoryview | None, name: str) -> Atoms:
    """The structure of a row; its ``data`` and key-value pairs become ``info``."""
    from ase import Atoms
    from ase.calculators.calculator import all_properties
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.constraints import FixAtoms

    if value is None:
        raise DataError(f"{name}: the row is missing and not among deleted_ids; copy or unpack the file again")
    row = decode_json(value, name)
    if not isinstance(row, dict) or row.get("numbers") is None or row.get("positions") is None:
        raise DataError(f"{name}: is no row of an ASE database (needs numbers and positions)")
    cell, pbc = _array(row, "cell", name), _array(row, "pbc", name, integers)
    if (cell is not None and cell.shape not in ((3, 3), (3,))) or (pbc is not None and pbc.shape != (3,)):
        raise DataError(f"{name}: cell and pbc must have shapes (3, 3) and (3,)")
    try:
        atoms = Atoms(
            numbers=np.ravel(_array(row, "numbers", name, integers)),  # type: ignore[arg-type]
            positions=_array(row, "positions", name),
            cell=cell,
            pbc=pbc,
            tags=_array(row, "tags", name, integers),
        )
    except ValueError as error:
        raise DataError(f"{name}: numbers, positions and tags do not fit together ({one_line(error)})") from error
    fixed = _fixed_atoms(row.get("constraints"), len(atoms), name)
    if fixed.any():
        atoms.set_constraint(FixAtoms(mask=fixed))
    results = {key: _array(row, key, name) for key in all_properties if row.get(key) is not None}
    if results:
        atoms.calc = SinglePointCalculator(Atoms(), **results)  # copies its atoms, which nobody asks for here
    for key in ("key_value_pairs", "data"):
        atoms.info.update({label: _value(item) for label, item in _mapping(row.get(key), key, name).items()})
    atoms.info.update({key: _array(row, key, name) for key in TARGETS if key in row and key not in results})
    return atoms


def _array(
    row: Mapping[str, Any], key: str, name: str, convert: Callable[[Any, str, str], NDArray[Any]] = floats
) -> NDArray[Any] | None:
    value = _value(row.get(key))
    return None if value is None else convert(value, key, name)


def _value(value: Any) -> Any:
    """An encoded array as an array where shape, type and numbers belong together; any other value as it is."""
    if isinstance(value, dict):
        if isinstance(value.get("array"), dict):  # ase.cell.Cell
            return _value(value["array"])
        with suppress(KeyError, TypeError, ValueError, OverflowError):
            shape, dtype, flat = value["__ndarray__"]
            if dtype in _DTYPES and len(shape) <= 4 and math.prod(shape) == len(flat):
                return np.array(flat, dtype=dtype).reshape(shape)
    return value


def _fixed_atoms(constraints: Any, count: int, name: str) -> NDArray[np.bool_]:
    """Atoms that a constraint holds in all three directions; constraints may be encoded once more as text."""
    fixed = np.zeros(count, dtype=bool)
    listed = _parsed(constraints, f"{name}: constraints") if isinstance(constraints, str) else constraints
    for constraint in listed or ():
        if not isinstance(constraint, dict):
            raise DataError(f"{name}: constraints holds a {type(constraint).__name__}, expected ASE's dictionaries")
        kind = str(constraint.get("name", constraint.get("__name__", ""))).rpartition(".")[2]
        inner = constraint.get("kwargs", constraint)
        if kind not in ("FixAtoms", "FixCartesian", "FixScaled") or not isinstance(inner, dict):
            continue
        mask = _value(inner.get("mask"))
        chosen = _value(inner.get("indices", inner.get("index", inner.get("a"))))
        if kind == "FixAtoms":
            chosen = chosen if mask is None else mask
        elif mask is not None and not np.all(mask):
            continue
        indices = np.asarray(chosen)
        if indices.size and (indices.dtype.kind not in "biu" or indices.ndim > 1):
            raise DataError(f"{name}: {kind} holds {str(chosen)[:60]}, expected atom numbers or a mask")
        try:
            fixed[indices if indices.size else []] = True
        except IndexError as error:
            raise DataError(f"{name}: {kind} names atoms beyond the {count} of the structure") from error
    return fixed


def _parsed(text: bytes | str, name: str) -> Any:
    import orjson

    try:
        return orjson.loads(text)
    except ValueError:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: is no JSON, or damaged ({one_line(error)})") from error


def _mapping(value: Any, what: str, name: str) -> dict[str, Any]:
    """A dictionary, also one that is encoded once more as text; empty for None."""
    found = _parsed(value, f"{name}: {what}") if isinstance(value, str) else value
    if found is not None and not isinstance(found, dict):
        raise DataError(f"{name}: {what} is a {type(found).__name__}, expected a dictionary")
    return found or {}


READER = Reader("aselmdb", read_aselmdb, matches, divide, list_aselmdb_files)
