"""What a structure must satisfy to enter: each check names the structure and the remedy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from escaip.errors import ConfigError, DataError

MIN_DISTANCE = 0.1
"""Å; atoms closer than this are a wrong length unit or a duplicated atom."""

MAX_ATOMIC_NUMBER = 118

FloatArray = NDArray[np.float64]


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """Raises a ``ConfigError`` that names ``what`` and the choices for a value that is none of them."""
    if value not in (known := list(choices)):
        raise ConfigError(f"{what}: {value!r} is not one of {', '.join(known)}")


def check_structure(
    numbers: NDArray[np.int64], positions: FloatArray, cell: FloatArray, pbc: NDArray[np.bool_], name: str
) -> None:
    """Refuses an invalid structure: ``numbers (n,)``, ``positions (n, 3)`` and ``cell (3, 3)`` in Å, ``pbc (3,)``.

    Raises:
        DataError: no atoms, wrong shapes, an atomic number outside 1..118, NaN or Inf coordinates, periodic lattice
            vectors without volume, two atoms (or an atom and its image) closer than 0.1 Å.
    """
    n = len(numbers)
    if n == 0:
        raise DataError(f"{name}: has no atoms; remove it from the file or set on_error: skip")
    if positions.shape != (n, 3):
        raise DataError(f"{name}: positions have shape {positions.shape}, expected ({n}, 3) for {n} atomic numbers")
    if cell.shape != (3, 3) or pbc.shape != (3,):
        raise DataError(f"{name}: cell {cell.shape} and pbc {pbc.shape} must have shapes (3, 3) and (3,)")
    bad = (numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)
    if bad.any():
        at = int(np.argmax(bad))
        raise DataError(f"{name}: atom {at} has atomic number {int(numbers[at])}, which is outside 1..118")
    if not np.isfinite(positions).all():
        at = int(np.argmax(~np.isfinite(positions).all(axis=1)))
        raise DataError(f"{name}: coordinates of atom {at} are NaN or infinite; repair the file or set on_error: skip")
    if not np.isfinite(cell).all():
        raise DataError(f"{name}: the cell holds NaN or infinite numbers; repair the file or set on_error: skip")
    pairs, vectors = _close_pairs(positions, cell, pbc, name)
    if len(pairs) == 0:
        return
    distances = np.linalg.norm(vectors, axis=1)
    at = int(np.argmin(distances))
    if distances[at] < MIN_DISTANCE:
        i, j = sorted(int(k) for k in pairs[at])
        raise DataError(
            f"{name}: atoms {i} and {j} are {distances[at]:.3g} Å apart; "
            "check for duplicates and the length unit (units: {length: nm})"
        )


def _close_pairs(
    positions: FloatArray, cell: FloatArray, pbc: NDArray[np.bool_], name: str
) -> tuple[NDArray[np.int64], FloatArray]:
    """Returns pairs ``(P, 2)`` that may be closer than MIN_DISTANCE, found in plane heights, and vectors ``(P, 3)``."""
    from scipy.spatial import cKDTree

    if not pbc.any():
        pairs = cKDTree(positions).query_pairs(MIN_DISTANCE, output_type="ndarray")
        return pairs, positions[pairs[:, 0]] - positions[pairs[:, 1]]
    full = complete_cell(cell, pbc)
    lengths = np.sqrt((cell[pbc] ** 2).sum(axis=1))
    if abs(np.linalg.det(full)) <= 1e-6 * lengths.prod():
        shown = "".join("T" if flag else "F" for flag in pbc)
        raise DataError(
            f"{name}: pbc is {shown} but its lattice vectors span no volume; give a cell or turn pbc off for those axes"
        )
    inverse = np.linalg.inv(full)
    heights = 1.0 / np.sqrt((inverse**2).sum(axis=0))
    if (lowest := heights[pbc].min()) < MIN_DISTANCE:
        raise DataError(
            f"{name}: lattice planes are {lowest:.3g} Å apart; check the length unit (units: {{length: nm}})"
        )
    fractional = positions @ inverse
    fractional -= np.where(pbc, np.floor(fractional), fractional.min(axis=0))
    box = heights if pbc.all() else np.where(pbc, heights, 2.0 * heights * (fractional.max(axis=0) + 1.0) + 1.0)
    scaled = np.minimum(fractional * heights, np.nextafter(box, 0.0))
    pairs = cKDTree(scaled, boxsize=box).query_pairs(MIN_DISTANCE, p=np.inf, output_type="ndarray")
    delta = fractional[pairs[:, 0]] - fractional[pairs[:, 1]]
    return pairs, (delta - np.where(pbc, np.round(delta), 0.0)) @ full


def complete_cell(cell: FloatArray, pbc: NDArray[np.bool_]) -> FloatArray:
    """Returns the cell with its non-periodic rows replaced by unit vectors orthogonal to the periodic ones."""
    full = np.array(cell, dtype=np.float64)
    free = np.flatnonzero(~pbc)
    if len(free):
        _, _, directions = np.linalg.svd(full[pbc], full_matrices=True) if pbc.any() else (None, None, np.eye(3))
        full[free] = directions[3 - len(free) :]
    return full
