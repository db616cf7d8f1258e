"""The structures that every peer is given: plain arrays, made once by the driver, rattled with fixed seeds."""

from __future__ import annotations

from typing import Any

import ase.build
import numpy as np
from ase import Atoms

WIDTH = 0.05  # Å, of the displacements off the perfect structure
COST_ATOMS = (108, 500, 1000, 2000, 4000, 8000, 16000)

Structure = dict[str, Any]

_ASPIRIN_NUMBERS = (6, 6, 8, 8, 6, 6, 6, 6, 6, 6, 6, 8, 8, 1, 1, 1, 1, 1, 1, 1, 1)
_ASPIRIN_POSITIONS = (  # Å, minimum of a force field
    (3.404, 0.554, -0.041), (2.044, 0.139, 0.435), (1.689, 0.144, 1.607), (1.288, -0.266, -0.659),
    (-0.028, -0.585, -0.315), (-0.328, -1.942, -0.163), (-1.629, -2.330, 0.152), (-2.626, -1.367, 0.303),
    (-2.327, -0.011, 0.132), (-1.022, 0.397, -0.187), (-0.703, 1.833, -0.399), (0.361, 2.305, -0.755),
    (-1.756, 2.637, -0.155), (3.924, -0.305, -0.470), (3.984, 0.930, 0.807), (3.311, 1.356, -0.777),
    (0.449, -2.692, -0.281), (-1.866, -3.384, 0.282), (-3.641, -1.670, 0.551), (-3.124, 0.719, 0.247),
    (-1.404, 3.538, -0.315),
)  # fmt: skip
_COPPER, _REPEATS = 3.61, {  # lattice constant in Å; cells along each axis, of four atoms each
    108: (3, 3, 3), 500: (5, 5, 5), 1000: (5, 5, 10), 2000: (5, 10, 10), 4000: (10, 10, 10), 8000: (10, 10, 20),
    16000: (10, 20, 20),
}  # fmt: skip


def inference_cases() -> dict[str, Structure]:
    """One molecule and four crystals or liquids, of 21 to 648 atoms."""
    silicon = ase.build.bulk("Si", "diamond", a=5.43, cubic=True).repeat(3)
    salt = ase.build.bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat(4)
    named = {
        "aspirin": aspirin(),
        "silicon": silicon,
        "copper": copper(500),
        "salt": salt,
        "water": water(),
    }
    return {name: plain(rattled(atoms, seed)) for seed, (name, atoms) in enumerate(named.items())}


def training_cases() -> dict[str, list[Structure]]:
    """Two batches of eight, with random labels: molecules of 21 atoms, and cells of 32 Cu atoms."""
    metal = ase.build.bulk("Cu", "fcc", a=_COPPER, cubic=True).repeat(2)
    named = {"8 molecules": aspirin(), "8 cells": metal}
    return {
        name: [labelled(plain(rattled(atoms, 10 * place + copy)), copy) for copy in range(8)]
        for place, (name, atoms) in enumerate(named.items())
    }


def cost_case(num_atoms: int) -> Structure:
    """A rattled Cu crystal."""
    return plain(rattled(copper(num_atoms), 0))


def aspirin() -> Atoms:
    return Atoms(numbers=_ASPIRIN_NUMBERS, positions=_ASPIRIN_POSITIONS)


def copper(num_atoms: int) -> Atoms:
    return ase.build.bulk("Cu", "fcc", a=_COPPER, cubic=True).repeat(_REPEATS[num_atoms])


def water() -> Atoms:
    """216 molecules of random orientation on a lattice of 3.1 Å: 1 g/cm³."""
    rng = np.random.default_rng(5)
    box = Atoms(cell=[18.6, 18.6, 18.6], pbc=True)
    for corner in np.ndindex(6, 6, 6):
        molecule = ase.build.molecule("H2O")
        molecule.rotate(rng.uniform(0, 360), rng.normal(size=3))
        molecule.positions += 3.1 * (np.array(corner) + 0.5)
        box += molecule
    return box


def rattled(atoms: Atoms, seed: int) -> Atoms:
    copy: Atoms = atoms.copy()
    copy.rattle(WIDTH, seed=seed)
    return copy


def plain(atoms: Atoms) -> Structure:
    """What is sent to the workers: lengths in Å."""
    return {
        "numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "cell": atoms.cell.array.tolist(),
        "pbc": atoms.pbc.tolist(),
    }


def labelled(structure: Structure, seed: int) -> Structure:
    """With a random energy (eV) and random forces (eV/Å)."""
    rng = np.random.default_rng(100 + seed)
    num_atoms = len(structure["numbers"])
    return {
        **structure,
        "energy": float(rng.normal()) * num_atoms,
        "forces": rng.normal(size=(num_atoms, 3)).tolist(),
    }
