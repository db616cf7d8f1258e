"""Derivatives, invariances and continuity of the geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph_reference import make_batch, random_rotation, random_system
from test_graph import SETTINGS, edges_of, geometry_of

from escaip.graph import build_graph, compute_geometry
from escaip.graph.geometry import rank_step, step_support
from escaip.types import GraphSettings

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
