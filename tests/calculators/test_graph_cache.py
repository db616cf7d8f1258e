"""A graph kept while atoms move: the same answers, and no waiting for the device between rebuilds."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from torch.utils._python_dispatch import TorchDispatchMode

from escaip import EScAIPCalculator
from escaip.errors import ConfigError
from escaip.potential import Potential

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


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options", [{"boo_weighting": "uniform"}, {"soft": False}, {"forces": "direct", "force_weighting": "uniform"}]
)
def test_models_whose_neighbors_jump_refuse(make_potential: Make, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leave graph_skin out"):
        EScAIPCalculator(make_potential(**options), graph_skin=0.2)
    with pytest.raises(ConfigError, match="graph_skin is -1"):
        EScAIPCalculator(make_potential(), graph_skin=-1.0)
