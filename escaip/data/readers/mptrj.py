"""MPTrj as published: one JSON file of 11 GB, ``{material: {frame: {structure, energies, force, stress, ...}}}``.

Deng et al., Nat. Mach. Intell. 5, 1031 (2023). The file is read material by material, whole or a range of bytes of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip.data.readers.ase_row import parse_json
from escaip.data.readers.json_scan import Member, scan_members
from escaip.data.readers.policy import Part, Reader, ReadPolicy
from escaip.data.structure import LabelKeys
from escaip.errors import ConfigError, DataError
from escaip.units import KBAR, Units

if TYPE_CHECKING:
    from escaip.data.structure import AtomicData

ENERGIES = {"uncorrected": "uncorrected_total_energy", "corrected": "corrected_total_energy"}
UNITS = Units(stress=KBAR)
"""Å, eV, eV/Å and kbar."""

MAX_DISAGREEMENT = 1e-3
"""Å between a site's Cartesian and its fractional coordinates; beyond it one of them is wrong."""

_HEAD = re.compile(rb'\s*\{\s*"[^"\\]*"\s*:\s*\{\s*"[^"\\]*"\s*:\s*\{\s*"([a-z_]+)"\s*:')
_FRAME_KEYS = (
    b"structure", b"uncorrected_total_energy", b"corrected_total_energy", b"energy_per_atom", b"ef_per_atom",
    b"e_per_atom_relaxed", b"ef_per_atom_relaxed", b"force", b"stress", b"magmom", b"bandgap", b"mp_id",
)  # fmt: skip


def read_mptrj(
    path: Path,
    policy: ReadPolicy,
    *,
    name: str | None = None,
    keys: LabelKeys | None = None,
    part: Part | None = None,
    energy: str | None = None,
) -> Iterator[AtomicData]:
    """Frames of every material; ids are ``file:material:frame``, groups are materials.

    Stress is turned from kbar in VASP's sign (positive in compression) into eV/Å³, positive in tension. Magnetic
    moments and band gaps are not read.

    Args:
        path: JSON file.
        policy: units (default: those of the publication) and error policy.
        name: what ids begin with; default the file's name.
        keys: not used by this source; the layout fixes the names.
        part: bytes of whole materials, from :func:`divide`.
        energy: ``uncorrected``, what VASP gave (MACE-MP), or ``corrected`` by the MP2020 scheme (CHGNet).

    Raises:
        DataError: truncated or damaged JSON, another layout, a frame without the chosen energy, a disordered structure.
        ConfigError: no choice of ``energy``, or label keys.
    """
    if keys is not None:
        raise ConfigError(
            "keys: the MPTrj layout fixes its names; choose the energy with energy: uncorrected | corrected"
        )
    if energy not in ENERGIES:
        given = "is not stated" if energy is None else f"{energy!r} is neither"
        raise ConfigError(
            f"{path}: energy {given}; state energy: uncorrected (VASP's total energy; MACE-MP is trained on it) or "
            "energy: corrected (MP2020 corrections added; CHGNet is trained on it)"
        )
    name = name or path.name
    start, stop = part if part is not None else (0, None)
    units = policy.stated_units or UNITS
    last = "the beginning"
    with open(path, "rb") as file:
        for member in scan_members(file, str(path), start, stop):
            material, frames = _material(member, path, last)
            last = material
            for key, frame in frames.items():
                structure_id = f"{name}:{material}:{key}"
                data = policy.admit(
                    lambda frame=frame, structure_id=structure_id, material=material: structure_of(  # type: ignore[misc]
                        frame, structure_id, material, ENERGIES[energy], units
                    ),
                    lambda frame=frame: ", ".join(map(str, frame)),  # type: ignore[misc]
                )
                if data is not None:
                    yield data
    if last == "the beginning":
        raise DataError(f"{path}: holds no materials")


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of bytes of whole materials with about ``size`` frames together; the file is scanned once.

    Raises:
        DataError: truncated or damaged JSON, or another layout.
    """
    parts: list[Part] = []
    start, frames = None, 0
    stop = 0
    with open(path, "rb") as file:
        for member in scan_members(file, str(path)):
            if start is not None and frames + member.inner > size:
                parts.append((start, stop))
                start, frames = None, 0
            start = member.start if start is None else start
            frames += member.inner
            stop = member.stop
    if start is None:
        raise DataError(f"{path}: holds no materials")
    return [*parts, (start, stop)]


def structure_of(frame: Any, structure_id: str, material: str, energy_key: str, units: Units) -> AtomicData:
    """One frame.

    Args:
        frame: as in the file.
        structure_id: for messages too.
        material: the group.
        energy_key: which energy.
        units: of the file; its stress is positive in compression.

    Raises:
        DataError: another layout, no energy, a disordered or invalid structure.
    """
    from escaip.data.structure import AtomicData

    if not isinstance(frame, dict) or not isinstance(frame.get("structure"), dict):
        raise DataError(f"{structure_id}: is no frame of MPTrj (needs a structure)")
    if frame.get(energy_key) is None:
        what = "is null" if energy_key in frame else "is not there"
        raise DataError(f"{structure_id}: {energy_key} {what}; choose the other energy, or set on_error: skip")
    if frame.get("mp_id", material) != material:
        raise DataError(f"{structure_id}: says that it is of {frame['mp_id']!r}, but stands under {material!r}")
    numbers, positions, cell, periodic = parse_structure(frame["structure"], structure_id)
    stress = frame.get("stress")
    return AtomicData.from_arrays(
        numbers,
        positions,
        cell=cell,
        pbc=periodic,
        charge=frame["structure"].get("charge") or 0,
        energy=frame[energy_key],
        forces=frame.get("force"),
        stress=None if stress is None else -_floats(stress, (3, 3), "stress", structure_id),
        magnetic_moments=frame.get("magmom"),
        structure_id=structure_id,
        group=material,
        units=units,
    )


def parse_structure(
    structure: Mapping[str, Any], name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[bool, bool, bool]]:
    """Atomic numbers, positions in Å, cell and periodicity of a pymatgen structure in JSON.

    Raises:
        DataError: no ordered structure, or Cartesian coordinates that disagree with the fractional ones.
    """
    lattice, sites = structure.get("lattice"), structure.get("sites")
    if not isinstance(lattice, dict) or not isinstance(sites, list) or not sites:
        raise DataError(f"{name}: is no pymatgen structure (needs lattice and sites)")
    cell = _floats(lattice.get("matrix"), (3, 3), "lattice matrix", name)
    periodic = lattice.get("pbc", (True, True, True))
    if not isinstance(periodic, list | tuple) or len(periodic) != 3:
        raise DataError(f"{name}: pbc of the lattice is {periodic!r}, expected three flags")
    try:
        numbers = np.array([_number(site["species"], name) for site in sites])
        fractional = _floats([site["abc"] for site in sites], (len(sites), 3), "abc of the sites", name)
        cartesian = [site.get("xyz") for site in sites]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name}: a site lacks species or abc") from error
    positions = fractional @ cell
    if all(place is not None for place in cartesian):
        distance = np.abs(_floats(cartesian, (len(sites), 3), "xyz of the sites", name) - positions).max(axis=1)
        worst = int(distance.argmax())
        if not distance[worst] <= MAX_DISAGREEMENT:
            raise DataError(
                f"{name}: xyz and abc of site {worst} are {distance[worst]:.3g} Å apart; one of them is wrong"
            )
    return numbers, positions, cell, tuple(bool(flag) for flag in periodic)  # type: ignore[return-value]


def _number(species: Any, name: str) -> int:
    """Atomic number of an ordered site."""
    from ase.data import atomic_numbers

    if len(species) != 1 or abs(float(species[0].get("occu", 1)) - 1.0) > 1e-8:
        raise DataError(f"{name}: has partially occupied sites; order the structure first or set on_error: skip")
    symbol = species[0]["element"]
    if symbol not in atomic_numbers or symbol == "X":
        raise DataError(f"{name}: {symbol!r} is no element")
    return atomic_numbers[symbol]


def _floats(value: Any, shape: tuple[int, ...], what: str, name: str) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: {what} holds something else than numbers") from error
    if array.shape != shape:
        raise DataError(f"{name}: {what} has shape {array.shape}, expected {shape}")
    return array


def _material(member: Member, path: Path, last: str) -> tuple[str, dict[str, Any]]:
    """Name and frames of a material; ``last`` is the one before it."""
    where = f"{path}: the material at byte {member.start} (after {last})"
    content = parse_json(b"{" + member.text + b"}", where)
    material, frames = next(iter(content.items()))
    if not isinstance(frames, dict) or not all(isinstance(frame, dict) for frame in frames.values()):
        raise DataError(f"{where}, {material!r}, is no object of frames; this is not the layout of MPTrj")
    if len(frames) != member.inner:
        raise DataError(
            f"{where}, {material!r}, has {member.inner} frames under {len(frames)} names; two frames share a name"
        )
    return material, frames


def matches(path: Path, head: bytes) -> bool:
    """JSON whose first object of the third depth begins like a frame."""
    match = _HEAD.match(head) if path.suffix == ".json" else None
    return match is not None and match[1] in _FRAME_KEYS


READER = Reader("mptrj", "MPTrj JSON, one object per material", read_mptrj, matches, parts=divide)
