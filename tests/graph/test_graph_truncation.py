"""Ranks among the nearest only, as published, against a dense evaluation; models that know no periodicity."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from graph_reference import KINDS, Edge, all_edges, make_batch, random_system, step
from test_graph_brute_force import check_layout, edges_of, geometry_of

from escaip import EScAIPConfig
from escaip.errors import ConfigError, DataError
from escaip.graph import build_graph
from escaip.types import GraphSettings

# Steps so wide, and lists so short, that ranks hear of the truncation.
SETTINGS = (
    GraphSettings(cutoff=4.0, num_neighbors=6, rank_scale=0.6, rank_truncation=3),
    GraphSettings(cutoff=4.0, num_neighbors=10, rank_scale=0.8, envelope_scale=0.05, rank_truncation=0),
    GraphSettings(cutoff=3.5, num_neighbors=8, rank_scale=0.4, rank_step="bump", rank_truncation=2),
)


def dense(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, settings: GraphSettings
) -> tuple[dict[Edge, float], set[Edge]]:
    """``x`` of every ranked edge, and the edges that are tied where a list is cut: any of them may be ranked."""
    edges = all_edges(positions, cell, pbc, settings.cutoff + 4.5 * settings.rank_scale)
    limit = settings.num_neighbors + settings.rank_truncation
    rank: dict[Edge, float] = {}
    tied: set[Edge] = set()
    for i in range(len(positions)):
        own = sorted((e for e in edges if e[0] == i), key=lambda e: edges[e])
        distance = np.array([0.0, *(edges[e] for e in own)])
        if len(distance) > limit and distance[limit] - distance[limit - 1] < 1e-9:
            tied |= {e for e in own if abs(edges[e] - distance[limit]) < 1e-9}
        kept = distance[:limit]
        values = step((kept[1:, None] - kept[None]) / settings.rank_scale, settings.rank_step).sum(1)
        rank.update(zip(own, values, strict=False))
    result = {}
    for (i, j, *shift), d in edges.items():
        here, back = (i, j, *shift), (j, i, *(-s for s in shift))
        if d < settings.cutoff and here in rank and back in rank:
            terms = np.array([rank[here], rank[back], d * settings.num_neighbors / settings.cutoff])
            terms /= settings.num_neighbors * settings.envelope_scale
            result[here] = settings.envelope_scale * np.logaddexp.reduce(terms)
    return result, tied | {(j, i, *(-s for s in shift)) for i, j, *shift in tied}


@pytest.mark.parametrize("kind", KINDS)
def test_matches_dense_reference(kind: str) -> None:
    rng = np.random.default_rng(200 + KINDS.index(kind))
    for trial in range(12):
        settings = SETTINGS[trial % len(SETTINGS)]
        system = random_system(rng, kind, settings.cutoff)
        batch = make_batch(system)
        graph = build_graph(batch, settings)
        check_layout(graph)
        values = geometry_of(batch, graph, settings).log_envelope.tolist()
        found = dict(zip(edges_of(graph, graph.num_tokens), values, strict=True))
        for atom in range(graph.num_atoms):
            assert found.pop((atom, atom, 0, 0, 0)) == 0.0
        expected, tied = dense(*system, settings)
        sure = {edge for edge, x in expected.items() if x < 1 - 1e-9} - tied
        possible = {edge for edge, x in expected.items() if x < 1 + 1e-9} | tied
        assert sure <= set(found) <= possible
        for edge in sure:
            x = expected[edge]
            assert found[edge] == pytest.approx(-(x**2) / (1 - x**2), rel=1e-9 / (1 - x))


def test_truncation_matters_here_and_not_where_lists_are_short() -> None:
    """What the test above compares differs from exact ranks; a truncation beyond every list is exact."""
    rng = np.random.default_rng(5)
    system = random_system(rng, "cubic", 4.0)
    batch = make_batch(system)
    for settings in SETTINGS:
        exact = dataclasses.replace(settings, rank_truncation=None)
        far = dataclasses.replace(settings, rank_truncation=10_000)
        values = [
            torch.sort(geometry_of(batch, build_graph(batch, item), item).log_envelope.exp()).values
            for item in (settings, exact, far)
        ]
        assert len(values[0]) != len(values[1]) or (values[0] - values[1]).abs().max() > 1e-3
        assert torch.equal(values[1], values[2])


@pytest.mark.bad_input
def test_settings_that_mean_nothing() -> None:
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
