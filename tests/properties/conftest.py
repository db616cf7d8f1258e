"""Teachers whose properties are known: springs between nearest neighbors, and ASE's EMT."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc100
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress


class Springs(Calculator):
    """``k/2 (r − length)²`` between atoms nearer than ``1.2 length``."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, stiffness: float, length: float) -> None:
        super().__init__()
        self.stiffness, self.length = stiffness, length

    def calculate(
        self, atoms: Atoms | None = None, properties: Sequence[str] = (), system_changes: Sequence[str] = ()
    ) -> None:
        super().calculate(atoms, properties, system_changes or all_changes)
        assert self.atoms is not None
        center, distance, vector = neighbor_list("idD", self.atoms, 1.2 * self.length)
        stretch = distance - self.length
        pull = (self.stiffness * stretch / distance)[:, None] * vector
        forces = np.zeros_like(self.atoms.positions)
        np.add.at(forces, center, pull)
        energy = 0.25 * self.stiffness * float((stretch**2).sum())
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}
        if self.atoms.pbc.all():
            virial = 0.5 * np.einsum("ex,ey->xy", vector, pull)
            self.results["stress"] = full_3x3_to_voigt_6_stress(virial / self.atoms.get_volume())


@pytest.fixture
def springs() -> type[Springs]:
    return Springs


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
