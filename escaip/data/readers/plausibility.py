"""Are these numbers eV and Å? Bounds from physics, checked on windows of structures at the door."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from escaip.errors import DataError

if TYPE_CHECKING:
    from escaip.data.atomic_data import AtomicData

WINDOW = 256
"""Structures looked at together."""

MAX_FORCE_RMS = 15.0
"""eV/Å, median over a window of the root mean square force per atom; thermal molecules have about 2."""

MAX_STRESS = 6.0
"""eV/Å³ (about 1000 GPa), median over a window of the largest component."""

MAX_ENERGY_SPREAD = 30.0
"""eV per atom between structures of one composition in a window."""

ORGANIC = (1, 6, 7, 8, 9, 15, 16, 17)
X_H_DISTANCE = (0.4, 1.6)
"""Å, what the median distance from hydrogen to its nearest atom lies between in organic molecules."""


def energy_bound(numbers: np.ndarray) -> float:
    """Upper bound in eV of a total energy's magnitude: 1.5 times Thomas–Fermi, ``0.7687 Z^(7/3)`` hartree an atom.

    All-electron energies reach about 0.75 of Thomas–Fermi for light and 1.0 for heavy atoms (relativity
    included), pseudopotential energies far less.
    """
    return 1.5 * float((0.7687 * 27.211386 * numbers.astype(np.float64) ** (7.0 / 3.0)).sum())


def check_magnitudes(structures: Sequence[AtomicData]) -> None:
    """Refuses a window of structures whose magnitudes are those of another unit.

    Raises:
        DataError: naming the label, the first structure, what unit it looks like and how to say so.
    """
    if structures:
        _check_lengths(structures)
        _check_energies(structures)
        _check_forces(structures)
        _check_stress(structures)


def _remedy(unit: str) -> str:
    return f"state the file's units (units: {unit}), or check_units: false if they are right"


def _check_lengths(structures: Sequence[AtomicData]) -> None:
    from scipy.spatial import cKDTree

    nearest: list[float] = []
    for data in structures:
        numbers = data.atomic_numbers.numpy()
        if bool(data.pbc.any()) or len(numbers) < 2 or not np.isin(numbers, ORGANIC).all():
            continue
        distances, _ = cKDTree(data.positions.numpy()).query(data.positions.numpy()[numbers == 1], k=2)
        nearest.extend(np.atleast_2d(distances)[:, 1].tolist() if len(distances) else [])
    if len(nearest) < 6:
        return
    median = float(np.median(nearest))
    if not X_H_DISTANCE[0] < median < X_H_DISTANCE[1]:
        unit = "bohr" if median > 1.0 else "nm"
        raise DataError(
            f"{structures[0].structure_id}: hydrogens sit {median:.3g} Å from their nearest atom, which looks like "
            f"{unit}; {_remedy(f'{{length: {unit}}}')}"
        )


def _check_energies(structures: Sequence[AtomicData]) -> None:
    per_atom: dict[bytes, list[tuple[float, str]]] = defaultdict(list)
    for data in structures:
        energy = float(data.energy)
        if np.isnan(energy):
            continue
        numbers = data.atomic_numbers.numpy()
        n, bound = len(numbers), energy_bound(numbers)
        if abs(energy) > bound:
            unit = "meV" if abs(energy) > 100 * bound else "kcal/mol"
            raise DataError(
                f"{data.structure_id}: energy of {energy / n:.4g} eV/atom is beyond what these elements can have "
                f"({bound / n:.4g}) and looks like {unit}; {_remedy('{energy: ' + unit + '}')}"
            )
        per_atom[np.sort(numbers).tobytes()].append((energy / n, data.structure_id))
    for values in per_atom.values():
        median = float(np.median([value for value, _ in values]))
        worst, name = max(values, key=lambda item: abs(item[0] - median))
        if len(values) > 2 and abs(worst - median) > MAX_ENERGY_SPREAD:
            raise DataError(
                f"{name}: energy of {worst:.4g} eV/atom where structures of the same composition have {median:.4g}: "
                "mixed units or a failed calculation; remove it, or check_units: false if it is right"
            )


def _check_forces(structures: Sequence[AtomicData]) -> None:
    rms = [float(np.sqrt((data.forces.numpy() ** 2).sum(1).mean())) for data in structures if data.has_label("forces")]
    rms = [value for value in rms if value > 0.0]
    if not rms:
        return
    median = float(np.median(rms))
    if median > MAX_FORCE_RMS:
        unit = "meV/Å" if median > 300.0 else "kcal/mol/Å or larger"
        raise DataError(
            f"{structures[0].structure_id}: forces of {median:.4g} eV/Å (median of the root mean square) look like "
            f"{unit}; {_remedy('{energy: ' + ('meV' if median > 300.0 else 'kcal/mol') + '}')}"
        )


def _check_stress(structures: Sequence[AtomicData]) -> None:
    largest = [float(data.stress.abs().max()) for data in structures if data.has_label("stress")]
    if largest and float(np.median(largest)) > MAX_STRESS:
        raise DataError(
            f"{structures[0].structure_id}: stress of {np.median(largest):.4g} eV/Å³ (median of the largest component) "
            f"looks like GPa or kbar; {_remedy('{stress: kbar}')}"
        )
