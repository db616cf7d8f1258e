"""Lists and graphs with a skin: those of every structure whose distances differ by no more, and kept no longer."""

from __future__ import annotations

import itertools
from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from graph_reference import KINDS, make_batch, random_system
from test_graph import SETTINGS, TRUNCATED, check_layout, edges_of, geometry_of
from tiny import batch_of

from escaip.errors import UsageError
from escaip.graph import build_graph, compute_geometry, displacements, neighbor_list, prune_graph, search_cutoff
from escaip.graph.skin import GraphCache, Snapshot, VerletList
from escaip.types import Graph, GraphSettings

FADING = [settings for settings in SETTINGS if settings.soft or settings.num_neighbors is None]
PRUNED = [
    GraphSettings(cutoff=4.0, num_neighbors=10), GraphSettings(cutoff=4.5, num_neighbors=14, rank_step="bump"),
    GraphSettings(cutoff=3.5, num_neighbors=None),
]  # fmt: skip


@pytest.mark.parametrize("settings", FADING)
@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_the_envelopes_of_a_fresh_build(settings: GraphSettings, kind: str) -> None:
    rng = np.random.default_rng(300 + KINDS.index(kind))
    for trial in range(4):
        system = random_system(rng, kind, settings.cutoff)
        skin = (0.1, 0.4)[trial % 2]
        batch = make_batch(system)
        graph = build_graph(batch, settings, graph_skin=skin)
        check_layout(graph)
        listed = neighbor_list(batch, search_cutoff(settings) + skin)
        assert edges_of(build_graph(batch, settings, listed, skin)) == edges_of(graph)
        for _ in range(3):
            step = torch.tensor(rng.normal(size=batch.positions.shape))
            step = step / step.norm(dim=1, keepdim=True) * (0.5 * skin)  # towards each other: as far as it holds
            moved = make_batch((batch.positions.numpy() + step.numpy(), *system[1:]))
            fresh = build_graph(moved, settings)
            expected = geometry_of(moved, fresh, settings).log_envelope.tolist()
            found = geometry_of(moved, graph, settings).log_envelope.tolist()
            kept = dict(zip(edges_of(graph, graph.num_tokens), found, strict=True))
            for edge, value in zip(edges_of(fresh, fresh.num_tokens), expected, strict=True):
                assert np.exp(kept.pop(edge)) == pytest.approx(np.exp(value), abs=1e-12)
            assert max(map(np.exp, kept.values()), default=0.0) < 1e-12  # the others count for nothing


def test_the_farthest_of_a_shell_may_become_the_nearest() -> None:
    """Each of the others may move away: none is surely nearer."""
    settings = GraphSettings(cutoff=4.0, num_neighbors=3, rank_scale=0.05)
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=3))) / np.sqrt(3.0)

    def star(radii: np.ndarray):
        return make_batch(
            (np.concatenate([np.zeros((1, 3)), corners * radii[:, None]]), np.zeros((3, 3)), np.zeros(3, bool))
        )

    radii = 3.0 + 0.06 * np.arange(8)
    assert (0, 8, 0, 0, 0) not in edges_of(build_graph(star(radii), settings))
    kept = build_graph(star(radii), settings, graph_skin=0.4)
    moved = star(radii + np.array([0.2] * 7 + [-0.2]))
    fresh = build_graph(moved, settings)
    place = edges_of(fresh, fresh.num_tokens).index((0, 8, 0, 0, 0))
    expected = geometry_of(moved, fresh, settings).log_envelope[place]
    found = geometry_of(moved, kept, settings).log_envelope[edges_of(kept, kept.num_tokens).index((0, 8, 0, 0, 0))]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "skin", "message"),
    [
        (GraphSettings(cutoff=4.0, num_neighbors=8), -0.1, "graph_skin is -0.1: it must be 0 or more"),
        (GraphSettings(cutoff=4.0, num_neighbors=8), float("nan"), "graph_skin is nan"),
        (GraphSettings(cutoff=4.0, num_neighbors=8, soft=False), 0.1, "hard ranks"),
        (GraphSettings(cutoff=4.0, num_neighbors=8, rank_truncation=20), 0.1, "truncated ranks"),
    ],
)
def test_skin_that_means_nothing(settings: GraphSettings, skin: float, message: str) -> None:
    batch = make_batch((np.zeros((1, 3)), np.zeros((3, 3)), np.zeros(3, bool)))
    with pytest.raises(UsageError, match=message):
        build_graph(batch, settings, graph_skin=skin)


def test_a_list_without_the_skin_is_refused() -> None:
    settings = GraphSettings(cutoff=4.0, num_neighbors=8)
    batch = make_batch((np.zeros((1, 3)), np.zeros((3, 3)), np.zeros(3, bool)))
    with pytest.raises(UsageError, match="but these settings need"):
        build_graph(batch, settings, neighbor_list(batch, search_cutoff(settings)), 0.2)


def copper() -> Atoms:
    return ase.build.bulk("Cu", cubic=True).repeat((2, 2, 2))


def test_a_list_is_reused_while_twice_the_largest_displacement_stays_below_the_skin() -> None:
    atoms, kept = copper(), VerletList(4.0, 0.6)
    assert kept.get(batch_of(atoms)) is kept.get(batch_of(atoms))
    atoms.positions[[0, 1]] += [[0.29, 0, 0], [-0.29, 0, 0]]  # two atoms come closer by 0.58 Å
    found = kept.get(batch_of(atoms))
    assert kept.num_builds == 1
    for name in ("center", "neighbor", "shift"):
        fresh, reused = (build_graph(batch_of(atoms), SETTINGS[4], x) for x in (None, found))
        assert torch.equal(getattr(fresh, name), getattr(reused, name))
    atoms.positions[[0, 1]] += [[0.02, 0, 0], [-0.02, 0, 0]]
    kept.get(batch_of(atoms))
    assert kept.num_builds == 2


def test_positions_that_are_changed_in_place_are_noticed() -> None:
    batch, kept = batch_of(copper()), VerletList(4.0, 0.6)
    kept.get(batch)
    batch.positions[0] += 1.0
    kept.get(batch)
    assert kept.num_builds == 2


@pytest.mark.parametrize("change", ["slab", "open"])
def test_another_cell_or_periodicity_is_another_structure(change: str) -> None:
    """A slab's cell may grow along its open axis alone, and an axis may cease to be periodic while no atom moves."""
    atoms, lists = copper(), VerletList(4.0, 0.6)
    graphs = GraphCache(lambda batch, pairs, skin: build_graph(batch, SETTINGS[4], pairs, skin), 3.5, 0.4)
    atoms.pbc = [True, True, change == "open"]

    def builds() -> tuple[int, int]:
        batch = batch_of(atoms)
        lists.get(batch)
        graphs.get(batch, Snapshot.of(batch), lambda: None)
        return lists.num_builds, graphs.num_builds

    assert builds() == builds() == (1, 1)
    if change == "slab":
        atoms.cell[0, 0] *= 1.001
    else:
        atoms.pbc[2] = False
    assert builds() == (2, 2)


@pytest.mark.parametrize("settings", [*SETTINGS, *TRUNCATED])
def test_list_with_skin_equals_fresh_build(settings: GraphSettings) -> None:
    rng = np.random.default_rng(8)
    systems = [random_system(rng, kind, settings.cutoff) for kind in KINDS]
    batch = make_batch(*systems)
    old = neighbor_list(batch, search_cutoff(settings) + 0.5)
    batch.positions = batch.positions + torch.tensor(rng.uniform(-0.14, 0.14, batch.positions.shape))
    fresh, reused = build_graph(batch, settings), build_graph(batch, settings, old)
    for name in ("offsets", "center", "neighbor", "shift", "reverse", "rank_base", "rank_token", "rank_other"):
        assert torch.equal(getattr(fresh, name), getattr(reused, name)), name


def moved_batch(seed: int) -> tuple[Any, Any]:
    """A crystal and a molecule, and both with every atom moved by at most 0.12 Å and strained a little."""
    structures = [ase.build.bulk("Cu", cubic=True).repeat((2, 2, 1)), ase.build.molecule("CH3CH2OH", vacuum=3.0)]
    rng = np.random.default_rng(seed)
    for atoms in structures:
        atoms.rattle(0.1, seed=seed)
    before = batch_of(*structures)
    for atoms in structures:
        atoms.positions += rng.uniform(-0.07, 0.07, atoms.positions.shape)
    return before, batch_of(*structures)


def as_dictionary(batch: Any, graph: Graph, settings: GraphSettings) -> dict[tuple[int, ...], list[float]]:
    """By edge and image: distance, direction and envelope of the tokens that count."""
    geometry = compute_geometry(batch.positions, batch.cell, batch.batch, graph, settings, torch.float64)
    edges = torch.cat([graph.token_center[:, None], graph.token_neighbor[:, None], graph.shift[: graph.num_tokens]], 1)
    numbers = torch.cat([geometry.distance[:, None], geometry.direction, geometry.log_envelope[:, None].exp()], 1)
    counts = geometry.log_envelope.exp() > 1e-30
    return {tuple(e): n for e, n in zip(edges[counts].tolist(), numbers[counts].tolist(), strict=True)}


@pytest.mark.parametrize("settings", PRUNED, ids=["sine", "bump", "radius"])
@pytest.mark.parametrize("seed", range(3))
def test_a_pruned_graph_is_that_of_the_present_positions(settings: GraphSettings, seed: int) -> None:
    before, now = moved_batch(seed)
    loose = build_graph(before, settings, graph_skin=0.5)
    pruned = prune_graph(loose, displacements(now.positions, now.cell, now.batch, loose), settings)
    check_layout(pruned)
    fresh = build_graph(now, settings)
    assert fresh.num_tokens <= pruned.num_tokens < loose.num_tokens
    assert pruned.num_tokens < 1.02 * fresh.num_tokens + 4
    assert len(pruned.rank_token) < 1.05 * len(fresh.rank_token) + 20
    found, expected = (as_dictionary(now, graph, settings) for graph in (pruned, fresh))
    assert found.keys() == expected.keys()
    for edge, numbers in expected.items():
        assert found[edge] == pytest.approx(numbers, rel=1e-10, abs=1e-12)


def test_pruning_one_atom_that_sees_nobody() -> None:
    batch = batch_of(Atoms("He"))
    loose = build_graph(batch, PRUNED[0], graph_skin=0.3)
    graph = prune_graph(loose, displacements(batch.positions, batch.cell, batch.batch, loose), PRUNED[0])
    assert graph.num_tokens == graph.max_neighborhood == 1
