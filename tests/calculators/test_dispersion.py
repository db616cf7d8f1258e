"""D3 on top of a calculator: sums, derivatives, what is passed on and what is refused."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable

import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

from escaip import EScAIPCalculator
from escaip.calculators import CommitteeCalculator, DispersionCalculator
from escaip.errors import ConfigError
from escaip.potential import Potential
from escaip.testing import check_potential

Make = Callable[..., Potential]


def structures() -> list[Atoms]:
    crystal = ase.build.bulk("NaCl", "rocksalt", a=5.6)
    slab = ase.build.fcc111("Cu", (1, 1, 2), vacuum=5.0, periodic=False)
    found = [ase.build.molecule("CH3OH"), crystal, slab]
    for atoms in found:
        atoms.rattle(0.05, seed=0)
    return found


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
    plain, atoms.calc = (
        CommitteeCalculator(members),
        DispersionCalculator(CommitteeCalculator(members), realspace_cutoff={"disp2": 10.0}),
    )
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
