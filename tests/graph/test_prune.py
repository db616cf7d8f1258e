"""A pruned graph gives the answers of a graph that is built at the present positions."""

from __future__ import annotations

from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms

from escaip.data import AtomicData, collate
from escaip.graph import build_graph, compute_geometry, displacements, prune_graph
from escaip.types import Graph, GraphSettings

SETTINGS = [
    GraphSettings(cutoff=4.0, num_neighbors=10), GraphSettings(cutoff=4.5, num_neighbors=14, rank_step="bump"),
    GraphSettings(cutoff=3.5, num_neighbors=None),
]  # fmt: skip


def moved_batch(seed: int) -> tuple[Any, Any]:
    """A crystal and a molecule, and both with every atom moved by at most 0.12 Å and strained a little."""
    structures = [ase.build.bulk("Cu", cubic=True).repeat((2, 2, 1)), ase.build.molecule("CH3CH2OH", vacuum=3.0)]
    rng = np.random.default_rng(seed)
    for atoms in structures:
        atoms.rattle(0.1, seed=seed)
    before = collate([AtomicData.from_ase(atoms) for atoms in structures])
    for atoms in structures:
        atoms.positions += rng.uniform(-0.07, 0.07, atoms.positions.shape)
    return before, collate([AtomicData.from_ase(atoms) for atoms in structures])


def as_dictionary(batch: Any, graph: Graph, settings: GraphSettings) -> dict[tuple[int, ...], list[float]]:
    """By edge and image: distance, direction and envelope of the tokens that count."""
    geometry = compute_geometry(batch.positions, batch.cell, batch.batch, graph, settings, torch.float64)
    edges = torch.cat([graph.token_center[:, None], graph.token_neighbor[:, None], graph.shift[: graph.num_tokens]], 1)
    numbers = torch.cat([geometry.distance[:, None], geometry.direction, geometry.log_envelope[:, None].exp()], 1)
    counts = geometry.log_envelope.exp() > 1e-30
    return {tuple(e): n for e, n in zip(edges[counts].tolist(), numbers[counts].tolist(), strict=True)}


@pytest.mark.parametrize("settings", SETTINGS, ids=["sine", "bump", "radius"])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_graph_of_the_present_positions(settings: GraphSettings, seed: int) -> None:
    before, now = moved_batch(seed)
    loose = build_graph(before, settings, graph_skin=0.5)
    pruned = prune_graph(loose, displacements(now.positions, now.cell, now.batch, loose), settings)
    fresh = build_graph(now, settings)
    assert fresh.num_tokens <= pruned.num_tokens < loose.num_tokens
    assert pruned.num_tokens < 1.02 * fresh.num_tokens + 4
    assert len(pruned.rank_token) < 1.05 * len(fresh.rank_token) + 20
    found, expected = (as_dictionary(now, graph, settings) for graph in (pruned, fresh))
    assert found.keys() == expected.keys()
    for edge, numbers in expected.items():
        assert found[edge] == pytest.approx(numbers, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_its_layout_is_one(seed: int) -> None:
    """Everything that a graph promises (see ``Graph``)."""
    before, now = moved_batch(seed)
    loose = build_graph(before, SETTINGS[0], graph_skin=0.5)
    graph = prune_graph(loose, displacements(now.positions, now.cell, now.batch, loose), SETTINGS[0])
    token = torch.arange(graph.num_tokens)
    assert torch.equal(graph.reverse[graph.reverse], token)
    assert torch.equal(graph.token_center[graph.reverse], graph.token_neighbor)
    assert torch.equal(graph.shift[: graph.num_tokens][graph.reverse], -graph.shift[: graph.num_tokens])
    assert torch.equal(torch.repeat_interleave(graph.offsets.diff()), graph.token_center)
    assert torch.equal(graph.self_token, graph.offsets[:-1])
    assert torch.equal(graph.reverse[graph.self_token], graph.self_token)
    assert graph.max_neighborhood == int(graph.offsets.diff().max())
    assert int(graph.rank_token.max()) < graph.num_tokens
    assert int(graph.rank_other.max()) == len(graph.center) - 1  # no row that nothing asks for
    assert torch.equal(graph.center[graph.rank_token], graph.center[graph.rank_other])


def test_places_need_no_answer_of_a_device() -> None:
    """What a device does instead of ``nonzero``, on the CPU."""
    from escaip.graph import tokens

    for mask in ([True, False, True, True], [False, False], [True], []):
        values = torch.tensor(mask, dtype=torch.bool)
        expected = values.nonzero().squeeze(1)
        assert torch.equal(tokens._scattered(values, len(expected)), expected)


def test_nothing_at_all() -> None:
    """One atom, which sees nobody."""
    batch = collate([AtomicData.from_ase(Atoms("He", positions=[[0.0, 0.0, 0.0]]))])
    loose = build_graph(batch, SETTINGS[0], graph_skin=0.3)
    graph = prune_graph(loose, displacements(batch.positions, batch.cell, batch.batch, loose), SETTINGS[0])
    assert graph.num_tokens == graph.max_neighborhood == 1
