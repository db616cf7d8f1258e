"""What stops a run that no longer means anything."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from ase import Atoms
from ase.data import covalent_radii

from escaip.graph import neighbor_list

# Closer than this fraction of the sum of covalent radii no bond has ever been: H-H 0.25 Å, C-C 0.61 Å.
_TOUCHING = 0.4


def find_problem(atoms: Atoms, temperature: float, max_temperature: float) -> str | None:
    """Says in words why a step is not to be trusted; None when it is. Cheap: for every step."""
    for what, values in (("positions", atoms.positions), ("forces", atoms.get_forces())):
        if not np.isfinite(values).all():
            index = int(np.argmax(~np.isfinite(values).all(axis=1)))
            return f"{what} of atom {index} ({atoms.symbols[index]}) are NaN or infinite"
    if not np.isfinite(atoms.get_potential_energy()):
        return "the energy is NaN or infinite"
    if not temperature <= max_temperature:
        return f"the temperature is {temperature:.0f} K, above {max_temperature:.0f} K"
    return None


def find_contact(atoms: Atoms) -> str | None:
    """Says which atoms have come too close; None when none have. O(N): for some steps."""
    radii = _TOUCHING * covalent_radii[atoms.numbers]
    cell = atoms.cell.array
    # ASE's list divides an open box into bins: of a molecule in 50 Å it would take the time of a hundred steps.
    place = SimpleNamespace(
        positions=torch.from_numpy(atoms.get_positions()),
        cell=torch.from_numpy(cell.copy())[None],
        pbc=torch.from_numpy(atoms.pbc.copy())[None],
    )
    found = neighbor_list(place, 2.0 * float(radii.max(initial=0.1)))
    first, second, shift = (x.numpy() for x in (found.center, found.neighbor, found.shift))
    distance = np.linalg.norm(atoms.positions[second] - atoms.positions[first] + shift @ cell, axis=1)
    near = np.flatnonzero(distance < radii[first] + radii[second])
    if not len(near):
        return None
    worst = near[np.argmin(distance[near])]
    i, j = int(first[worst]), int(second[worst])
    return f"atoms {i} ({atoms.symbols[i]}) and {j} ({atoms.symbols[j]}) are {distance[worst]:.2f} Å apart"
