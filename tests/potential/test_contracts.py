"""The physics of a conservative EScAIP with random weights, in float64."""

from __future__ import annotations

from functools import partial

import ase.build
import numpy as np
import pytest
import tiny
import torch
from ase import Atoms

from escaip.graph import build_graph
from escaip.potential import Potential
from escaip.testing import check_potential, continuity_error, evaluator, rotation_errors

make_potential = partial(tiny.make_potential, num_layers=2)


def structures() -> list[Atoms]:
    molecule = ase.build.molecule("CH3CH2OH")
    primitive = ase.build.bulk("Cu", "fcc", a=3.6)  # one atom; the cell is much smaller than the cutoff
    slab = ase.build.fcc111("Al", (2, 2, 2), vacuum=5.0)
    slab.rattle(0.05, seed=2)
    skewed = Atoms("Si2", positions=[[0, 0, 0], [1.3, 1.2, 1.5]], cell=[[3, 0, 0], [2.5, 3, 0], [1, 1, 3.2]], pbc=True)
    rod = Atoms("C2", positions=[[0, 0, 0], [0.1, 1.3, 0.2]], cell=[[2.6, 0.4, 0], [0, 0, 0], [0, 0, 0]],
                pbc=[True, False, False])  # fmt: skip
    return [molecule, tiny.crystal(), primitive, slab, skewed, rod]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"angular_channels": None, "message_gate": True, "norm": "layernorm", "activation": "silu"},
        {"num_neighbors": None, "aggregation": "graph_attention"},
        {"rank_step": "bump", "attention_scale": "expanded", "charge": True, "spin": True},
    ],
)
def test_contracts_hold_in_float64(overrides: dict[str, object]) -> None:
    check_potential(make_potential(**overrides), structures())


def test_direct_forces_are_not_equivariant_and_it_is_measured() -> None:
    """The published direct head; its energy is invariant all the same."""
    evaluate = evaluator(make_potential(forces="direct"))
    energy_error, force_error = rotation_errors(evaluate, structures()[0], np.random.default_rng(0))
    assert energy_error < 1e-10
    assert force_error > 1e-4


def one_atom_path(atoms: Atoms, index: int, step: float, count: int, start: float = 0.0) -> list[Atoms]:
    direction = np.array([0.6, 0.64, 0.48])
    path = []
    for number in range(count):
        moved = atoms.copy()
        moved.positions[index] += (start + number * step) * direction
        path.append(moved)
    return path


def token_sets(potential: Potential, path: list[Atoms]) -> list[set[tuple[int, ...]]]:
    sets = []
    for atoms in path:
        graph = build_graph(tiny.batch_of(atoms), potential.config.graph)
        rows = torch.cat(
            [graph.token_center[:, None], graph.token_neighbor[:, None], graph.shift[: graph.num_tokens]], 1
        )
        sets.append({tuple(row) for row in rows.tolist()})
    return sets


@pytest.fixture(scope="module")
def crossings() -> tuple[Atoms, list[float]]:
    """A crystal and the displacements of one atom at which its neighbor lists change."""
    atoms = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True).repeat((2, 2, 1))
    atoms.rattle(0.15, seed=4)
    path = one_atom_path(atoms, 3, 0.005, 60)
    sets = token_sets(make_potential(), path)
    changes = [number * 0.005 for number in range(len(path) - 1) if sets[number] != sets[number + 1]]
    assert len(changes) >= 3
    return atoms, changes


def test_energy_and_forces_are_continuous_where_neighbors_come_and_go(crossings: tuple[Atoms, list[float]]) -> None:
    atoms, changes = crossings
    potential = make_potential()
    for start in changes[:3]:
        # 500 steps of 1e-5 Å cover the 0.005 Å in which a token enters or leaves, in five pieces that overlap.
        path = one_atom_path(atoms, 3, 1e-5, 504, start - 1e-5)
        sets = token_sets(potential, path[::100])
        assert sets[0] != sets[-1]
        energy_jump, force_jump = continuity_error(evaluator(potential), path)
        assert energy_jump < 1e-7
        assert force_jump < 1e-7


def test_published_weights_make_the_energy_jump(crossings: tuple[Atoms, list[float]]) -> None:
    """What the smooth bond-orientational order repairs: the check above sees the published feature's jump."""
    atoms, changes = crossings
    path = one_atom_path(atoms, 3, 1e-5, 504, changes[0] - 1e-5)
    energy_jump, _ = continuity_error(evaluator(make_potential(boo_weighting="uniform")), path)
    assert energy_jump > 1e-6


def test_isolated_atoms_have_finite_energy_and_no_force() -> None:
    lone = Atoms("He", positions=[[3.0, 1.0, 2.0]])
    far = Atoms("HeNe", positions=[[0, 0, 0], [30.0, 0, 0]])
    alone, apart = evaluator(make_potential())([lone, far])
    assert np.isfinite(alone.energy)
    assert (alone.forces == 0).all()
    assert (apart.forces == 0).all()
    assert apart.energy == pytest.approx(
        alone.energy + evaluator(make_potential())([Atoms("Ne", positions=[[0, 0, 0]])])[0].energy, abs=1e-12
    )
