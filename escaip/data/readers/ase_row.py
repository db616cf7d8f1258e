"""One row of an ASE database as kept in JSON: numbers, labels and constraints, without building an ``ase.Atoms``.

ASE writes an array as ``{"__ndarray__": [shape, dtype, flat]}``; other writers use nested lists. Nothing that a row
names is imported or called.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip.data.structure import IGNORE, LABELS, LabelKeys, hill_formula, stress_from_virial
from escaip.errors import DataError
from escaip.types import TARGETS

if TYPE_CHECKING:
    from escaip.data.structure import AtomicData
    from escaip.units import Units

MAX_BYTES = 1 << 26
"""Bytes that a row may decompress to, half a million atoms with forces; parsed, JSON takes many times as much."""

_DTYPES = frozenset({"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "float32", "float64"})
_OWN = ("unique_id", "ctime", "mtime", "user", "calculator", "calculator_parameters", "constraints")


@dataclass(frozen=True)
class Row:
    """A decoded row; arrays are still as in JSON.

    Attributes:
        name: what messages call it.
        fields: of the row itself: ``numbers``, ``positions``, ``energy``, ...
        pairs: its ``key_value_pairs``.
        data: its ``data``; OMol25 keeps charge and spin multiplicity here.
    """

    name: str
    fields: Mapping[str, Any]
    pairs: Mapping[str, Any]
    data: Mapping[str, Any]

    def find(self, key: str, label: str) -> Any:
        """The value under a key that was named, in ``data``, the key-value pairs or the row.

        Raises:
            DataError: it is in none of them; what there is, is listed.
        """
        for place in (self.data, self.pairs, self.fields):
            if key in place:
                return value_of(place[key], label, self.name)
        raise DataError(
            f"{self.name}: no {label} under the key {key!r}; found {self.found()}; name one of these in keys"
        )

    def optional(self, *names: str) -> Any:
        """The value under the first of these names that ``data`` or the key-value pairs hold, or None."""
        for key in names:
            for place in (self.data, self.pairs):
                if place.get(key) is not None:
                    return value_of(place[key], key, self.name)
        return None

    def array(self, key: str, dtype: type = np.float64) -> np.ndarray | None:
        """An array of the row, or None.

        Raises:
            DataError: something else than numbers.
        """
        if self.fields.get(key) is None:
            return None
        value = value_of(self.fields[key], key, self.name)
        try:
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise ValueError(array.dtype)
            converted: np.ndarray = array.astype(dtype, copy=False)
            if dtype is np.int64 and array.dtype.kind == "f" and not np.array_equal(converted, array):
                raise ValueError("not whole")
            return converted
        except (TypeError, ValueError, OverflowError) as error:
            kind = "whole numbers" if dtype is np.int64 else "numbers"
            raise DataError(f"{self.name}: {key} holds something else than {kind}") from error

    def found(self) -> str:
        """The keys a user can name, for messages."""
        return "; ".join(
            f"{what}: {', '.join(sorted(key for key in place if key not in _OWN)) or 'none'}"
            for what, place in (("data", self.data), ("key_value_pairs", self.pairs), ("row", self.fields))
        )


def decode_row(value: bytes | memoryview, name: str) -> Row:
    """A row from its compressed JSON.

    Raises:
        DataError: truncated, larger than :data:`MAX_BYTES`, no JSON, or no row.
    """
    content = decode_json(value, name)
    if not isinstance(content, dict) or content.get("numbers") is None or content.get("positions") is None:
        raise DataError(f"{name}: is no row of an ASE database (needs numbers and positions)")
    parts = {key: _mapping(content.get(key), key, name) for key in ("key_value_pairs", "data")}
    own = {key: item for key, item in content.items() if key not in parts}
    return Row(name, own, parts["key_value_pairs"], parts["data"])


def decode_json(value: bytes | memoryview, name: str) -> Any:
    """What zlib-compressed JSON holds, within bounds.

    Raises:
        DataError: truncated, too large, or no JSON.
    """
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(value, MAX_BYTES)
    except zlib.error as error:
        raise DataError(f"{name}: is no zlib-compressed JSON, or damaged ({error})") from error
    if stream.unconsumed_tail:
        raise DataError(f"{name}: decompresses to more than {MAX_BYTES >> 20} MiB, which no row needs; it is damaged")
    if not stream.eof:
        raise DataError(f"{name}: is truncated; copy or unpack the file again")
    return parse_json(text, name)


def parse_json(text: bytes | str, name: str) -> Any:
    """What a JSON text holds; NaN and Infinity count as numbers, since ASE writes them.

    Raises:
        DataError: no JSON.
    """
    import orjson

    try:
        return orjson.loads(text)
    except ValueError:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: is no JSON, or damaged ({' '.join(str(error).split())})") from error


def value_of(value: Any, what: str, name: str) -> Any:
    """A number, text or list as it is; an encoded array as an array.

    Raises:
        DataError: an array whose shape, type and numbers do not belong together, or of another kind than numbers.
    """
    if not isinstance(value, dict):
        return value
    if "__ndarray__" not in value:
        if "array" in value:  # ase.cell.Cell
            return value_of(value["array"], what, name)
        raise DataError(f"{name}: {what} is no number or array (keys {', '.join(sorted(map(str, value))[:5])})")
    try:
        shape, dtype, flat = value["__ndarray__"]
        sizes = [int(size) for size in shape]
        if dtype not in _DTYPES or len(sizes) > 4 or min(sizes, default=0) < 0 or math.prod(sizes) != len(flat):
            raise ValueError
        return np.array(flat, dtype=dtype).reshape(sizes)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: {what} is no array of real numbers whose shape fits its content") from error


def structure_of(row: Row, keys: LabelKeys, units: Units, structure_id: str | None, group: str | None) -> AtomicData:
    """The structure of a row.

    Args:
        row: from :func:`decode_row`.
        keys: label names; what they do not name is taken from where ASE keeps it.
        units: of the file.
        structure_id: None to take it from ``keys.structure_id``.
        group: None to take it from ``keys.group``, else the formula.

    Raises:
        DataError: a named key that is absent, an invalid structure, damaged numbers.
    """
    from escaip.data.structure import AtomicData

    name = structure_id or str(row.find(keys.structure_id or "", "structure_id"))
    numbers = np.ravel(row.array("numbers", np.int64))  # type: ignore[arg-type]
    cell = _cell(row)
    if group is None:
        group = str(row.find(keys.group, "group")) if keys.group else hill_formula(numbers)
    charge = row.find(keys.charge, "charge") if keys.charge else row.optional("charge")
    spin = None
    if keys.spin and keys.spin != IGNORE:
        spin = row.find(keys.spin, "spin")
    elif not keys.spin:
        spin = row.optional("spin_multiplicity", "spin")
    periodic = row.array("pbc", np.bool_)
    labels = _labels(row, keys, cell, units)
    return AtomicData.from_arrays(
        numbers,
        row.array("positions"),  # type: ignore[arg-type]
        cell=cell,
        pbc=False if periodic is None else _shaped(periodic, (3,), "pbc", row),
        charge=0 if charge is None else charge,
        spin_multiplicity=1 if spin is None else spin,
        fixed=_fixed_atoms(row, len(numbers)),
        tags=row.array("tags", np.int64),
        magnetic_moments=row.array("magmoms"),
        structure_id=name,
        group=group,
        units=units,
        energy=labels.pop("energy"),
        forces=labels.pop("forces"),
        stress=labels.pop("stress"),
        labels=labels,
    )


def _labels(row: Row, keys: LabelKeys, cell: np.ndarray | None, units: Units) -> dict[str, Any]:
    labels: dict[str, Any] = {}
    for target in TARGETS:
        key = keys.targets.get(target)
        if key is not None:
            labels[target] = row.find(key, target)
        elif target in LABELS:
            labels[target] = None if keys.names_labels else row.array(target)
        else:
            labels[target] = row.array(target) if target in row.fields else row.optional(target)
    if keys.virial is not None:
        labels["stress"] = stress_from_virial(row.find(keys.virial, "virial"), cell, units, row.name)
    return labels


def _cell(row: Row) -> np.ndarray | None:
    """``(3, 3)``; ASE also keeps an orthorhombic cell as three lengths."""
    cell = row.array("cell")
    if cell is None:
        return None
    return np.diag(cell) if cell.shape == (3,) else _shaped(cell, (3, 3), "cell", row)


def _fixed_atoms(row: Row, count: int) -> np.ndarray:
    """Atoms that a constraint holds in all three directions."""
    fixed = np.zeros(count, dtype=bool)
    for constraint in _listed(row.fields.get("constraints"), "constraints", row.name):
        if not isinstance(constraint, dict):
            raise DataError(f"{row.name}: constraints holds a {type(constraint).__name__}, expected ASE's dictionaries")
        kind = str(constraint.get("name", constraint.get("__name__", ""))).rpartition(".")[2]
        inner = constraint.get("kwargs", constraint)
        if kind not in ("FixAtoms", "FixCartesian", "FixScaled") or not isinstance(inner, dict):
            continue
        mask = inner.get("mask")
        if kind == "FixAtoms" and mask is not None:
            chosen = _indices(mask, kind, row)
        else:
            if kind != "FixAtoms" and mask is not None and not np.all(value_of(mask, kind, row.name)):
                continue
            chosen = _indices(inner.get("indices", inner.get("index", inner.get("a"))), kind, row)
        try:
            fixed[chosen] = True
        except IndexError as error:
            raise DataError(f"{row.name}: {kind} names atoms beyond the {count} of the structure") from error
    return fixed


def _indices(value: Any, kind: str, row: Row) -> np.ndarray:
    array = np.asarray(value_of(value, kind, row.name))
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "biu" or array.ndim > 1:
        raise DataError(f"{row.name}: {kind} holds {str(value)[:60]}, expected atom numbers or a mask")
    return array


def _shaped(array: np.ndarray, shape: tuple[int, ...], what: str, row: Row) -> np.ndarray:
    if array.shape != shape:
        raise DataError(f"{row.name}: {what} has shape {array.shape}, expected {shape}")
    return array


def _mapping(value: Any, what: str, name: str) -> dict[str, Any]:
    """A dictionary, also one that is encoded once more as text."""
    if isinstance(value, str):
        value = parse_json(value, f"{name}: {what}")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{name}: {what} is a {type(value).__name__}, expected a dictionary")
    return value


def _listed(value: Any, what: str, name: str) -> list[Any]:
    """A list, also one that is encoded once more as text."""
    if isinstance(value, str):
        value = parse_json(value, f"{name}: {what}")
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{name}: {what} is a {type(value).__name__}, expected a list")
    return value
