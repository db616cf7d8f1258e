"""LAMMPS with a potential: where it is installed, structures for it, and what it has of each atom."""

from __future__ import annotations

import ase.build
import numpy as np
import pytest
from ase import Atoms, units

from escaip.calculators.lammps import LammpsDriver, open_lammps
from escaip.errors import ConfigError

ENERGY_UNITS = {"metal": 1.0, "real": units.kcal / units.mol}


def installed() -> str:
    try:
        open_lammps(["-log", "none", "-screen", "none"]).close()
    except ConfigError as error:
        return str(error)
    return ""


MISSING = installed()
needs_lammps = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def orthogonal() -> Atoms:
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.rattle(0.2, seed=0)
    return atoms


def triclinic() -> Atoms:
    """Oblique, and turned out of LAMMPS's frame."""
    atoms = Atoms("NaCl", positions=[[0.1, 0.0, 0.2], [2.9, 2.6, 3.1]], pbc=True)
    atoms.cell = [[0.3, 4.8, 0.5], [-4.9, 1.1, 0.4], [0.9, 0.7, 5.3]]
    atoms.set_cell(0.75 * atoms.cell.array, scale_atoms=True)  # several neighbors within 4 Å
    atoms = atoms.repeat((2, 1, 2))
    atoms.rattle(0.2, seed=1)
    return atoms


def slab() -> Atoms:
    atoms = ase.build.fcc111("Cu", (2, 2, 3), vacuum=4.0)
    atoms.rattle(0.1, seed=2)
    return atoms


def molecule() -> Atoms:
    atoms = ase.build.molecule("CH3OH", vacuum=3.0)
    atoms.rattle(0.05, seed=3)
    return atoms


def moving(atoms: Atoms) -> Atoms:
    """Hot, and all together fast enough to cross a cell in some tens of steps."""
    spread = np.sqrt(600.0 * units.kB / atoms.get_masses())[:, None]
    thermal = np.random.default_rng(0).normal(size=atoms.positions.shape) * spread
    atoms.set_velocities(thermal + np.array([0.5, -0.35, 0.4]))
    return atoms


def by_id(driver: LammpsDriver, name: str) -> np.ndarray:
    """What LAMMPS has of each atom, ordered by id."""
    extract, count = driver.lammps.numpy.extract_atom, driver.lammps.extract_setting("nlocal")
    return extract(name, nelem=count)[np.argsort(extract("id", nelem=count))]


def turned(atoms: Atoms) -> np.ndarray:
    """``R`` with ``r_lammps = r R``, by LAMMPS's rule: lower triangular cell rows with a positive diagonal."""
    triangle = np.linalg.cholesky(atoms.cell.array @ atoms.cell.array.T)
    return np.linalg.solve(atoms.cell.array, triangle)
