"""A hop whose saddle is known by symmetry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc100
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms


@pytest.fixture
def hop() -> Callable[[], tuple[Atoms, Atoms, Atoms]]:
    """Gold in two hollow sites of Al(100), and on the bridge between them, with EMT."""

    def make() -> tuple[Atoms, Atoms, Atoms]:
        slab = fcc100("Al", size=(2, 2, 2))
        add_adsorbate(slab, "Au", 1.7, "hollow")
        slab.center(axis=2, vacuum=4.0)
        slab.set_constraint(FixAtoms(mask=slab.get_tags() > 1))
        places = []
        for share in (0.0, 1.0, 0.5):
            atoms = slab.copy()
            atoms.positions[-1, 0] += share * slab.cell[0, 0] / 2
            atoms.calc = EMT()
            places.append(atoms)
        return places[0], places[1], places[2]

    return make
