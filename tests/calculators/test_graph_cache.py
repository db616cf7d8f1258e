"""A graph kept while atoms move: the same answers, and no waiting for the device between rebuilds."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from torch.utils._python_dispatch import TorchDispatchMode

from escaip import EScAIPCalculator
from escaip.data import AtomicData, collate
from escaip.errors import ConfigError
from escaip.graph import displacements, prune_graph, tokens
from escaip.potential import Potential
from escaip.types import Graph, Tokens

Make = Callable[..., Potential]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"forces": "direct"},
    {"num_neighbors": None, "cutoff": 3.0},
    {"aggregation": "graph_attention", "message_gate": True},
    {"rank_step": "bump", "norm": "layernorm"},
    {"distance_table": "always", "distance_knots": 256},
]


def crystal() -> Atoms:
    atoms = ase.build.bulk("Cu", cubic=True).repeat((2, 2, 1))
    atoms.rattle(0.1, seed=0)
    return atoms


def properties(atoms: Atoms, calculator: EScAIPCalculator) -> list[np.ndarray]:
    atoms.calc = calculator
    found = [np.array(atoms.get_potential_energy()), atoms.get_forces(), atoms.get_potential_energies()]
    return found + ([atoms.get_stress()] if "stress" in calculator.implemented_properties else [])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(map(str, o.values())) or "default")
def test_it_gives_the_answers_of_fresh_graphs(make_potential: Make, options: dict[str, Any]) -> None:
    potential = make_potential(**options)
    kept, fresh = EScAIPCalculator(potential, graph_skin=0.4), EScAIPCalculator(potential)
    rng = np.random.default_rng(1)
    atoms = crystal()
    for step in range(20):
        atoms.positions += rng.normal(scale=0.015, size=atoms.positions.shape)
        if step % 4 == 3:
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(scale=0.002, size=(3, 3))), scale_atoms=True)
        for one, other in zip(properties(atoms, kept), properties(atoms, fresh), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)
    assert 2 <= kept.num_graph_builds <= 10
    assert fresh.num_graph_builds == 20


def test_beyond_the_cutoff_a_table_stays_what_it_is_at_the_cutoff(make_potential: Make) -> None:
    """A polynomial far from its interval can overflow, and zero times infinity is not zero."""
    model = make_potential(distance_table="always", distance_knots=2048).model
    distance, none = torch.tensor([4.0, 4.5, 6.0], dtype=torch.float64), torch.empty(0)
    embedding = model.attributes.distance
    at, *beyond = embedding.function()(embedding.encode(Tokens(0, none, none, none, none, distance, none, none)))
    assert at.abs().max() > 0
    for values in beyond:
        assert torch.equal(values, at)


def test_it_is_made_again_exactly_when_it_must(make_potential: Make) -> None:
    calculator = EScAIPCalculator(make_potential(), graph_skin=0.4)
    atoms = crystal()
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


def test_energy_is_conserved_across_rebuilds(make_potential: Make) -> None:
    totals = {}
    for skin in (0.0, 0.3):
        atoms = crystal()
        calculator = EScAIPCalculator(make_potential(), graph_skin=skin)
        atoms.calc = calculator
        rng = np.random.default_rng(0)
        atoms.set_velocities(rng.normal(scale=0.05, size=atoms.positions.shape))
        dynamics, found = VelocityVerlet(atoms, 1.0 * units.fs), []
        for _ in range(60):
            dynamics.run(1)
            found.append(atoms.get_total_energy())
        totals[skin] = np.array(found)
    np.testing.assert_allclose(totals[0.3], totals[0.0], atol=1e-8)
    assert calculator.num_graph_builds > 2


class Waits(TorchDispatchMode):
    """Counts operations whose result the host must wait for, if they run on a device."""

    NAMES = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "equal", "bincount", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        indices = args[1] if name in ("index", "index_put_") else []
        if name in self.NAMES or any(x is not None and x.dtype == torch.bool for x in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_between_rebuilds_nothing_waits_for_the_device(
    make_potential: Make, forces: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The potential's part of a step; the calculator decides on the host and copies results once."""
    monkeypatch.setattr("escaip.graph.tokens.has_kernels", lambda systems: False)  # as on a device
    potential = make_potential(forces=forces)
    calculator = EScAIPCalculator(potential, graph_skin=0.5)
    atoms = crystal()
    atoms.calc = calculator
    atoms.get_forces()
    batch, graph = calculator._batch, calculator._graph._kept[0]
    monkeypatch.setattr("escaip.graph.tokens.has_kernels", lambda _: False)  # as on a device
    with Waits() as waits, torch.no_grad():
        potential(batch, compute_stress=forces == "conservative", create_graph=False)
    assert len(waits.found) > 10  # the counter counts
    with Waits() as waits, torch.no_grad():
        potential(batch, graph=graph, compute_stress=forces == "conservative", create_graph=False)
    assert waits.found == []


def test_the_calculator_leaves_out_what_does_not_count(make_potential: Make) -> None:
    """Fewer tokens reach the potential."""
    atoms = crystal()
    calculator = EScAIPCalculator(make_potential(), graph_skin=0.4)
    seen: list[Graph] = []
    forward = calculator.potential.forward
    calculator.potential.forward = lambda *a, **k: (seen.append(k["graph"]), forward(*a, **k))[1]  # type: ignore[method-assign]
    atoms.calc = calculator
    atoms.get_forces()
    kept = calculator._graph._kept
    assert kept is not None
    assert seen[0].num_tokens < 0.9 * kept[0].num_tokens


def test_to_leave_them_out_the_device_is_asked_once(make_potential: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sizes, by ``tolist``, which is not dispatched."""
    monkeypatch.setattr("escaip.graph.tokens._places", tokens._scattered)  # as on a device
    potential = make_potential()
    batch = collate([AtomicData.from_ase(crystal())])
    graph = potential.graph_of(batch, graph_skin=0.4)
    vectors = displacements(batch.positions, batch.cell, batch.batch, graph)
    with Waits() as waits:
        prune_graph(graph, vectors, potential.config.graph)
    assert waits.found == []


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options", [{"boo_weighting": "uniform"}, {"soft": False}, {"forces": "direct", "force_weighting": "uniform"}]
)
def test_models_whose_neighbors_jump_refuse(make_potential: Make, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leave graph_skin out"):
        EScAIPCalculator(make_potential(**options), graph_skin=0.2)
    with pytest.raises(ConfigError, match="graph_skin is -1"):
        EScAIPCalculator(make_potential(), graph_skin=-1.0)
