"""The structures of the suite."""

from __future__ import annotations

from typing import Any

import ase.build
from ase import Atoms

from escaip.data import AtomicData, collate


def copper(atoms: int, rattle: float = 0.1) -> Atoms:
    """About so many atoms of fcc copper, rattled by ``rattle`` Å."""
    edges = 3 * [max(2, round((atoms / 4) ** (1 / 3)))]
    edges[0] = max(2, round(atoms / (4 * edges[1] * edges[2])))
    crystal = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True).repeat(tuple(edges))
    if rattle:
        crystal.rattle(rattle, seed=0)
    return crystal


def copper_batch(atoms: int, device: str) -> Any:
    return collate([AtomicData.from_ase(copper(atoms))]).to(device)


def mixed_batch() -> Any:
    """A crystal, a slab with a molecule on it, and salt with a vacancy: periodic, of several elements and sizes."""
    slab = ase.build.fcc111("Pt", (3, 3, 3), vacuum=6.0, periodic=True)
    ase.build.add_adsorbate(slab, ase.build.molecule("CH3OH"), 2.2, "ontop")
    salt = ase.build.bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat((2, 1, 1))
    del salt[3]
    structures = [ase.build.bulk("Si", "diamond", a=5.43, cubic=True), slab, salt]
    for seed, atoms in enumerate(structures):
        atoms.rattle(0.05, seed=seed)
    return collate([AtomicData.from_ase(atoms) for atoms in structures])
