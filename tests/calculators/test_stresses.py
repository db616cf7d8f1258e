"""Stress of each atom, and stress with any number of periodic axes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

from escaip import EScAIPCalculator
from escaip.data import AtomicData, collate
from escaip.errors import ConfigError
from escaip.potential import Potential
from escaip.simulate import MDSettings, read_log, relax, run_md
from escaip.testing import Evaluation, stress_error_by_difference

Make = Callable[..., Potential]


def crystal() -> Atoms:
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.4, cubic=True)
    atoms.rattle(0.1, seed=0)
    return atoms


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_shares_sum_to_the_stress(make_potential: Make, dtype: str) -> None:
    atoms = crystal()
    atoms.calc = EScAIPCalculator(make_potential(), dtype=dtype)
    shares, stress = atoms.get_stresses(), atoms.get_stress()
    assert shares.shape == (len(atoms), 6)
    assert np.ptp(shares, axis=0).min() > 1e-5
    np.testing.assert_allclose(shares.sum(axis=0), stress, rtol=1e-12 if dtype == "float64" else 1e-6, atol=1e-14)
    assert atoms.get_stresses(voigt=False).shape == (len(atoms), 3, 3)


@pytest.mark.parametrize("periodic", [True, False])
def test_virials_are_minus_volume_times_it_and_molecules_have_them(make_potential: Make, periodic: bool) -> None:
    atoms = crystal() if periodic else ase.build.molecule("CH3OH")
    atoms.calc = EScAIPCalculator(make_potential())
    virials = atoms.calc.get_property("virials", atoms)
    assert virials.shape == (len(atoms), 3, 3)
    if periodic:
        np.testing.assert_allclose(virials, -atoms.get_volume() * atoms.get_stresses(voigt=False), atol=1e-12)
    else:
        total = atoms.positions.T @ atoms.get_forces()  # Σ r ⊗ F
        np.testing.assert_allclose(virials.sum(axis=0), 0.5 * (total + total.T), atol=1e-12)


def test_each_atom_gets_half_of_its_pairs(make_potential: Make) -> None:
    """Pair by pair, from the forces between two atoms."""
    from escaip.potential.derivatives import virials_of

    atoms = crystal()
    batch = collate([AtomicData.from_ase(atoms)])
    graph = make_potential().graph_of(batch)
    generator = torch.Generator().manual_seed(0)
    vectors, gradient = torch.randn(2, len(graph.center), 3, generator=generator, dtype=torch.float64)
    expected = np.zeros((len(atoms), 3, 3))
    for i, j, d, g in zip(graph.center, graph.neighbor, vectors.numpy(), gradient.numpy(), strict=True):
        virial = np.outer(d, g)
        for atom in (int(i), int(j)):
            expected[atom] += 0.25 * (virial + virial.T)
    np.testing.assert_allclose(virials_of(vectors, gradient, graph).numpy(), expected, atol=1e-12)


PERIODIC: dict[str, Callable[[], Atoms]] = {
    "molecule": lambda: ase.build.molecule("CH3OH"),
    "wire": lambda: Atoms("CuAgCu", [[0, 0, 0], [0.3, 0.2, 2.4], [0.1, 0.4, 4.9]], cell=[9, 9, 7.3], pbc=(0, 0, 1)),
    "slab": lambda: ase.build.fcc111("Cu", (2, 2, 2), vacuum=4.0, periodic=False),
    "crystal": crystal,
    "left-handed": lambda: Atoms(crystal(), cell=crystal().cell.array[[1, 0, 2]]),
}


@pytest.mark.parametrize("name", PERIODIC)
def test_stress_with_any_number_of_periodic_axes(make_potential: Make, name: str) -> None:
    """Where the cell has a volume it is that of a finite strain; elsewhere it says why there is none."""
    atoms = PERIODIC[name]()
    atoms.rattle(0.03, seed=1)
    atoms.calc = EScAIPCalculator(make_potential())
    if not atoms.pbc.any():
        for ask in (atoms.get_stress, atoms.get_stresses):
            with pytest.raises(PropertyNotImplementedError, match="needs a cell with volume"):
                ask()
        return

    def evaluate(structures: Any) -> list[Evaluation]:
        found = []
        for structure in structures:
            structure.calc = atoms.calc
            found.append(
                Evaluation(structure.get_potential_energy(), structure.get_forces(), structure.get_stress(voigt=False))
            )
        return found

    assert stress_error_by_difference(evaluate, atoms.copy()) < 1e-7
    np.testing.assert_allclose(atoms.get_stresses().sum(axis=0), atoms.get_stress(), atol=1e-13)


@pytest.mark.parametrize("name", ["wire", "slab"])
def test_dynamics_and_relaxation_with_open_axes(make_potential: Make, name: str, tmp_path: Path) -> None:
    """Also where the open axes have no cell vector at all, so that there is no volume."""
    potential = make_potential()
    atoms = PERIODIC[name]()
    flat = atoms.copy()
    flat.set_cell(np.where(atoms.pbc[:, None], atoms.cell.array, 0.0))
    found = []
    for structure in (atoms, flat):
        structure.calc = EScAIPCalculator(potential)
        asked = MDSettings(steps=5, timestep=1.0, temperature=100.0, log_interval=1)
        result = run_md(structure, asked, out=tmp_path / "a.extxyz", overwrite=True)
        log = read_log(tmp_path / "a.csv")
        assert np.isnan(log["pressure_GPa"]).all()
        found.append((result.atoms.positions, relax(structure, fmax=0.5, steps=10).atoms.positions))
    assert np.isnan(log["volume_A3"]).all()
    np.testing.assert_allclose(found[0], found[1], atol=1e-9)
    with pytest.raises(PropertyNotImplementedError, match="needs a cell with volume"):
        flat.get_stress()
    with pytest.raises(ConfigError, match="needs three periodic axes"):
        relax(flat, cell=True)
