"""One calculator in all the ways ASE programs use one: shared, copied, sent elsewhere, behind filters."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.filters import FrechetCellFilter, UnitCellFilter
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS, FIRE

from escaip import EScAIPCalculator
from escaip.calculators import CommitteeCalculator
from escaip.potential import Potential

Make = Callable[..., Potential]


def copper() -> Atoms:
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    return atoms


def count_evaluations(calculator: EScAIPCalculator) -> list[int]:
    calls: list[int] = []
    original = calculator.potential.forward
    calculator.potential.forward = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]  # type: ignore[method-assign]
    return calls


def forces_alone(make_potential: Make, atoms: Atoms) -> np.ndarray:
    copy = atoms.copy()
    copy.calc = EScAIPCalculator(make_potential())
    return copy.get_forces()


def test_structures_of_any_size_share_it_and_only_changes_are_evaluated(make_potential: Make) -> None:
    calculator = EScAIPCalculator(make_potential())
    calls = count_evaluations(calculator)
    structures = [ase.build.molecule(name) for name in ("H2O", "CH3OH", "NH3", "H2O")]
    structures += [copper(), copper().repeat((2, 1, 1)), Atoms("Cu")]
    expected = [forces_alone(make_potential, atoms) for atoms in structures]
    for atoms in structures:
        atoms.calc = calculator
    for _ in range(2):
        for atoms, forces in zip(structures, expected, strict=True):
            assert np.array_equal(atoms.get_forces(), forces)
            atoms.get_potential_energy()
    assert len(calls) == 2 * len(structures)
    water, same = structures[0], structures[0].copy()
    same.calc = calculator
    water.get_forces()
    before = len(calls)
    same.get_forces()  # an equal structure is the same question
    water.get_forces()
    assert len(calls) == before
    same.numbers[0] = 16
    assert not np.array_equal(same.get_forces(), water.get_forces())


def test_what_is_returned_can_be_changed(make_potential: Make) -> None:
    atoms = copper()
    atoms.calc = EScAIPCalculator(make_potential())
    forces = atoms.get_forces()
    kept = forces.copy()
    forces += 1.0
    atoms.get_stress()[:] = 0.0
    assert np.array_equal(atoms.get_forces(), kept)
    assert np.abs(atoms.get_stress()).max() > 0


def test_copies_that_differ_in_charge_or_spin_alone(make_potential: Make) -> None:
    calculator = EScAIPCalculator(make_potential(charge=True, spin=True))
    states = [{}, {"charge": 1}, {"spin_multiplicity": 3}, {"charge": -1, "spin": 2}]
    structures = [ase.build.molecule("CH3OH") for _ in states]
    for atoms, state in zip(structures, states, strict=True):
        atoms.info.update(state)
        atoms.calc = calculator
    first = [atoms.get_potential_energy() for atoms in structures]
    assert len(set(first)) == len(states)
    assert [atoms.get_potential_energy() for atoms in reversed(structures)] == first[::-1]
    structures[1].info["charge"] = 0
    assert structures[1].get_potential_energy() == first[0]
    for atoms in structures:  # a model that knows neither ignores both
        atoms.calc = EScAIPCalculator(make_potential())
    assert len({atoms.get_potential_energy() for atoms in structures}) == 1


@pytest.mark.parametrize("committee", [False, True])
def test_threads_get_the_answers_of_their_own_structures(make_potential: Make, committee: bool) -> None:
    potential = make_potential()
    calculator = CommitteeCalculator([potential, potential]) if committee else EScAIPCalculator(potential)
    names = ["H2O", "CH3OH", "NH3", "CH4", "CH3CH2OH", "CO2"]
    structures = [ase.build.molecule(name) for name in names]
    expected = [forces_alone(make_potential, atoms) for atoms in structures]

    def ask(number: int) -> float:
        atoms = structures[number % len(names)].copy()
        atoms.calc = calculator
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        assert calculator.get_property("energies", atoms).sum() == pytest.approx(energy, rel=1e-12)
        return float(np.abs(forces - expected[number % len(names)]).max())

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(ask, range(120))) < 1e-12


def test_a_band_of_images_shares_it(make_potential: Make) -> None:
    def band(shared: bool) -> list[np.ndarray]:
        first, last = ase.build.molecule("NH3"), ase.build.molecule("NH3")
        last.positions[:, 2] *= -1.0
        images = [first, *(first.copy() for _ in range(3)), last]
        one = EScAIPCalculator(make_potential())
        for image in images:
            image.calc = one if shared else EScAIPCalculator(make_potential())
        neb = NEB(images, allow_shared_calculator=shared, method="improvedtangent")
        neb.interpolate()
        FIRE(neb, logfile=None).run(steps=3)
        return [image.positions for image in images]

    np.testing.assert_array_equal(band(True), band(False))


@pytest.mark.parametrize("kind", [FrechetCellFilter, UnitCellFilter])
def test_cells_relax_through_filters(make_potential: Make, kind: type) -> None:
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.0)  # a crystal of one element hardly has a stress at random weights
    atoms.rattle(0.05, seed=0)
    atoms.calc = EScAIPCalculator(make_potential())
    before, stress = atoms.get_volume(), np.abs(atoms.get_stress()).max()
    with BFGS(kind(atoms), logfile=None) as optimizer:
        assert optimizer.run(fmax=0.002, steps=100)
    assert np.abs(atoms.get_stress()).max() < 0.1 * stress
    assert abs(atoms.get_volume() / before - 1) > 1e-3


def test_nothing_is_left_behind_by_a_long_run(make_potential: Make) -> None:
    """Objects and tensors after some hundred steps are as many as after some dozens; the list is rebuilt meanwhile."""
    atoms = ase.build.molecule("CH3OH")
    atoms.calc = EScAIPCalculator(make_potential(dtype=torch.float32, num_layers=1), skin=0.05, graph_skin=0.02)
    atoms.set_velocities(np.random.default_rng(0).normal(scale=0.02, size=atoms.positions.shape))
    dynamics = VelocityVerlet(atoms, 0.5 * units.fs)

    def census(steps: int) -> tuple[int, int]:
        dynamics.run(steps)
        gc.collect()
        present = gc.get_objects()
        return len(present), sum(issubclass(type(item), torch.Tensor) for item in present)

    census(30)
    objects, tensors = census(30)
    builds = atoms.calc.num_neighbor_builds
    later = census(120)
    assert atoms.calc.num_neighbor_builds > builds + 8
    assert later[1] <= tensors + 6  # what is kept may have been made in this step or in another
    assert later[0] <= objects + 30
