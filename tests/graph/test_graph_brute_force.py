"""The graph equals a dense evaluation of its definition on small systems of every kind."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from graph_reference import KINDS, Edge, all_edges, envelope_coordinates, make_batch, random_system

from escaip import EScAIPConfig
from escaip.errors import ConfigError, DataError
from escaip.graph import build_graph, compute_geometry, neighbor_list
from escaip.types import Geometry, Graph, GraphSettings

SETTINGS = (
    GraphSettings(cutoff=4.0, num_neighbors=8, rank_scale=0.2),
    GraphSettings(cutoff=4.0, num_neighbors=20, rank_scale=0.5, envelope_scale=0.05),
    GraphSettings(cutoff=3.5, num_neighbors=6, rank_scale=0.2, rank_step="bump"),
    GraphSettings(cutoff=4.0, num_neighbors=10, soft=False),
    GraphSettings(cutoff=3.5, num_neighbors=None),
)
# Steps so wide, and lists so short, that ranks hear of the truncation, as in published models.
TRUNCATED = (
    GraphSettings(cutoff=4.0, num_neighbors=6, rank_scale=0.6, rank_truncation=3),
    GraphSettings(cutoff=4.0, num_neighbors=10, rank_scale=0.8, envelope_scale=0.05, rank_truncation=0),
    GraphSettings(cutoff=3.5, num_neighbors=8, rank_scale=0.4, rank_step="bump", rank_truncation=2),
)


def edges_of(graph: Graph, count: int | None = None) -> list[Edge]:
    rows = torch.cat([graph.center[:, None], graph.neighbor[:, None], graph.shift], dim=1)
    return [tuple(row) for row in rows[:count].tolist()]


def geometry_of(batch, graph: Graph, settings: GraphSettings, dtype=torch.float64) -> Geometry:
    return compute_geometry(batch.positions, batch.cell, batch.batch, graph, settings, dtype)


def check_layout(graph: Graph) -> None:
    """What the docstring of Graph promises."""
    tokens, atoms = graph.num_tokens, torch.arange(graph.num_atoms)
    assert torch.equal(graph.self_token, graph.offsets[:-1])
    assert int(graph.offsets[0]) == 0
    assert int(graph.offsets[-1]) == tokens
    lengths = graph.offsets.diff()
    assert torch.equal(graph.token_center, torch.repeat_interleave(atoms, lengths))
    assert graph.max_neighborhood == int(lengths.max())
    assert torch.equal(graph.neighbor[graph.self_token], atoms)
    assert not graph.shift[graph.self_token].any()
    index = torch.arange(tokens)
    assert torch.equal(graph.reverse[graph.reverse], index)
    assert torch.equal(graph.reverse[graph.self_token], graph.self_token)
    assert torch.equal(graph.token_center[graph.reverse], graph.token_neighbor)
    assert torch.equal(graph.shift[:tokens][graph.reverse], -graph.shift[:tokens])
    assert len(set(edges_of(graph))) == len(graph.center)
    assert not torch.isin(graph.rank_token, graph.self_token).any()
    assert torch.equal(graph.center[graph.rank_token], graph.center[graph.rank_other])
    unused = torch.ones(len(graph.center), dtype=torch.bool)
    unused[:tokens], unused[graph.rank_other] = False, False
    assert not unused.any()


@pytest.mark.parametrize("kind", KINDS)
def test_matches_dense_reference(kind: str) -> None:
    """Of every kind 20 systems and 12 with truncated ranks; tokens with x at 1 to rounding may go either way."""
    rng = np.random.default_rng(KINDS.index(kind))
    for settings in (*4 * SETTINGS, *4 * TRUNCATED):
        system = random_system(rng, kind, settings.cutoff)
        batch = make_batch(system)
        graph = build_graph(batch, settings)
        check_layout(graph)
        geometry = geometry_of(batch, graph, settings)
        found = dict(zip(edges_of(graph, graph.num_tokens), geometry.log_envelope.tolist(), strict=True))
        for atom in range(graph.num_atoms):
            assert found.pop((atom, atom, 0, 0, 0)) == 0.0
        expected, tied = envelope_coordinates(*system, settings)
        sure = {edge for edge, x in expected.items() if x < 1 - 1e-9} - tied
        possible = {edge for edge, x in expected.items() if x < 1 + 1e-9} | tied
        assert sure <= set(found) <= possible
        for edge in sure:
            x = expected[edge]
            assert found[edge] == pytest.approx(-(x**2) / (1 - x**2), rel=1e-9 / (1 - x))
        distance = geometry.distance.tolist()
        for atom, start in enumerate(graph.self_token.tolist()):
            run = distance[start : int(graph.offsets[atom + 1])]
            assert run == sorted(run) or np.diff(run).min() > -1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_neighbor_list_matches_dense_reference(kind: str) -> None:
    rng = np.random.default_rng(100 + KINDS.index(kind))
    for _ in range(10):
        system = random_system(rng, kind, 4.0)
        found = neighbor_list(make_batch(system), 4.0)
        rows = torch.cat([found.center[:, None], found.neighbor[:, None], found.shift], dim=1).tolist()
        assert len(rows) == len({tuple(row) for row in rows})
        expected = all_edges(*system, 4.0 + 1e-9)
        sure = {edge for edge, distance in expected.items() if distance < 4.0 - 1e-9}
        assert sure <= {tuple(row) for row in rows} <= set(expected)
        assert {(j, i, -a, -b, -c) for i, j, a, b, c in rows} == {tuple(row) for row in rows}
        assert found.center.tolist() == sorted(found.center.tolist())


@pytest.mark.parametrize("settings", SETTINGS)
def test_batch_equals_systems_alone(settings: GraphSettings) -> None:
    rng = np.random.default_rng(7)
    systems = [random_system(rng, kind, settings.cutoff) for kind in KINDS]
    together = make_batch(*systems)
    graph = build_graph(together, settings)
    check_layout(graph)
    envelope = geometry_of(together, graph, settings).log_envelope
    for index, system in enumerate(systems):
        alone = make_batch(system)
        small = build_graph(alone, settings)
        first = int(together.ptr[index])
        start, stop = int(graph.offsets[first]), int(graph.offsets[int(together.ptr[index + 1])])
        part = torch.cat([graph.center[:, None] - first, graph.neighbor[:, None] - first, graph.shift], 1)[start:stop]
        whole = edges_of(small, small.num_tokens)
        order = {tuple(row): place for place, row in enumerate(part.tolist())}
        assert set(order) == set(whole)
        index_of = torch.tensor([order[edge] for edge in whole])
        expected = geometry_of(alone, small, settings).log_envelope
        torch.testing.assert_close(envelope[start:stop][index_of].exp(), expected.exp(), rtol=0, atol=1e-12)


def test_truncation_matters_here_and_not_where_lists_are_short() -> None:
    """What the test above compares differs from exact ranks; a truncation beyond every list is exact."""
    rng = np.random.default_rng(5)
    system = random_system(rng, "cubic", 4.0)
    batch = make_batch(system)
    for settings in TRUNCATED:
        exact = dataclasses.replace(settings, rank_truncation=None)
        far = dataclasses.replace(settings, rank_truncation=10_000)
        values = [
            torch.sort(geometry_of(batch, build_graph(batch, item), item).log_envelope.exp()).values
            for item in (settings, exact, far)
        ]
        assert len(values[0]) != len(values[1]) or (values[0] - values[1]).abs().max() > 1e-3
        assert torch.equal(values[1], values[2])


@pytest.mark.bad_input
def test_truncations_that_mean_nothing() -> None:
    batch = make_batch(random_system(np.random.default_rng(0), "molecule", 4.0))
    with pytest.raises(ConfigError, match="rank_truncation is -1"):
        build_graph(batch, GraphSettings(rank_truncation=-1))
    for fields in ({"rank_truncation": -1}, {"soft": False}, {"num_neighbors": None}):
        with pytest.raises(ConfigError, match="rank_truncation"):
            EScAIPConfig(**{"rank_truncation": 20, **fields})


@pytest.mark.bad_input
def test_periodic_structures_of_a_model_without_periodicity() -> None:
    rng = np.random.default_rng(1)
    settings = GraphSettings(cutoff=4.0, num_neighbors=8, periodic=False)
    molecule, crystal = random_system(rng, "molecule", 4.0), random_system(rng, "mixed_pbc", 4.0)
    with pytest.raises(DataError, match="system 1 is periodic, but the model treats every structure as open"):
        build_graph(make_batch(molecule, crystal), settings)
    batch = make_batch(molecule)
    other = build_graph(batch, dataclasses.replace(settings, periodic=True))
    assert torch.equal(build_graph(batch, settings).center, other.center)
