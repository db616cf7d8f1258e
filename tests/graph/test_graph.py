"""The graph against a dense evaluation of its definition, derivatives of its geometry, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from graph_reference import KINDS, Edge, all_edges, envelope_coordinates, make_batch, random_rotation, random_system

from escaip import EScAIPConfig
from escaip.errors import ConfigError, DataError, UsageError
from escaip.graph import build_graph, compute_geometry, neighbor_list, search_cutoff
from escaip.graph.geometry import rank_step, step_support
from escaip.graph.neighbors import Systems, find_pairs, search_nvalchemiops, search_pairs, search_vesin
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


INSTALLED = importlib.util.find_spec("nvalchemiops") is not None


def canonical(first: torch.Tensor, second: torch.Tensor, shift: torch.Tensor) -> set[tuple[int, ...]]:
    """Each pair as the smaller of its two directions; every pair must be there once."""
    rows = torch.cat([first[:, None], second[:, None], shift.to(torch.int64)], dim=1).tolist()
    pairs = {min((i, j, *s), (j, i, *(-x for x in s))) for i, j, *s in rows}
    assert len(pairs) == len(rows)
    return pairs


def arrays(*systems: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[torch.Tensor, ...]:
    s = Systems.read(make_batch(*systems))
    return s.positions, s.cell, s.pbc, s.index, s.ptr


@pytest.mark.skipif(not INSTALLED, reason="nvalchemiops is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_nvalchemiops_agrees_with_vesin(kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(10):
        batch = arrays(*(random_system(rng, kind, 4.0) for _ in range(3)))
        assert canonical(*search_nvalchemiops(*batch, 4.0)) == canonical(*search_vesin(*batch, 4.0))


def test_pairs_come_once_with_their_types() -> None:
    rng = np.random.default_rng(0)
    batch = arrays(*(random_system(rng, kind, 4.0) for kind in KINDS))
    first, second, shift = search_pairs(*batch, 4.0)
    assert len(canonical(first, second, shift)) > 100
    assert first.dtype == second.dtype == torch.int64
    assert shift.dtype == torch.int32
    assert torch.equal(batch[3][first], batch[3][second])


def test_two_atoms_whose_distance_ends_vesin() -> None:
    """Its cell list divides by zero there, so it is not asked about open structures of few atoms."""
    positions = np.array(
        [[2107.2154, -1318.7537, -1903.4989], [-3858.7256, -2016.9292, -1906.8478], [2107.0, -1317.0, -1904.0]]
    )
    batch = arrays((positions, np.zeros((3, 3)), np.zeros(3, bool)))
    assert canonical(*search_vesin(*batch, 3.5)) == {(0, 2, 0, 0, 0)}


GOOD = (np.array([[0.0, 0, 0], [1.0, 0, 0]]), np.eye(3) * 5.0, np.ones(3, bool))
EIGHT = GraphSettings(cutoff=4.0, num_neighbors=8)


def bad_cell(cell: list[list[float]], pbc: tuple[bool, ...] = (True, True, True)):
    return GOOD[0], np.array(cell, dtype=float), np.array(pbc)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "system",
    [
        bad_cell([[0, 0, 0]] * 3),
        bad_cell([[5, 0, 0], [0, 5, 0], [5, 5, 0]]),
        bad_cell([[5, 0, 0], [5, 0, 0], [0, 0, 0]], (True, True, False)),
        bad_cell([[0, 0, 0], [0, 5, 0], [0, 0, 5]], (True, False, False)),
        bad_cell([[np.nan, 0, 0], [0, 5, 0], [0, 0, 5]]),
    ],
)
def test_cell_without_volume(system) -> None:
    with pytest.raises(DataError, match=r"^system 1: its cell has no volume along its periodic axes: .*pbc") as error:
        build_graph(make_batch(GOOD, system, GOOD), EIGHT)
    assert "\n" not in str(error.value)


@pytest.mark.bad_input
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_position_that_is_no_number(value: float) -> None:
    positions = GOOD[0].copy()
    positions[1, 2] = value
    with pytest.raises(DataError, match=r"^system 1, atom 1: position is NaN or infinite"):
        neighbor_list(make_batch(GOOD, (positions, *GOOD[1:])), 4.0)


@pytest.mark.bad_input
def test_cell_in_wrong_units_does_not_hang() -> None:
    with pytest.raises(DataError, match=r"^system 0: its cell is so thin .* check the units"):
        neighbor_list(make_batch((GOOD[0], np.eye(3) * 1e-3, GOOD[2])), 4.0)


@pytest.mark.bad_input
@pytest.mark.parametrize("cutoff", [0.0, -1.0, np.nan, np.inf])
def test_cutoff_that_is_no_length(cutoff: float) -> None:
    with pytest.raises(UsageError, match=r"cutoff is .*: it must be a positive number of Å"):
        neighbor_list(make_batch(GOOD), cutoff)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutoff": 0.0}, "graph setting cutoff is 0.0: it must be a positive number"),
        ({"rank_scale": -0.2}, "graph setting rank_scale is -0.2"),
        ({"envelope_scale": float("nan")}, "graph setting envelope_scale is nan"),
        ({"num_neighbors": 0}, "num_neighbors is 0: it must be at least 1, or None"),
        ({"rank_step": "cosine"}, "rank_step 'cosine' does not exist: choose sine or bump"),
    ],
)
def test_settings_out_of_range(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_graph(make_batch(GOOD), dataclasses.replace(EIGHT, **change))


@pytest.mark.bad_input
def test_neighbor_list_that_is_too_short() -> None:
    batch = make_batch(GOOD)
    with pytest.raises(UsageError, match=r"reaches 4 Å but these settings need 4\.62832 Å: build it with"):
        build_graph(batch, EIGHT, neighbor_list(batch, 4.0))


@pytest.mark.bad_input
def test_neighbor_list_of_one_direction_only() -> None:
    batch = make_batch(GOOD)
    full = neighbor_list(batch, 5.0)
    half = full.center < full.neighbor
    halved = dataclasses.replace(full, center=full.center[half], neighbor=full.neighbor[half], shift=full.shift[half])
    with pytest.raises(DataError, match="some edge lacks its reverse"):
        build_graph(batch, EIGHT, halved)


def test_search_cutoff() -> None:
    assert search_cutoff(EIGHT) == pytest.approx(4.0 + 0.2 * np.pi)
    assert search_cutoff(dataclasses.replace(EIGHT, rank_step="bump")) == pytest.approx(4.8)
    assert search_cutoff(dataclasses.replace(EIGHT, soft=False)) == 4.0
    assert search_cutoff(dataclasses.replace(EIGHT, num_neighbors=None)) == 4.0


def test_a_pair_at_the_cutoff_is_in_both_lists_or_none() -> None:
    """Rounding must not keep one direction: many pairs at exactly the cutoff."""
    system = (np.zeros((1, 3)), np.array([[2.0, 0, 0], [1, 3**0.5, 0], [0.3, 0.1, 2.7]]), np.ones(3, bool))
    for cutoff in (2.0, 4.0, 2.0 * 3**0.5, 6.0):
        found = neighbor_list(make_batch(system), cutoff)
        assert {tuple(s) for s in found.shift.tolist()} == {tuple(s) for s in (-found.shift).tolist()}


def test_pairs_at_the_cutoff_are_decided_by_their_distance() -> None:
    """A cutoff one rounding above the distance of a pair finds it, one at that distance does not."""
    rng = np.random.default_rng(3)
    system = random_system(rng, "skewed_mixed", 4.0)
    batch = make_batch(system)
    pairs = find_pairs(Systems.read(batch), 4.0)
    assert len(pairs.distance) > 30
    for number, distance in enumerate(pairs.distance.sort().values[-30:].tolist()):
        below = len(pairs.distance) - 30 + number
        assert len(neighbor_list(batch, distance).center) == 2 * below
        assert len(neighbor_list(batch, float(np.nextafter(distance, 10.0))).center) == 2 * below + 2


def test_inputs_are_not_changed() -> None:
    batch = make_batch(GOOD, random_system(np.random.default_rng(1), "tiny", 4.0))
    old = neighbor_list(batch, 6.0)
    before = [x.clone() for x in (batch.positions, batch.cell, old.center, old.neighbor, old.shift)]
    build_graph(batch, EIGHT, old)
    for x, y in zip(before, (batch.positions, batch.cell, old.center, old.neighbor, old.shift), strict=True):
        assert torch.equal(x, y)


def test_no_gradient_is_recorded_or_needed() -> None:
    batch = make_batch(GOOD)
    batch.positions.requires_grad_()
    graph = build_graph(batch, EIGHT)
    assert not graph.rank_base.requires_grad


def test_no_systems_at_all() -> None:
    batch = make_batch(GOOD)
    batch.positions, batch.batch, batch.ptr = batch.positions[:0], batch.batch[:0], batch.ptr[:1]
    batch.cell, batch.pbc = batch.cell[:0], batch.pbc[:0]
    graph = build_graph(batch, EIGHT)
    assert graph.num_tokens == graph.num_atoms == graph.max_neighborhood == 0


SMALL = GraphSettings(cutoff=3.0, num_neighbors=4, rank_scale=0.3)


def weights_of(batch, settings: GraphSettings, dtype=torch.float64) -> dict[tuple[int, ...], float]:
    """exp(log envelope) of every token."""
    graph = build_graph(batch, settings)
    weights = geometry_of(batch, graph, settings, dtype).log_envelope.exp().tolist()
    return dict(zip(edges_of(graph, graph.num_tokens), weights, strict=True))


def compare(first: dict, second: dict, tolerance: float) -> None:
    for edge in first.keys() | second.keys():
        assert first.get(edge, 0.0) == pytest.approx(second.get(edge, 0.0), abs=tolerance), edge


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["skewed", "mixed_pbc", "tiny", "molecule", "single"])
def test_invariances(settings: GraphSettings, kind: str) -> None:
    rng = np.random.default_rng(3)
    positions, cell, pbc = random_system(rng, kind, settings.cutoff)
    weights = weights_of(make_batch((positions, cell, pbc)), settings)
    rotation = random_rotation(rng)
    moved = positions @ rotation + rng.normal(size=3) * 10
    compare(weights, weights_of(make_batch((moved, cell @ rotation, pbc)), settings), 1e-9)

    order = rng.permutation(len(positions))
    permuted = weights_of(make_batch((positions[order], cell, pbc)), settings)
    back = {(int(order[i]), int(order[j]), *shift): w for (i, j, *shift), w in permuted.items()}
    compare(weights, back, 1e-12)

    image = rng.integers(-3, 4, positions.shape) * pbc
    wrapped = weights_of(make_batch((positions + image @ cell, cell, pbc)), settings)
    back = {
        (i, j, *(int(x) for x in np.array(shift) + image[j] - image[i])): w for (i, j, *shift), w in wrapped.items()
    }
    compare(weights, back, 1e-10)


@pytest.mark.parametrize("settings", [SMALL, GraphSettings(cutoff=3.0, num_neighbors=4, rank_step="bump"), SETTINGS[4]])
@pytest.mark.parametrize("kind", ["skewed", "molecule", "unwrapped"])
def test_first_and_second_derivatives(settings: GraphSettings, kind: str) -> None:
    """gradcheck and gradgradcheck of displacement, distance, direction and weight in positions and cell."""
    rng = np.random.default_rng(5)
    positions, cell, pbc = random_system(rng, kind, settings.cutoff)
    batch = make_batch((positions[:4], cell, pbc), (positions[4:6] + 0.3, cell, pbc))
    graph = build_graph(batch, settings)
    if settings.rank_step == "sine" and settings.num_neighbors is not None:
        # The sine's second derivative jumps at the ends of its support: finite differences must not cross them.
        distance = torch.linalg.vector_norm(_vectors(batch, graph), dim=1)
        gap = (distance[graph.rank_token] - distance[graph.rank_other]).abs() / settings.rank_scale
        assert (gap - step_support("sine")).abs().min() > 1e-4
    assert graph.num_tokens > graph.num_atoms
    mix = torch.tensor(rng.normal(size=(graph.num_tokens, 8)))

    def function(positions: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        g = compute_geometry(positions, cell, batch.batch, graph, settings, torch.float64)
        columns = torch.cat([g.displacement, g.distance[:, None], g.direction, g.log_envelope.exp()[:, None]], dim=1)
        return (columns * mix).sum(dim=0)

    inputs = (batch.positions.clone().requires_grad_(), batch.cell.clone().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)
    assert torch.autograd.gradgradcheck(function, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


def _vectors(batch, graph) -> torch.Tensor:
    shift = graph.shift.to(torch.float64)
    image = torch.einsum("ta,tab->tb", shift, batch.cell[batch.batch[graph.center]])
    return batch.positions[graph.neighbor] - batch.positions[graph.center] + image


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS)
def test_no_nan_in_derivatives(settings: GraphSettings, dtype: torch.dtype) -> None:
    """Self tokens, coincident atoms, equal distances, tokens at x just below and above 1, few or no edges."""
    rng = np.random.default_rng(6)
    systems = [
        random_system(rng, kind, settings.cutoff) for kind in ("crystal", "tiny", "isolated", "single", "molecule")
    ]
    systems.append((np.zeros((2, 3)), np.zeros((3, 3)), np.zeros(3, bool)))
    batch = make_batch(*systems)
    graph = build_graph(batch, settings)
    positions, cell = batch.positions.requires_grad_(), batch.cell.requires_grad_()
    for stretch in (1.0, 1.02):  # stretched without a rebuild: some tokens leave
        g = compute_geometry(positions * stretch, cell * stretch, batch.batch, graph, settings, dtype)
        value = (g.log_envelope.exp() * (1 + g.direction.sum(1) + g.distance)).sum()
        first = torch.autograd.grad(value, (positions, cell), create_graph=True)
        second = torch.autograd.grad(sum((f * torch.ones_like(f).cumsum(0)).sum() for f in first), (positions, cell))
        for tensor in (g.displacement, g.distance, g.direction, *first, *second):
            assert torch.isfinite(tensor).all()
        assert not torch.isnan(g.log_envelope).any()
        for tensor in (g.log_envelope, g.distance, g.displacement, g.direction):
            assert tensor.dtype == dtype
            assert not tensor[graph.self_token].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_nan_at_the_very_edge(dtype: torch.dtype) -> None:
    """A token that has moved to ``x = 1`` exactly: no weight, no slope, no curvature."""
    settings = GraphSettings(cutoff=4.0, num_neighbors=None)
    batch = make_batch((np.array([[0.0, 0, 0], [2.0, 0, 0]]), np.zeros((3, 3)), np.zeros(3, bool)))
    graph = build_graph(batch, settings)
    positions = (2.0 * batch.positions).requires_grad_()
    g = compute_geometry(positions, batch.cell, batch.batch, graph, settings, dtype)
    assert g.log_envelope.tolist() == [0.0, -torch.inf, 0.0, -torch.inf]
    (first,) = torch.autograd.grad(g.log_envelope.exp().sum() + g.distance.sum(), positions, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), positions)
    assert first.tolist() == [[-2.0, 0, 0], [2.0, 0, 0]]
    assert torch.isfinite(second).all()


def test_single_precision_agrees() -> None:
    rng = np.random.default_rng(9)
    batch = make_batch(random_system(rng, "unwrapped", 4.0), random_system(rng, "tiny", 4.0))
    for settings in SETTINGS:
        compare(weights_of(batch, settings, torch.float32), weights_of(batch, settings), 2e-5)
        graph = build_graph(batch, settings)
        single, double = (geometry_of(batch, graph, settings, dtype) for dtype in (torch.float32, torch.float64))
        for name in ("displacement", "distance", "direction"):  # formed in float64, and rounded once
            assert torch.equal(getattr(single, name), getattr(double, name).float()), name


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.soft])
def test_weights_are_continuous_along_a_path(settings: GraphSettings) -> None:
    """An atom crosses a cluster: tokens enter and leave, ranks swap, no weight ever jumps.

    Slopes of the weights stay below 60 per Å here, so 1e-5 Å may move one by 6e-4 at most and a jump would show; a
    token that enters or leaves does so with no weight to speak of.
    """
    rng = np.random.default_rng(10)
    positions = rng.normal(size=(24, 3)) * 2.2
    batch = make_batch((positions, np.zeros((3, 3)), np.zeros(3, bool)))

    def at(x: float) -> dict:
        batch.positions[0, 0] = x
        return weights_of(batch, settings)

    layouts = set()
    for start in np.linspace(-4.0, 4.0, 40):
        before = at(start)
        layouts.add(tuple(edge[:2] for edge in before))
        for step in range(1, 4):
            after = at(start + 1e-5 * step)
            compare(before, after, 6e-4)
            for edge in before.keys() ^ after.keys():
                assert max(before.get(edge, 0.0), after.get(edge, 0.0)) < 1e-12
            before = after
    assert len(layouts) > 20  # tokens did come, go and change order on the way


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.soft])
def test_envelope_falls_to_nothing_before_a_token_leaves(settings: GraphSettings) -> None:
    """Bisects the place where a token leaves: its log envelope tends to −inf there, and weights do not jump."""
    rng = np.random.default_rng(11)
    positions = rng.normal(size=(20, 3)) * 1.6
    positions[0] = positions[1] + [1.2, 0.0, 0.0]
    batch = make_batch((positions, np.zeros((3, 3)), np.zeros(3, bool)))

    def at(x: float) -> dict:
        batch.positions[0, 0] = x
        graph = build_graph(batch, settings)
        values = geometry_of(batch, graph, settings).log_envelope.tolist()
        return dict(zip(edges_of(graph, graph.num_tokens), values, strict=True))

    near, far, edge = positions[0, 0], 60.0, (0, 1, 0, 0, 0)
    assert edge in at(near)
    for _ in range(60):
        middle = 0.5 * (near + far)
        near, far = (middle, far) if edge in at(middle) else (near, middle)
    assert edge not in at(far)
    assert at(near)[edge] < -1e4
    with_token = {e: np.exp(v) for e, v in at(near).items()}
    compare(with_token, {e: np.exp(v) for e, v in at(far).items()}, 1e-9)


def test_rank_swap_is_smooth() -> None:
    """Two neighbors exchange ranks: their mean rank stays, each passes through the middle with a finite slope."""
    settings = GraphSettings(cutoff=5.0, num_neighbors=8)
    weights = []
    for x in np.linspace(1.9, 2.1, 201):
        positions = np.array([[0, 0, 0], [2.0, 0, 0], [0, x, 0], [0, 0, 1.0]])
        weights.append(weights_of(make_batch((positions, np.zeros((3, 3)), np.zeros(3, bool))), settings))
    first = np.array([w[(0, 1, 0, 0, 0)] for w in weights])
    second = np.array([w[(0, 2, 0, 0, 0)] for w in weights])
    assert first[0] < second[0]
    assert first[-1] > second[-1]
    assert first[100] == pytest.approx(second[100], abs=1e-12)
    assert np.abs(np.diff(first)).max() < 0.02
    assert np.abs(np.diff(first, 2)).max() < 1e-3


@pytest.mark.parametrize("name", ["sine", "bump"])
def test_step(name: str) -> None:
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64, requires_grad=True)
    value = rank_step(x, name)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    outside = x.detach().abs() >= step_support(name)
    assert torch.equal(value[outside], (x[outside] > 0).to(torch.float64))
    assert not slope[outside].any()
    assert not curvature[outside].any()
    assert (slope >= 0).all()
    torch.testing.assert_close(value + value.flip(0), torch.ones_like(value), rtol=0, atol=1e-15)
    # Loose because the sine's slope has corners.
    torch.testing.assert_close(slope[1:-1], (value[2:] - value[:-2]) / 0.006, rtol=0, atol=1e-4)


def test_soft_ranks_tend_to_hard_ranks() -> None:
    rng = np.random.default_rng(12)
    batch = make_batch(random_system(rng, "molecule", 4.0), random_system(rng, "crystal", 4.0))
    hard = weights_of(batch, GraphSettings(cutoff=4.0, num_neighbors=8, soft=False))
    soft = weights_of(batch, GraphSettings(cutoff=4.0, num_neighbors=8, rank_scale=1e-6))
    compare(hard, soft, 1e-6)


def test_hard_and_radius_graphs_have_no_rank_pairs() -> None:
    rng = np.random.default_rng(13)
    batch = make_batch(random_system(rng, "cubic", 4.0))
    for settings in SETTINGS[3:]:
        graph = build_graph(batch, settings)
        assert len(graph.rank_token) == 0
        assert len(graph.center) == graph.num_tokens
