"""Small data and models for the tests of training."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator

TINY = {
    "preset": "1m", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "angular_channels": [4, 2, 2],
    "num_radial": 16, "distance_size": 16, "element_size": 8, "boo_size": 8, "boo_degrees": 3, "cutoff": 4.0,
    "num_neighbors": 6,
}  # fmt: skip


def labelled_molecules(count: int, seed: int = 0, names: tuple[str, ...] = ("H2O", "NH3", "CH4")) -> list[Atoms]:
    """Rattled molecules with Lennard-Jones labels and an energy per element."""
    rng = np.random.default_rng(seed)
    structures = []
    for index in range(count):
        atoms = molecule(names[index % len(names)])
        atoms.positions += rng.normal(0.0, 0.05, atoms.positions.shape)
        atoms.calc = LennardJones(sigma=1.0, epsilon=0.2, rc=4.0)
        energy = atoms.get_potential_energy() - 13.0 * float((atoms.numbers == 1).sum()) - 5.0
        forces = atoms.get_forces()
        labelled = Atoms(atoms.numbers, atoms.positions)
        labelled.calc = SinglePointCalculator(labelled, energy=energy, forces=forces)
        structures.append(labelled)
    return structures


def write_molecules(path: Path, count: int, seed: int = 0) -> Path:
    """Writes them as extended XYZ."""
    ase.io.write(path, labelled_molecules(count, seed))
    return path
