"""pymatgen structures and molecules: objects in memory, and JSON files of them with labels.

JSON is read as plain lists. The classes that it names are never imported: monty's decoder would import any module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.readers.policy import Reader, ReadPolicy, Record
from escaip.data.structure import IGNORE, AtomicData, LabelKeys, floats, hill_formula, named_labels
from escaip.errors import DataError
from escaip.files import one_line
from escaip.units import Units

if TYPE_CHECKING:
    from pymatgen.core import Molecule, Structure

MAX_DISAGREEMENT = 1e-3
"""Å between a site's Cartesian and its fractional coordinates; beyond it one of them is wrong."""

CLASSES = {"Structure": "structure", "IStructure": "structure", "Molecule": "molecule", "IMolecule": "molecule"}
MODULES = ("pymatgen.core.structure", "pymatgen.core.lattice", "pymatgen.core.sites", "pymatgen.core.periodic_table",
           "pymatgen.core.composition", "numpy")  # fmt: skip
"""Modules that ``@module`` may name inside a structure; the numbers beside it are read, the module is not imported."""

FloatArray = NDArray[np.float64]


def read_pymatgen(path: Path, name: str, policy: ReadPolicy, *, keys: LabelKeys | None = None) -> Iterator[AtomicData]:
    """Yields the structures of a JSON file; ids are ``name:position``, or ``name:key`` of a mapping.

    The file holds a structure or molecule (``as_dict()``), a list of them, or a list or mapping of records
    ``{"structure": {...}, "energy": ..., "forces": ..., "stress": ...}``. Labels are looked for in the record, the
    structure's properties and its site properties.

    Raises:
        DataError: a file that is no JSON or holds something else, or a bad structure.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON, or truncated ({one_line(error)})") from error
    if isinstance(content, list):
        items: list[tuple[Any, Any]] = list(enumerate(content))
    elif not isinstance(content, dict):
        raise DataError(f"{path}: expected structures, found {type(content).__name__}")
    elif any(key in content for key in ("@class", "structure", "molecule")):
        items = [(0, content)]
    else:
        items = list(content.items())
    units = policy.units or Units()
    yield from policy.admit(
        Record(partial(_structure_of, record, keys or LabelKeys(), f"{name}:{label}", units), partial(_found, record))
        for label, record in items
    )


def from_pymatgen(structure: Structure | Molecule, *, labels: Mapping[str, Any] | None = None) -> AtomicData:
    """Reads a pymatgen Structure or Molecule, which is not changed; its sites must be ordered.

    Args:
        structure: the object; positions in Å, labels in its properties and site properties.
        labels: labels that go before those of the structure; None is a missing one.

    Raises:
        DataError: a disordered or an invalid structure.
    """
    name = str(structure.composition.reduced_formula)
    return _built(structure.as_dict(), hasattr(structure, "lattice"), labels or {}, LabelKeys(), name, Units())


def _structure_of(record: Any, keys: LabelKeys, name: str, units: Units) -> AtomicData:
    """The structure of a record: a structure alone, or one beside its labels."""
    if not isinstance(record, dict):
        raise DataError(f"{name}: expected a structure, found {type(record).__name__}")
    key = next((key for key in ("structure", "molecule") if isinstance(record.get(key), dict)), None)
    body: dict[str, Any] = record[key] if key else record
    kind = body.get("@class", "Structure" if "lattice" in body else "Molecule")
    if kind not in CLASSES or body.get("@module", MODULES[0]) != MODULES[0]:
        shown = f"{body.get('@module', '')}.{kind}".strip(".")
        raise DataError(f"{name}: holds a {shown}, expected a Structure or a Molecule of {MODULES[0]}")
    _check_modules(body, name)
    beside = {label: value for label, value in record.items() if label != key} if key else {}
    return _built(body, CLASSES[kind] == "structure", beside, keys, name, units)


def _built(
    body: dict[str, Any], periodic: bool, labels: Mapping[str, Any], keys: LabelKeys, name: str, units: Units
) -> AtomicData:
    """The structure of pymatgen's dictionary with the labels found in it and beside it."""
    sites = body.get("sites")
    if not isinstance(sites, list) or not all(isinstance(site, dict) for site in sites):
        raise DataError(f"{name}: not a readable structure: its sites are no list of sites")
    cell, pbc = None, (False, False, False)
    if periodic:
        numbers, positions, cell, pbc = parse_structure(body, name)
    else:
        numbers = atomic_numbers_of(sites, name)
        positions = floats([site.get("xyz") for site in sites], "xyz of the sites", name, (len(sites), 3))
    own = [site.get("properties") or {} for site in sites]
    found = {label: [_plain(site.get(label)) for site in own] for label in {label for site in own for label in site}}
    found |= {label: _plain(value) for label, value in {**(body.get("properties") or {}), **labels}.items()}

    def named(key: str, label: str) -> Any:
        if key not in found:
            held = ", ".join(sorted(map(str, found))) or "none"
            raise DataError(f"{name}: no {label} under the key {key!r}; found {held}; name one of these in keys")
        return found[key]

    charge, spin = body.get("charge"), body.get("spin_multiplicity")
    if charge is None:
        charge = sum(float(site["species"][0].get("oxidation_state") or 0) for site in sites)
    if spin is None:
        spin = 1 if periodic else 1 + (int(numbers.sum()) - round(charge)) % 2
    dynamics = found.get("selective_dynamics")
    return AtomicData.from_arrays(
        numbers,
        positions,
        cell=cell,
        pbc=pbc,
        labels=named_labels(keys, found, named, cell, units, name),
        charge=round(charge) if keys.charge is None else named(keys.charge, "charge"),
        spin_multiplicity=spin if keys.spin is None else 1 if keys.spin == IGNORE else named(keys.spin, "spin"),
        fixed=None if dynamics is None else [flags is not None and not np.any(flags) for flags in dynamics],
        structure_id=name,
        group=hill_formula(numbers) if keys.group is None else str(named(keys.group, "group")),
        units=units,
    )


def parse_structure(
    structure: Mapping[str, Any], name: str
) -> tuple[NDArray[np.int64], FloatArray, FloatArray, tuple[bool, bool, bool]]:
    """Returns atomic numbers, positions in Å, cell and periodicity of a pymatgen structure in JSON."""
    lattice, sites = structure.get("lattice"), structure.get("sites")
    if not isinstance(lattice, dict) or not isinstance(sites, list) or not sites:
        raise DataError(f"{name}: is no pymatgen structure (needs lattice and sites)")
    cell = floats(lattice.get("matrix"), "lattice matrix", name, (3, 3))
    periodic = lattice.get("pbc", (True, True, True))
    if not isinstance(periodic, list | tuple) or len(periodic) != 3:
        raise DataError(f"{name}: pbc of the lattice is {periodic!r}, expected three flags")
    numbers = atomic_numbers_of(sites, name)
    if not all("abc" in site for site in sites):
        raise DataError(f"{name}: a site lacks species or abc")
    positions = floats([site["abc"] for site in sites], "abc of the sites", name, (len(sites), 3)) @ cell
    cartesian = [site.get("xyz") for site in sites]
    if all(place is not None for place in cartesian):
        distance = np.abs(floats(cartesian, "xyz of the sites", name, (len(sites), 3)) - positions).max(axis=1)
        worst = int(distance.argmax())
        if not distance[worst] <= MAX_DISAGREEMENT:
            raise DataError(
                f"{name}: xyz and abc of site {worst} are {distance[worst]:.3g} Å apart; one of them is wrong"
            )
    return numbers, positions, cell, (bool(periodic[0]), bool(periodic[1]), bool(periodic[2]))


def atomic_numbers_of(sites: list[dict[str, Any]], name: str) -> NDArray[np.int64]:
    """Returns ``(n,)`` atomic numbers of ordered sites in JSON."""
    from ase.data import atomic_numbers

    numbers = []
    try:
        for site in sites:
            (species, *others), symbol = site["species"], site["species"][0]["element"]
            if others or abs(float(species.get("occu", 1)) - 1.0) > 1e-8:
                raise DataError(f"{name}: has partially occupied sites; order the structure or set on_error: skip")
            number = 1 if symbol in ("D", "T") else atomic_numbers.get(symbol, 0)
            if number == 0:
                raise DataError(f"{name}: {symbol!r} is no element")
            numbers.append(number)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{name}: a site lacks species or abc") from error
    return np.array(numbers, dtype=np.int64)


def _check_modules(value: Any, name: str) -> None:
    """Refuses a file that names modules which no structure needs."""
    if isinstance(value, dict):
        module = value.get("@module", MODULES[0])
        if module not in MODULES:
            raise DataError(f"{name}: names the module {str(module)[:80]!r}, which no structure needs")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_modules(item, name)


def _plain(value: Any) -> Any:
    """A value, or the numbers of an array as monty writes it."""
    is_array = isinstance(value, dict) and (value.get("@module"), value.get("@class")) == ("numpy", "array")
    return value.get("data") if is_array else value


def _found(record: Any) -> str:
    return f"record keys {', '.join(sorted(record))}" if isinstance(record, dict) else "nothing"


def matches(path: Path, head: bytes) -> bool:
    """JSON that names pymatgen's classes or holds records with a structure."""
    return path.suffix == ".json" and (b'"@module"' in head or b'"structure"' in head)


READER = Reader("pymatgen", read_pymatgen, matches)
