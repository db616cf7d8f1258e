"""pymatgen structures and molecules: objects in memory, and JSON files of them with labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip.data.readers.policy import Part, Reader, ReadPolicy
from escaip.data.structure import LABELS, LabelKeys, hill_formula, stress_from_virial
from escaip.errors import DataError
from escaip.types import TARGETS
from escaip.units import Units

if TYPE_CHECKING:
    from escaip.data.structure import AtomicData

_NO_UNITS = Units()


def read_pymatgen(
    path: Path, policy: ReadPolicy, *, name: str | None = None, keys: LabelKeys | None = None, part: Part | None = None
) -> Iterator[AtomicData]:
    """Structures of a JSON file.

    The file holds a structure or molecule (``as_dict()``), a list of them, or a list or mapping of records
    ``{"structure": {...}, "energy": ..., "forces": ..., "stress": ...}``. Classes named in the file are not imported:
    only ``Structure`` and ``Molecule`` are read.

    Args:
        path: JSON file.
        policy: units and error policy.
        name: what ids begin with; default the file's name.
        keys: label names, looked for in the record, the structure's properties and its site properties.
        part: not used, these files are read whole.

    Raises:
        DataError: a file that is no JSON or holds something else, or a bad structure.
    """
    name = name or path.name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not readable as JSON, or truncated ({error})") from error
    for label, record in _records(content, path):
        structure_id = f"{name}:{label}"

        def build(record: Any = record, structure_id: str = structure_id) -> AtomicData:
            value, extra = _decode(record, structure_id)
            return from_pymatgen(value, keys=keys, labels=extra, structure_id=structure_id, units=policy.units)

        data = policy.admit(build, lambda record=record: _found(record))  # type: ignore[misc]
        if data is not None:
            yield data


def from_pymatgen(
    structure: Any,
    *,
    keys: LabelKeys | None = None,
    labels: Mapping[str, Any] | None = None,
    structure_id: str | None = None,
    group: str | None = None,
    units: Units = _NO_UNITS,
) -> AtomicData:
    """A ``pymatgen`` Structure or Molecule with its labels.

    Args:
        structure: the object; not changed. Sites must be ordered.
        keys: label names; default ``energy, forces, stress`` where present.
        labels: more labels, looked at first.
        structure_id: default the formula.
        group: default the value under ``keys.group``, else the formula.
        units: of positions and labels.

    Raises:
        DataError: a disordered structure, a named label that is absent, or an invalid structure.
    """
    from escaip.data.structure import AtomicData

    name = structure_id or str(structure.composition.reduced_formula)
    if not structure.is_ordered:
        raise DataError(f"{name}: has partially occupied sites; order it first (pymatgen OrderDisorderedStructure...)")
    found = {**structure.site_properties, **structure.properties, **(labels or {})}
    keys = keys or LabelKeys()
    lattice = getattr(structure, "lattice", None)
    numbers = np.asarray(structure.atomic_numbers)
    values = _label_values(found, keys, name)
    if keys.virial:
        virial = _named(found, keys.virial, "virial", name)
        values["stress"] = stress_from_virial(virial, None if lattice is None else lattice.matrix, units, name)
    dynamics = structure.site_properties.get("selective_dynamics")
    fixed = None if dynamics is None else [flags is not None and not any(flags) for flags in dynamics]
    charge = _named(found, keys.charge, "charge", name) if keys.charge else round(structure.charge or 0)
    spin = _named(found, keys.spin, "spin", name) if keys.spin else getattr(structure, "spin_multiplicity", 1)
    if group is None:
        group = str(_named(found, keys.group, "group", name)) if keys.group else hill_formula(numbers)
    return AtomicData.from_arrays(
        numbers,
        structure.cart_coords,
        cell=None if lattice is None else lattice.matrix,
        pbc=False if lattice is None else lattice.pbc,
        charge=charge,
        spin_multiplicity=spin or 1,
        fixed=fixed,
        structure_id=name,
        group=group,
        units=units,
        energy=values.pop("energy"),
        forces=values.pop("forces"),
        stress=values.pop("stress"),
        labels=values,
    )


def _label_values(found: Mapping[str, Any], keys: LabelKeys, name: str) -> dict[str, Any]:
    labels: dict[str, Any] = {}
    for target in TARGETS:
        key = keys.targets.get(target)
        if key is not None:
            labels[target] = _named(found, key, target, name)
        else:
            labels[target] = None if target in LABELS and keys.names_labels else found.get(target)
    return labels


def _named(found: Mapping[str, Any], key: str, label: str, name: str) -> Any:
    if key not in found:
        raise DataError(
            f"{name}: no {label} under the key {key!r}; found {', '.join(sorted(found)) or 'none'}; "
            "name one of these in keys"
        )
    return found[key]


def _records(content: Any, path: Path) -> Iterator[tuple[str, Any]]:
    if isinstance(content, list):
        yield from ((str(index), item) for index, item in enumerate(content))
    elif isinstance(content, dict) and ("@class" in content or "structure" in content or "molecule" in content):
        yield "0", content
    elif isinstance(content, dict):
        yield from content.items()
    else:
        raise DataError(f"{path}: expected structures, found {type(content).__name__}")


def _decode(record: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """The object, and the labels that stand beside it."""
    from pymatgen.core import Molecule, Structure

    if not isinstance(record, dict):
        raise DataError(f"{name}: expected a structure, found {type(record).__name__}")
    key = next((key for key in ("structure", "molecule") if isinstance(record.get(key), dict)), None)
    body = record[key] if key else record
    extra = {label: value for label, value in record.items() if label != key} if key else {}
    kind = body.get("@class", "Structure" if "lattice" in body else "Molecule")
    readers: dict[str, Any] = {"Structure": Structure, "Molecule": Molecule}
    if kind not in readers:
        raise DataError(f"{name}: holds a {kind}, expected a Structure or a Molecule")
    try:
        return readers[kind].from_dict(body), extra
    except Exception as error:
        raise DataError(f"{name}: not a readable {kind} ({type(error).__name__}: {error})") from error


def _found(record: Any) -> str:
    return f"record keys {', '.join(sorted(record))}" if isinstance(record, dict) else "nothing"


def matches(path: Path, head: bytes) -> bool:
    """JSON that names pymatgen's classes or holds records with a structure."""
    return path.suffix == ".json" and (b'"@module"' in head or b'"structure"' in head)


READER = Reader("pymatgen", "JSON of pymatgen structures with labels", read_pymatgen, matches)
