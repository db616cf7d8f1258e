"""Contracts of every calculator: physics, stress, sharing, and that what is kept never shows in an answer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from ase.filters import FrechetCellFilter, UnitCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from scipy.spatial.transform import Rotation
from tiny import batch_of, crystal

from escaip import EScAIPCalculator, Potential
from escaip.calculators import CommitteeCalculator
from escaip.errors import ConfigError, DataError
from escaip.simulate import MDSettings, read_log, relax, run_md
from escaip.simulate.output import freeze
from escaip.testing import check_potential, continuity_error, evaluator, stress_error_by_difference

Make = Callable[..., Potential]

KINDS: dict[str, Callable[..., Calculator]] = {
    "plain": lambda make, **options: EScAIPCalculator(make(**options), skin=0.0),
    "skin": lambda make, **options: EScAIPCalculator(make(**options), skin=0.5),
    "graph": lambda make, **options: EScAIPCalculator(make(**options), graph_skin=0.4),
    "pruned": lambda make, **options: EScAIPCalculator(make(**options), graph_skin=0.4),
    "committee": lambda make, **options: CommitteeCalculator([make(**options), make(1, **options)], graph_skin=0.4),
    "bare committee": lambda make, **options: CommitteeCalculator([make(**options), make(1, **options)], skin=0.0),
}


@dataclass
class Maker:
    """Makes calculators of one kind, with random weights."""

    kind: str
    make_potential: Make

    def __call__(self, kind: str = "", **options: Any) -> Any:
        return KINDS[kind or self.kind](self.make_potential, **options)

    def builds(self, calculator: Any) -> int:
        return calculator.num_neighbor_builds if self.kind in ("plain", "skin") else calculator.num_graph_builds


@pytest.fixture(params=[kind for kind in KINDS if kind != "bare committee"])
def calculate(request: pytest.FixtureRequest, make_potential: Make, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """Makes calculators of one kind; "pruned" cuts its kept graph to what counts at every step."""
    if request.param == "pruned":
        monkeypatch.setattr("escaip.calculators.ase._TIGHT_FROM", (0, 0))
    return Maker(request.param, make_potential)


keeping = pytest.mark.parametrize(
    "calculate", [kind for kind in KINDS if kind not in ("plain", "bare committee")], indirect=True
)


def copper(repeat: tuple[int, int, int] = (2, 2, 1)) -> Atoms:
    atoms = ase.build.bulk("Cu", cubic=True).repeat(repeat)
    atoms.rattle(0.1, seed=0)
    return atoms


def salt() -> Atoms:
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.4)
    atoms.rattle(0.1, seed=1)
    return atoms


def answers(atoms: Atoms, calculator: Calculator) -> list[np.ndarray]:
    atoms.calc = calculator
    found = [np.array(atoms.get_potential_energy()), atoms.get_forces(), atoms.get_potential_energies()]
    return found + ([atoms.get_stress(voigt=False)] if "stress" in calculator.implemented_properties else [])


def test_the_physics(calculate: Maker) -> None:
    check_potential(calculate(), [ase.build.molecule("CH3OH"), salt()])


OPTIONS: list[dict[str, Any]] = [
    {}, {"forces": "direct"}, {"num_neighbors": None, "cutoff": 3.0},
    {"aggregation": "graph_attention", "message_gate": True}, {"rank_step": "bump", "norm": "layernorm"},
    {"distance_table": "always", "distance_knots": 256},
]  # fmt: skip


@keeping
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(map(str, o.values())) or "default")
def test_what_is_kept_never_changes_an_answer(calculate: Maker, options: dict[str, Any]) -> None:
    """On walks under strain, as at constant pressure, long enough to use the skin up; with a list alone to the bit.

    One atom sees images of itself alone: there a wrong bound on strain shows.
    """
    rng, fresh_kind = np.random.default_rng(1), "bare committee" if calculate.kind == "committee" else "plain"
    for atoms in (copper(), ase.build.bulk("Cu")) if not options else (copper(),):
        kept, fresh = calculate(**options), calculate(fresh_kind, **options)
        for _ in range(20):
            atoms.positions += rng.normal(scale=0.02, size=atoms.positions.shape)
            strain = np.eye(3) + rng.normal(scale=0.004 if len(atoms) > 1 else 0.02, size=(3, 3))
            atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            for one, other in zip(answers(atoms, kept), answers(atoms, fresh), strict=True):
                if calculate.kind == "skin":
                    assert np.array_equal(one, other)
                else:
                    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)
        assert 2 <= calculate.builds(kept) <= 15
        assert calculate.builds(fresh) == 20


@keeping
def test_energy_and_forces_are_continuous_across_a_rebuild(calculate: Maker) -> None:
    calculator = calculate()
    evaluate = evaluator(calculator)

    def along(distance: float) -> Atoms:
        atoms = copper()
        atoms.positions[3] += distance * np.array([0.6, 0.64, 0.48])
        return atoms

    def is_made_again(distance: float) -> bool:
        evaluate([along(-0.6), along(0.0)])
        before = calculate.builds(calculator)
        evaluate([along(distance)])
        return calculate.builds(calculator) > before

    near, far = 0.0, 0.5
    while far - near > 1e-4:
        middle = 0.5 * (near + far)
        near, far = (near, middle) if is_made_again(middle) else (middle, far)
    assert 0.15 < near < far < 0.3
    evaluate([along(-0.6), along(0.0)])
    before = calculate.builds(calculator)
    jumps = continuity_error(evaluate, [along(x) for x in np.arange(near - 2e-5, far + 2e-5, 1e-5)])
    assert calculate.builds(calculator) == before + 1
    assert max(jumps) < 1e-7


def test_stress_turns_with_cell_and_positions(calculate: Maker) -> None:
    """``R σ Rᵀ``, and as much for the shares of the atoms."""
    rotation = Rotation.random(random_state=np.random.default_rng(2)).as_matrix()
    calculator, atoms = calculate(), salt()
    atoms.calc = calculator
    expected = [rotation @ x @ rotation.T for x in (atoms.get_stress(voigt=False), *atoms.get_stresses(voigt=False))]
    atoms.set_cell(atoms.cell.array @ rotation.T, scale_atoms=True)
    found = [atoms.get_stress(voigt=False), *atoms.get_stresses(voigt=False)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.ptp(np.linalg.eigvalsh(expected[0])) > 1e-4


def test_supercells_and_images_are_the_same_crystal(calculate: Maker) -> None:
    """Repeated, and with every atom moved by lattice vectors of its own."""
    atoms, calculator = salt(), calculate()
    energy, forces, energies, stress = answers(atoms, calculator)
    images = np.random.default_rng(3).integers(-3, 4, size=(len(atoms), 3))
    wrapped, repeated = atoms.copy(), atoms.repeat((2, 1, 2))
    wrapped.positions += images @ atoms.cell.array
    for other, count in ((wrapped, 1), (repeated, 4)):
        expected = [count * energy, np.tile(forces, (count, 1)), np.tile(energies, count), stress]
        for one, two in zip(answers(other, calculator), expected, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-10)


def test_far_fragments_add_up(calculate: Maker) -> None:
    calculator = calculate()
    one, other = ase.build.molecule("CH3OH"), ase.build.molecule("H2O")
    for atoms in (one, other):
        atoms.set_cell([60.0, 30.0, 30.0])
        atoms.pbc = True
    other.positions += [30.0, 5.0, 5.0]
    parts = [answers(atoms, calculator) for atoms in (one, other)]
    energy, forces, energies, stress = answers(one + other, calculator)
    assert energy == pytest.approx(sum(x[0] for x in parts), abs=1e-11)
    np.testing.assert_allclose(forces, np.concatenate([x[1] for x in parts]), atol=1e-12)
    np.testing.assert_allclose(energies, np.concatenate([x[2] for x in parts]), atol=1e-12)
    np.testing.assert_allclose(stress, sum(x[3] for x in parts), atol=1e-15)
    assert np.abs(stress).max() > 1e-8


@pytest.mark.bad_input
def test_stress_where_there_is_none(calculate: Maker) -> None:
    molecule, direct = ase.build.molecule("H2O"), calculate(forces="direct")
    for name in ("stress", "stresses"):
        with pytest.raises(PropertyNotImplementedError, match="needs a cell with volume"):
            calculate().get_property(name, molecule)
        with pytest.raises(PropertyNotImplementedError, match="direct-force model has no stress"):
            direct.get_property(name, salt())
    assert not {"stresses", "virials"} & set(direct.implemented_properties)
    assert np.isfinite(direct.get_property("forces", salt())).all()


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
    graph = make_potential().graph_of(batch_of(atoms))
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

    assert stress_error_by_difference(evaluator(atoms.calc), atoms.copy()) < 1e-7
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


def forces_alone(make_potential: Make, atoms: Atoms) -> np.ndarray:
    copy = atoms.copy()
    copy.calc = EScAIPCalculator(make_potential())
    return copy.get_forces()


def test_structures_of_any_size_share_it_and_only_changes_are_evaluated(make_potential: Make) -> None:
    calculator = EScAIPCalculator(make_potential())
    calls, forward = [], calculator.potential.forward
    calculator.potential.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    structures = [ase.build.molecule(name) for name in ("H2O", "CH3OH", "NH3", "H2O")]
    structures += [copper((1, 1, 1)), copper((2, 1, 1)), Atoms("Cu")]
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
    atoms = copper((1, 1, 1))
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


def with_info(**info: Any) -> Atoms:
    atoms = ase.build.molecule("CH3OH")
    atoms.info.update(info)
    return atoms


@pytest.mark.parametrize("committee", [False, True])
def test_charge_and_spin_of_structures_that_state_none(make_potential: Make, committee: bool) -> None:
    known = [make_potential(seed, charge=True, spin=True) for seed in range(1 + committee)]
    make: Any = CommitteeCalculator if committee else lambda models, **options: EScAIPCalculator(*models, **options)
    ion, plain = make(known, charge=-1, spin=2), make(known)
    given, stated = with_info(), with_info(charge=-1, spin=2)
    for atoms in (given, stated):
        expected = plain.get_potential_energy(stated)
        assert ion.get_potential_energy(atoms) == expected
    assert plain.get_potential_energy(given) != expected
    assert given.info == {}
    given.calc = ion
    frame = freeze(given)
    assert (frame.info["charge"], frame.info["spin_multiplicity"]) == (-1, 2)
    assert ion.todict()["charge"] == -1
    if not committee:
        np.testing.assert_allclose(ion.get_hessian(given), plain.get_hessian(stated), atol=1e-9)


@pytest.mark.bad_input
def test_charges_that_are_contradicted_or_not_known_are_refused(make_potential: Make) -> None:
    knows, blind = make_potential(charge=True, spin=True), make_potential()
    with pytest.raises(DataError, match="its info states charge 0, the calculator 1"):
        EScAIPCalculator(knows, charge=1).get_potential_energy(with_info(charge=0))
    with pytest.raises(DataError, match="its info states spin_multiplicity 1, the calculator 3"):
        EScAIPCalculator(knows, spin=3).get_potential_energy(with_info(spin=1))
    for calculator in (EScAIPCalculator(blind), CommitteeCalculator([knows, blind])):
        with pytest.raises(DataError, match="total charge is -1, which this model does not know"):
            calculator.get_potential_energy(with_info(charge=-1))
    neutral = EScAIPCalculator(blind, charge=0)
    assert neutral.get_potential_energy(with_info(charge=0, spin=3)) == neutral.get_potential_energy(with_info())
    for options in ({"charge": 1}, {"spin": 2}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} is ., which this model does not know"):
            EScAIPCalculator(blind, **options)


@pytest.mark.parametrize("committee", [False, True])
def test_charges_of_atoms_that_sum_to_another_charge_are_a_warning(make_potential: Make, committee: bool) -> None:
    members = [make_potential(seed, charge=True) for seed in range(2)]
    calculator = CommitteeCalculator(members) if committee else EScAIPCalculator(members[0])
    atoms = with_info()
    for charges in ([0.0] * 6, [-0.6, 0.1, 0.1, 0.1, 0.1, 0.2]):
        atoms.set_initial_charges(charges)
        calculator.get_potential_energy(atoms)
    atoms.set_initial_charges([1.0, 0, 0, 0, 0, 0])
    with pytest.warns(UserWarning, match="COH4: initial_charges sum to 1, but the total charge is 0"):
        calculator.get_potential_energy(atoms.copy())
    calculator.get_potential_energy(ase.build.molecule("H2O"))
    calculator.get_potential_energy(atoms)  # warned once
    other = EScAIPCalculator(members[0])
    atoms.info["charge"] = 1
    other.get_potential_energy(atoms)
    del atoms.info["charge"]
    EScAIPCalculator(make_potential()).get_potential_energy(atoms)


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
