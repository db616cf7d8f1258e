"""Contracts of every calculator: physics, and that what is kept between calls never shows in an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from scipy.spatial.transform import Rotation

from escaip import EScAIPCalculator, Potential
from escaip.calculators import CommitteeCalculator
from escaip.testing import check_potential, continuity_error, evaluator

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


@pytest.fixture(params=KINDS)
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
    molecule, crystal, calculator = ase.build.molecule("H2O"), salt(), calculate(forces="direct")
    for name in ("stress", "stresses"):
        with pytest.raises(PropertyNotImplementedError, match="needs a cell with volume"):
            calculate().get_property(name, molecule)
        with pytest.raises(PropertyNotImplementedError, match="direct-force model has no stress"):
            calculator.get_property(name, crystal)
    assert not {"stresses", "virials"} & set(calculator.implemented_properties)
    assert np.isfinite(calculator.get_property("forces", crystal)).all()
