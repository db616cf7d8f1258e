"""The ASE calculator: what it answers, when lists and graphs are made again, what it refuses."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from tiny import batch_of

from escaip import EScAIPCalculator
from escaip.calculators import CommitteeCalculator
from escaip.errors import CheckpointError, ConfigError, DataError, UnsupportedElementError
from escaip.nn.heads import HEADS
from escaip.potential import Potential
from escaip.simulate import MDSettings, run_md
from escaip.types import TARGETS, Target

Make = Callable[..., Potential]


def copper(repeat: int = 2) -> Atoms:
    atoms = ase.build.bulk("Cu", cubic=True).repeat((repeat, repeat, repeat))
    atoms.rattle(0.05, seed=0)
    return atoms


def test_answers_alone_equal_answers_in_a_batch(make_potential: Make) -> None:
    potential = make_potential()
    structures = [ase.build.molecule("CH3CH2OH"), copper(1), ase.build.bulk("Si")]
    batch = batch_of(*structures)
    together = potential(batch, compute_stress=True, create_graph=False)
    forces = together.forces.split([len(atoms) for atoms in structures])
    for index, atoms in enumerate(structures):
        before = atoms.copy()
        atoms.calc = EScAIPCalculator(potential)
        energy = atoms.get_potential_energy()
        assert energy == pytest.approx(float(together.energy[index]), rel=1e-12)
        assert atoms.get_potential_energy(force_consistent=True) == energy
        assert atoms.get_potential_energies().sum() == pytest.approx(energy, rel=1e-12)
        np.testing.assert_allclose(atoms.get_forces(), forces[index].numpy(), atol=1e-11)
        if atoms.pbc.any():
            np.testing.assert_allclose(atoms.get_stress(voigt=False), together.stress[index].numpy(), atol=1e-12)
        assert atoms == before


def test_further_heads_are_properties(make_potential: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "dipole", Target("dipole", False, (3,), "e Å", "e Å"))
    monkeypatch.setitem(TARGETS, "softness", Target("softness", True, (), "1", "1"))
    monkeypatch.setitem(HEADS, "dipole", lambda size: torch.nn.Linear(size, 3))
    monkeypatch.setitem(
        HEADS, "softness", lambda size: torch.nn.Sequential(torch.nn.Linear(size, 1), torch.nn.Flatten(0))
    )
    potential, plain = make_potential(heads=("dipole", "softness")), make_potential()
    atoms = ase.build.molecule("CH3OH")
    expected = potential(batch_of(atoms)).properties
    for calculator in (EScAIPCalculator(potential), CommitteeCalculator([potential, potential])):
        atoms.calc = calculator
        assert atoms.get_dipole_moment() == pytest.approx(expected["dipole"][0].detach().numpy(), rel=1e-12)
        assert calculator.get_property("softness", atoms) == pytest.approx(expected["softness"].detach().numpy())
    assert "dipole" not in EScAIPCalculator(plain).implemented_properties
    assert "dipole" not in CommitteeCalculator([potential, plain]).implemented_properties


def test_the_list_is_rebuilt_exactly_when_it_must(make_potential: Make) -> None:
    calculator = EScAIPCalculator(make_potential(), skin=1.0)
    atoms = copper()
    atoms.calc = calculator

    def builds() -> int:
        atoms.get_forces()
        return calculator.num_neighbor_builds

    assert builds() == 1
    atoms.positions += [5.0, 0.0, 0.0]  # all together: nothing moved
    assert builds() == 1
    atoms.positions[0] += [0.4, 0.0, 0.0]
    assert builds() == 1
    atoms.positions[0] += [0.2, 0.0, 0.0]  # 0.6 Å, more than half the skin
    assert builds() == 2
    atoms.set_cell(atoms.cell.array * 1.02, scale_atoms=True)  # expansion brings nothing nearer
    assert builds() == 2
    atoms.set_cell(atoms.cell.array * 0.8, scale_atoms=True)  # 4.63 Å / 0.8 > 4.63 Å + 1 Å
    assert builds() == 3
    atoms.pbc = [True, True, False]
    assert builds() == 4
    atoms.numbers[3] = 28
    assert builds() == 5
    atoms.wrap()
    assert builds() == 6


def test_the_potential_given_is_not_changed(make_potential: Make) -> None:
    potential = make_potential().train()
    EScAIPCalculator(potential, dtype="float32")
    assert potential.dtype == torch.float64
    assert potential.training
    assert all(parameter.requires_grad for parameter in potential.parameters())


def _energy(calculator: Calculator, atoms: Atoms) -> float:
    atoms.calc = calculator
    return float(atoms.get_potential_energy())


def test_pickle_deepcopy_and_another_process(make_potential: Make) -> None:
    potential, atoms = make_potential(), copper(1)
    committee = CommitteeCalculator([potential, make_potential(1)], skin=0.3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for calculator in (EScAIPCalculator(potential), committee):
            expected = _energy(calculator, atoms.copy())
            for made in (pickle.loads(pickle.dumps(calculator)), copy.deepcopy(calculator)):
                other = atoms.copy()
                assert _energy(made, other) == expected
                other.positions[0] += 0.01
                assert other.get_potential_energy() != expected
            assert pool.apply(_energy, (calculator, atoms)) == pytest.approx(expected, rel=1e-12)


def test_a_model_file_and_both_precisions(make_potential: Make, tmp_path: Path) -> None:
    make_potential().save(tmp_path / "m.escaip")
    atoms = copper(1)
    answers = {
        name: _energy(EScAIPCalculator(tmp_path / "m.escaip", dtype=name), atoms) for name in ("float32", "float64")
    }
    assert answers["float32"] == pytest.approx(answers["float64"], rel=1e-5)
    assert _energy(EScAIPCalculator(tmp_path / "m.escaip"), atoms) == answers["float64"]


def test_a_restart_is_exact_with_a_skin(make_potential: Make, tmp_path: Path) -> None:
    """The neighbor list's history leaves no trace."""
    potential = make_potential()

    def run(steps: int, name: str, resume: bool = False) -> tuple[Atoms, int]:
        atoms = copper(1)
        atoms.calc = EScAIPCalculator(potential, skin=0.4)
        asked = MDSettings("npt", steps, 2.0, temperature=600.0, barostat_time=200.0, restart_interval=7)
        result = run_md(atoms, asked, out=tmp_path / name, resume=resume)
        return result.atoms, atoms.calc.num_neighbor_builds

    whole, builds = run(24, "whole.extxyz")
    run(16, "parts.extxyz")
    parts, _ = run(24, "parts.extxyz", resume=True)
    assert builds > 1
    assert np.array_equal(whole.positions, parts.positions)
    assert np.array_equal(whole.get_momenta(), parts.get_momenta())
    assert np.array_equal(whole.cell.array, parts.cell.array)


@pytest.mark.bad_input
def test_structures_that_mean_nothing(make_potential: Make) -> None:
    calculator = EScAIPCalculator(make_potential())
    atoms = ase.build.molecule("H2O")
    atoms.calc = calculator
    atoms.get_potential_energy()
    atoms.positions[1, 2] = np.nan
    with pytest.raises(DataError, match=r"atom 1 are NaN"):
        atoms.get_forces()
    atoms = ase.build.molecule("CH3OH")
    atoms.calc = EScAIPCalculator(make_potential(elements=(1, 6)))
    with pytest.raises(UnsupportedElementError, match=r"not trained on O: use structures of H C"):
        atoms.get_potential_energy()
    flat = Atoms("Cu2", positions=[[0, 0, 0], [1.2, 0, 0]], pbc=True)
    flat.calc = calculator
    with pytest.raises(DataError, match="no volume"):
        flat.get_potential_energy()


@pytest.mark.bad_input
def test_arguments_that_cannot_be(make_potential: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="skin is -1"):
        EScAIPCalculator(make_potential(), skin=-1.0)
    with pytest.raises(ConfigError, match="dtype 'float16' is not supported"):
        EScAIPCalculator(make_potential(), dtype="float16")
    with pytest.raises(ConfigError, match="device 'gpu' does not exist"):
        EScAIPCalculator(make_potential(), device="gpu")
    with pytest.raises(CheckpointError, match="does not exist"):
        EScAIPCalculator(tmp_path / "none.ckpt")


def test_a_graph_is_made_again_exactly_when_it_must(make_potential: Make) -> None:
    calculator = EScAIPCalculator(make_potential(), graph_skin=0.4)
    atoms = copper()
    atoms.calc = calculator

    def builds() -> int:
        atoms.get_forces()
        return calculator.num_graph_builds

    assert builds() == 1
    atoms.positions += [3.0, 0.0, 0.0]
    assert builds() == 1
    atoms.positions[0] += [0.15, 0.0, 0.0]
    assert builds() == 1
    atoms.positions[0] += [0.1, 0.0, 0.0]  # more than half of it
    assert builds() == 2
    atoms.set_cell(atoms.cell.array * 1.1, scale_atoms=True)  # an expansion changes distances, too
    assert builds() == 3
    atoms.numbers[0] = 47
    assert builds() == 4
    assert pickle.loads(pickle.dumps(calculator)).num_graph_builds == 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options", [{"boo_weighting": "uniform"}, {"soft": False}, {"forces": "direct", "force_weighting": "uniform"}]
)
def test_models_whose_neighbors_jump_refuse(make_potential: Make, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leave graph_skin out"):
        EScAIPCalculator(make_potential(**options), graph_skin=0.2)
    with pytest.raises(ConfigError, match="graph_skin is -1"):
        EScAIPCalculator(make_potential(), graph_skin=-1.0)
