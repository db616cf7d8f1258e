"""Chunks, recomputation and spline tables do not change results."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from typing import Any

import ase.build
import pytest
import tiny
import torch
from tiny import SMALL, TABLE, batch_of
from torch import Tensor
from torch_geometric.data import Batch

import escaip.potential.derivatives
from escaip.graph import TokenChunks, build_graph, compute_geometry
from escaip.models import EScAIPConfig
from escaip.nn.embedding import kept_tables
from escaip.potential import Potential
from escaip.types import Tokens


def make_potential(**overrides: object) -> Potential:
    return tiny.make_potential(**{"num_layers": 2, **TABLE, "distance_knots": 192, **overrides})


def make_batch() -> Batch:
    crystal = ase.build.bulk("Cu", cubic=True).repeat((2, 1, 1))
    structures = [crystal, ase.build.molecule("C6H6"), ase.Atoms("He")]
    for atoms in structures:
        atoms.rattle(0.05, seed=0)
    batch = batch_of(*structures)
    batch.dataset = torch.tensor([0, 1, 0])  # for models with a head for each
    return batch


def answers(potential: Potential, batch: Batch) -> list[Tensor]:
    """Energy, forces and stress, and in training the gradients of a loss on them."""
    stress = potential.config.is_conservative
    prediction = potential(batch, compute_stress=stress)
    found = [prediction.energy, prediction.forces]
    if stress:
        found.append(prediction.stress[:1])
    if potential.training:
        loss = sum(x.square().sum() for x in found)
        weights = [w for w in potential.parameters() if w.requires_grad]
        found += [g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]
    return [x.detach() for x in found]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"forces": "direct"},
        {"aggregation": "graph_attention", "charge": True},
        {"forces": "direct", "num_energy_heads": 2},
    ],
)
@pytest.mark.parametrize("max_tokens", [1, 40])
@torch.no_grad()  # with gradients for the weights of direct forces there are no parts
def test_parts_do_not_change_predictions(
    options: dict[str, object], max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    potential, batch = make_potential(**options).eval(), make_batch()
    monkeypatch.setattr(escaip.potential.derivatives, "_CHUNK", None)
    expected = answers(potential, batch)
    monkeypatch.setattr(escaip.potential.derivatives, "_CHUNK", max_tokens)
    for recompute in (None, True):
        potential.recompute = recompute
        assert_equal(answers(potential, batch), expected)


@pytest.mark.parametrize("options", [{}, {"forces": "direct"}, {"num_energy_heads": 2}])
def test_recomputation_does_not_change_training(options: dict[str, object]) -> None:
    potential, batch = make_potential(**options).train(), make_batch()
    expected = answers(potential, batch)
    potential.recompute = True
    assert_equal(answers(potential, batch), expected)


class Held:
    """Counts the bytes that autograd holds at a time: each storage once, as long as one saved tensor uses it."""

    def __init__(self) -> None:
        self.uses: Counter[int] = Counter()
        self.now = self.most = 0

    def keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        self.uses[address] += 1
        self.now += size if self.uses[address] == 1 else 0
        self.most = max(self.most, self.now)
        kept = x.detach()
        weakref.finalize(kept, self.drop, address, size)
        return kept

    def drop(self, address: int, size: int) -> None:
        self.uses[address] -= 1
        self.now -= size if self.uses[address] == 0 else 0


def kept_for(potential: Potential, monkeypatch: pytest.MonkeyPatch, most_kept: int | None) -> int:
    """The most bytes that autograd holds at a time, counted by the hooks that see every saved tensor."""
    held = Held()
    with monkeypatch.context() as patch:
        patch.setattr(escaip.potential.derivatives, "_CHUNK", 40)
        if most_kept is not None:
            patch.setattr(escaip.potential.derivatives, "_MOST_KEPT", (most_kept, most_kept))
        with torch.autograd.graph.saved_tensors_hooks(held.keep, lambda x: x):
            potential(make_batch())
    return held.most


def test_what_does_not_fit_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more: the time of large predictions grows with the share that does not fit."""
    potential, batch = make_potential().eval(), make_batch()
    num_tokens = potential.graph_of(batch).num_tokens
    bytes_kept = 4 * num_tokens * potential.config.kept_per_token
    nothing, half, everything = (kept_for(potential, monkeypatch, n) for n in (0, bytes_kept // 2, bytes_kept))
    assert everything == kept_for(potential, monkeypatch, None)
    assert nothing + 0.25 * (everything - nothing) < half < nothing + 0.75 * (everything - nothing)
    expected = answers(potential, batch)
    monkeypatch.setattr(escaip.potential.derivatives, "_MOST_KEPT", (bytes_kept // 2,) * 2)
    assert_equal(answers(potential, batch), expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_share_computed_again_is_spread_evenly(share: float) -> None:
    calls: list[int] = []
    x = torch.ones((), requires_grad=True)
    chunks = chunks_of(make_batch(), 1, share)

    def function(chunk: Tokens) -> Tensor:
        calls.append(chunk.first)
        return x * x

    torch.stack(chunks.map(function)).sum().backward()
    count = len(chunks.chunks)
    again = calls[count:]
    assert calls[:count] == [chunk.first for chunk in chunks.chunks] == list(range(count))
    for start in range(0, count - 10, 10):
        assert abs(sum(start <= i < start + 10 for i in again) - 10 * share) <= 1


def test_a_prediction_keeps_nothing_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that could learn and weights that cannot are the same to it, and what could learn still can."""
    potential = make_potential().eval()
    frozen = make_potential().eval().requires_grad_(False)
    assert kept_for(potential, monkeypatch, None) == kept_for(frozen, monkeypatch, None)
    assert all(weight.requires_grad for weight in potential.parameters())
    potential.model.energy_head.requires_grad_(False)
    found = potential(make_batch())
    assert not any(x.requires_grad for x in (found.energy, found.atomic_energies, found.forces))
    assert not any(weight.requires_grad for weight in potential.model.energy_head.parameters())
    with pytest.raises(RuntimeError, match="broken"), escaip.potential.derivatives.frozen(potential.model):
        raise RuntimeError("broken")
    assert sum(weight.requires_grad for weight in potential.parameters()) > 10


def chunks_of(batch: Any, max_tokens: int | None, recompute: float = 0.0) -> TokenChunks:
    settings = EScAIPConfig.from_dict(SMALL).graph
    graph = build_graph(batch, settings)
    geometry = compute_geometry(batch.positions, batch.cell, batch.batch, graph, settings, torch.float64)
    return TokenChunks(graph, geometry, max_tokens, recompute)


def test_chunks_are_whole_neighborhoods_in_order() -> None:
    batch = make_batch()
    (whole,) = chunks_of(batch, None).chunks
    for max_tokens in (1, 20, 10_000):
        chunks = chunks_of(batch, max_tokens).chunks
        assert [chunk.first for chunk in chunks] == [0, *torch.tensor([x.num_atoms for x in chunks]).cumsum(0)[:-1]]
        assert torch.equal(torch.cat([chunk.offsets.diff() for chunk in chunks]), whole.offsets.diff())
        for name in ("center", "neighbor", "distance", "direction", "log_envelope"):
            assert torch.equal(torch.cat([getattr(chunk, name) for chunk in chunks]), getattr(whole, name))
        for chunk in chunks:
            assert chunk.offsets[0] == 0
            assert torch.equal(chunk.neighbor[chunk.self_token], chunk.center[chunk.self_token])
            assert len(chunk.center) <= max_tokens or chunk.num_atoms == 1
    assert len(chunks_of(batch, 20).chunks) > 3


@pytest.mark.parametrize("kind", ["always", "inference"])
def test_a_table_gives_the_exact_answers_within_its_bound(kind: str) -> None:
    """Spacing a seventeenth of a Gaussian's width; docs/howto/speed.md states the bound."""
    exact, tabulated = make_potential(distance_table="never").eval(), make_potential(distance_table=kind).eval()
    batch = make_batch()
    for found, expected in zip(answers(tabulated, batch), answers(exact, batch), strict=True):
        scale = expected.abs().max()
        assert (found - expected).abs().max() < 2e-6 * scale
        assert (found - expected).abs().max() > 0.0
    if kind == "inference":  # in training the weights are read themselves
        assert_equal(answers(tabulated.train(), batch), answers(exact.train(), batch))


@pytest.mark.parametrize("change", ["in place", "assigned", "loaded", "moved"])
def test_kept_tables_follow_the_weights(change: str) -> None:
    potential, batch = make_potential().eval(), make_batch()
    before = answers(potential, batch)
    weight = potential.model.blocks[0].attributes.distance_project.weight
    with torch.no_grad():
        if change == "in place":
            weight.mul_(2.0)
        elif change == "assigned":
            weight.data = 2.0 * weight
        elif change == "loaded":
            state = copy.deepcopy(potential.state_dict())
            state["model.blocks.0.attributes.distance_project.weight"] *= 2.0
            potential.load_state_dict(state, assign=True)
        else:
            potential.float()
    found = answers(potential, batch)
    fresh = make_potential().to(potential.dtype).eval()
    fresh.load_state_dict(potential.state_dict())
    assert_equal(found, answers(fresh, batch))
    if change != "moved":
        assert (found[0] - before[0]).abs().max() > 1e-6


def test_tables_are_made_once_for_fixed_weights() -> None:
    potential, batch = make_potential().eval(), make_batch()
    potential(batch)
    tables = kept_tables(potential.model)
    assert len(tables) == 3  # the input layer's and two blocks'
    potential(batch)
    assert all(x is y for x, y in zip(kept_tables(potential.model), tables, strict=True))
    potential.train()(batch).energy.sum().backward()
    assert potential.model.attributes.distance_embedding.weight.grad is not None
