"""Committees and dispersion: means, spreads and sums, what members share, what is passed on and refused."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any

import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from tiny import rattled

from escaip import EScAIPCalculator
from escaip.calculators import CommitteeCalculator, DispersionCalculator
from escaip.errors import ConfigError, UnsupportedElementError
from escaip.potential import Potential
from escaip.testing import check_potential

Make = Callable[..., Potential]


def crystal() -> Atoms:
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.2)
    atoms.rattle(0.1, seed=1)
    return atoms


def test_means_and_spreads_are_those_of_the_members(make_potential: Make) -> None:
    members = [make_potential(seed) for seed in range(3)]
    atoms = crystal()
    atoms.calc = CommitteeCalculator(members)
    energies, forces, stresses, atomic = [], [], [], []
    for member in members:
        alone = crystal()
        alone.calc = EScAIPCalculator(member)
        energies.append(alone.get_potential_energy())
        forces.append(alone.get_forces())
        stresses.append(alone.get_stress())
        atomic.append(alone.get_potential_energies())
    assert np.ptp(energies) > 0.01
    assert atoms.get_potential_energy() == pytest.approx(np.mean(energies), rel=1e-13)
    np.testing.assert_allclose(atoms.get_forces(), np.mean(forces, axis=0), atol=1e-13)
    np.testing.assert_allclose(atoms.get_stress(), np.mean(stresses, axis=0), atol=1e-14)
    np.testing.assert_allclose(atoms.get_potential_energies(), np.mean(atomic, axis=0), atol=1e-12)
    found = atoms.calc.results
    assert found["energy_spread"] == pytest.approx(np.std(energies))
    expected = np.sqrt(np.mean([((f - np.mean(forces, axis=0)) ** 2).sum(axis=1) for f in forces], axis=0))
    np.testing.assert_allclose(atoms.calc.get_property("forces_spread", atoms), expected, atol=1e-13)
    np.testing.assert_array_equal(found["member_energy"], energies)
    np.testing.assert_array_equal(found["member_forces"], forces)
    np.testing.assert_allclose(found["member_stress"], stresses, atol=1e-15)


@pytest.mark.parametrize("other", [{}, {"cutoff": 3.5, "num_neighbors": None}])
def test_stress_of_atoms_is_the_mean_and_asked_for(
    make_potential: Make, other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import escaip.potential.potential

    calls, original = [], escaip.potential.potential.virials_of
    monkeypatch.setattr(escaip.potential.potential, "virials_of", lambda *a: (calls.append(1), original(*a))[1])
    members = [make_potential(), make_potential(1), make_potential(2, **other)]
    atoms = crystal()
    atoms.calc = CommitteeCalculator(members)
    stress, forces = atoms.get_stress(), atoms.get_forces()
    assert calls == []
    assert "stresses" in atoms.calc.implemented_properties
    stresses = atoms.get_stresses()
    assert len(calls) == len(members)
    np.testing.assert_array_equal(atoms.get_forces(), forces)
    np.testing.assert_allclose(stresses.sum(axis=0), stress, atol=1e-14)
    alone = []
    for member in members:
        atoms.calc = EScAIPCalculator(member)
        alone.append(atoms.get_stresses())
    assert np.ptp(alone, axis=0).max() > 1e-4
    np.testing.assert_allclose(stresses, np.mean(alone, axis=0), atol=1e-14)


@pytest.mark.parametrize("other", [{}, {"num_neighbors": 6}, {"cutoff": 3.5, "num_neighbors": None}])
@pytest.mark.parametrize("graph_skin", [0.0, 0.3])
def test_the_graph_is_shared_where_settings_agree(
    make_potential: Make, other: dict[str, Any], graph_skin: float
) -> None:
    """Neighbors are always searched for once; answers are those of members alone whatever is shared."""
    members = [make_potential(), make_potential(1), make_potential(2, **other)]
    calculator = CommitteeCalculator(members, graph_skin=graph_skin)
    alone = [EScAIPCalculator(member, skin=0.0) for member in members]
    rng = np.random.default_rng(0)
    atoms = crystal().repeat((2, 2, 1))
    for _ in range(6):
        atoms.positions += rng.normal(scale=0.02, size=atoms.positions.shape)
        atoms.calc = calculator
        found = (atoms.get_forces(), calculator.results["member_forces"])[1]
        for one, forces in zip(alone, found, strict=True):
            atoms.calc = one
            np.testing.assert_allclose(forces, atoms.get_forces(), atol=1e-10)
    assert calculator.num_neighbor_builds == 1 if not graph_skin else calculator.num_neighbor_builds < 3
    graphs = 2 if other else 1
    assert calculator.num_graph_builds == 6 * graphs if not graph_skin else calculator.num_graph_builds < 6 * graphs


@pytest.mark.bad_input
def test_committees_that_cannot_be(make_potential: Make) -> None:
    for models in ([make_potential()], make_potential(), "model.escaip"):
        with pytest.raises(ConfigError, match="at least two models"):
            CommitteeCalculator(models)  # type: ignore[arg-type]
    mixed = CommitteeCalculator([make_potential(), make_potential(forces="direct")])
    assert np.isfinite(mixed.get_property("forces", crystal())).all()
    for name in ("stress", "stresses"):
        with pytest.raises(PropertyNotImplementedError, match="direct-force model has no stress"):
            mixed.get_property(name, crystal())
    water = ase.build.molecule("H2O")
    water.calc = CommitteeCalculator([make_potential(), make_potential(elements=(1, 6))])
    for _ in range(2):  # asking again does not help
        with pytest.raises(UnsupportedElementError, match="not trained on O"):
            water.get_forces()


def structures() -> list[Atoms]:
    crystal = ase.build.bulk("NaCl", "rocksalt", a=5.6)
    slab = ase.build.fcc111("Cu", (1, 1, 2), vacuum=5.0, periodic=False)
    return rattled(ase.build.molecule("CH3OH"), crystal, slab)


@pytest.fixture
def _library() -> None:
    pytest.importorskip("dftd3.interface", reason="pip install dftd3")


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize(("damping", "theirs"), [("bj", "d3bj"), ("zero", "d3zero")])
def test_it_adds_what_the_library_says_alone(make_potential: Make, damping: str, theirs: str) -> None:
    from dftd3.ase import DFTD3

    base = EScAIPCalculator(make_potential())
    for atoms in structures():
        found = []
        for calculator in (DispersionCalculator(base, "pbe", damping), base, DFTD3(method="pbe", damping=theirs)):
            copy = atoms.copy()
            copy.calc = calculator
            stress = copy.get_stress() if atoms.pbc.any() else np.zeros(6)
            found.append((copy.get_potential_energy(), copy.get_forces(), stress))
        for whole, one, other in zip(*found, strict=True):
            np.testing.assert_allclose(whole, one + other, atol=1e-12)
        assert np.abs(found[2][1]).max() > 1e-4


@pytest.mark.usefixtures("_library")
def test_the_sum_is_a_potential(make_potential: Make) -> None:
    calculator = DispersionCalculator(EScAIPCalculator(make_potential()), "b3lyp")
    molecule, crystal, _ = structures()
    check_potential(calculator, [molecule], derivative_tolerance=1e-7)
    # Under strain pairs come and go at the library's cutoff of 32 Å.
    check_potential(calculator, [crystal], energy_tolerance=1e-6, derivative_tolerance=5e-5)


@pytest.mark.usefixtures("_library")
def test_axes_without_a_cell_vector(make_potential: Make) -> None:
    slab = structures()[2]
    flat = slab.copy()
    flat.set_cell(np.where(slab.pbc[:, None], slab.cell.array, 0.0))
    far = slab.copy()
    far.positions[:, 2] -= 9.0  # out of the cell along its open axis, where dftd3 alone would wrap it
    forces = []
    for atoms in (slab, flat, far):
        atoms.calc = DispersionCalculator(EScAIPCalculator(make_potential()))
        forces.append(atoms.get_forces())
    np.testing.assert_allclose(forces[1:], [forces[0]] * 2, atol=1e-10)
    with pytest.raises(PropertyNotImplementedError, match="needs a cell with volume"):
        flat.get_stress()


@pytest.mark.usefixtures("_library")
def test_a_committee_below_a_change_of_charge_and_a_journey(make_potential: Make) -> None:
    atoms = structures()[0]
    members = [make_potential(charge=True), make_potential(1, charge=True)]
    plain = CommitteeCalculator(members)
    atoms.calc = DispersionCalculator(CommitteeCalculator(members), realspace_cutoff={"disp2": 10.0})
    spread = atoms.calc.get_property("forces_spread", atoms)
    np.testing.assert_array_equal(spread, plain.get_property("forces_spread", atoms))
    assert spread.max() > 0
    energy = atoms.get_potential_energy()
    travelled = atoms.copy()
    travelled.calc = pickle.loads(pickle.dumps(atoms.calc))
    assert travelled.get_potential_energy() == energy
    atoms.info["charge"] = 1
    assert atoms.get_potential_energy() != energy


@pytest.mark.bad_input
def test_without_the_library(make_potential: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dftd3.ase", None)
    with pytest.raises(ConfigError, match="pip install dftd3"):
        DispersionCalculator(EScAIPCalculator(make_potential()))


@pytest.mark.bad_input
@pytest.mark.usefixtures("_library")
def test_wrong_settings(make_potential: Make) -> None:
    base = EScAIPCalculator(make_potential())
    with pytest.raises(ConfigError, match="no parameters for functional 'pbd'"):
        DispersionCalculator(base, "pbd")
    with pytest.raises(ConfigError, match="damping is 'd3bj': choose bj"):
        DispersionCalculator(base, damping="d3bj")
    with pytest.raises(PropertyNotImplementedError, match="direct-force"):
        DispersionCalculator(EScAIPCalculator(make_potential(forces="direct"))).get_property("stress", structures()[1])
