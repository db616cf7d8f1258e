"""The graph in C++ is that of the plain operations, field by field, and what it does not take they get."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graph_reference import KINDS, make_batch, random_rotation, random_system
from hypothesis import given
from hypothesis import strategies as st
from test_graph import SETTINGS, TRUNCATED, check_layout
from tiny import same_bits_on_threads

from escaip.graph import build_graph, native, neighbor_list, search_cutoff
from escaip.graph.knn import reference_graph
from escaip.graph.native import native_graph, native_list
from escaip.graph.neighbors import find_pairs
from escaip.graph.systems import Systems
from escaip.ops import cpp
from escaip.types import Graph, GraphSettings, NeighborList

pytestmark = pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))

CUBE = np.eye(3)
PERIODIC = np.ones(3, bool)


def assert_same(found: Graph | NeighborList | None, expected: Graph | NeighborList) -> None:
    assert found is not None
    for field in dataclasses.fields(expected):
        x, y = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(y, torch.Tensor):
            assert x.dtype == y.dtype, field.name
            assert torch.equal(x, y), field.name
        else:
            assert x == y, field.name


def plain_list(systems: Systems, cutoff: float) -> NeighborList:
    pairs = find_pairs(systems, cutoff)
    edges = pairs.directed()
    return NeighborList(edges.center, edges.neighbor, pairs.edge_shift(edges.edge), cutoff)


def compare(batch: SimpleNamespace, settings: GraphSettings, slack: float = 0.0) -> Graph:
    """From a search, from a list, and from a longer one in no order; returns the graph."""
    systems, cutoff = Systems.read(batch), search_cutoff(settings) + slack
    expected = reference_graph(systems, settings, None, cutoff, slack)
    assert_same(native_graph(systems, settings, None, cutoff, slack), expected)
    assert_same(native_list(systems, cutoff), plain_list(systems, cutoff))
    longer = plain_list(systems, cutoff + 0.4)
    assert_same(native_graph(systems, settings, longer, cutoff, slack), expected)
    order = torch.randperm(len(longer.center))
    shuffled = NeighborList(longer.center[order], longer.neighbor[order], longer.shift[order], longer.cutoff)
    assert_same(native_graph(systems, settings, shuffled, cutoff, slack), expected)
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_system(kind: str) -> None:
    rng = np.random.default_rng(400 + KINDS.index(kind))
    for settings in (*SETTINGS, *TRUNCATED):
        batch = make_batch(*(random_system(rng, kind, settings.cutoff) for _ in range(int(rng.integers(1, 4)))))
        check_layout(compare(batch, settings))
        if settings.rank_truncation is None and (settings.soft or settings.num_neighbors is None):
            compare(batch, settings, slack=float(rng.choice([0.1, 0.4])))


@st.composite
def lattices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atoms on a grid, in or far out of a cell that may be smaller than the cutoff: ties, and atoms on its faces."""
    spacing = draw(st.sampled_from([0.9, 1.1, 1.5]))
    rows = [draw(st.lists(st.integers(-1, 1), min_size=3, max_size=3)) for _ in range(3)]
    cell = spacing * (np.array(rows) + np.diag([draw(st.integers(2, 4)) for _ in range(3)]))
    pbc = np.array([draw(st.booleans()) for _ in range(3)])
    points = draw(st.lists(st.tuples(*[st.integers(-9, 9)] * 3), min_size=1, max_size=12, unique=True))
    return spacing * np.array(points, dtype=float), cell, pbc


@given(
    st.lists(lattices(), min_size=1, max_size=3),
    st.sampled_from([*SETTINGS, *TRUNCATED]),
    st.sampled_from([1.0, 1.5, 3.0]),
)
def test_any_lattice(
    systems: list[tuple[np.ndarray, np.ndarray, np.ndarray]], settings: GraphSettings, k: float
) -> None:
    number = None if settings.num_neighbors is None else round(settings.num_neighbors / k)
    compare(make_batch(*systems), dataclasses.replace(settings, cutoff=3.0, num_neighbors=number))


def test_long_lists() -> None:
    """More neighbors than are sorted by counting."""
    rng = np.random.default_rng(2)
    batch = make_batch((rng.normal(size=(400, 3)) * 1.5, np.zeros((3, 3)), np.zeros(3, bool)))
    for settings in (SETTINGS[0], SETTINGS[3], SETTINGS[4]):
        compare(batch, settings)
    assert torch.bincount(neighbor_list(batch, 4.0).center).max() > 256


@pytest.mark.parametrize("slack", [0.0, 0.125])
def test_windows_whose_ends_are_met_exactly(slack: float) -> None:
    """Distances, the reach of a rank and the cutoff are multiples of 1/8, and so are keys."""
    line = np.array([0.0, 0.5, 1.5, 2.0, 3.5, 4.0, 4.25])[:, None] * np.array([[1.0, 0, 0]])
    plane = np.concatenate([line, line[1:, [1, 0, 2]]])
    for pbc in ((False,) * 3, (True, False, False), (True, True, True)):
        batch = make_batch((plane, CUBE * 5.0, np.array(pbc)), (line, CUBE * 4.5, np.array(pbc)))
        for number in (3, 8, 30):
            settings = GraphSettings(cutoff=3.0, num_neighbors=number, rank_scale=0.125, rank_step="bump")
            compare(batch, settings, slack)
        compare(batch, GraphSettings(cutoff=3.0, num_neighbors=8, soft=False))


@pytest.mark.parametrize("cells", [1_000, 30_000])
def test_atoms_far_outside_of_the_cell(cells: int) -> None:
    rng = np.random.default_rng(3)
    skewed = 5.0 * random_rotation(rng) @ np.array([[1, 0, 0], [0.3, 1, 0], [0.2, -0.4, 1.1]])
    for pbc in itertools.product((True, False), repeat=3):
        cell = skewed if all(pbc) else np.diag([5.0, 6.0, 7.0])
        away = rng.integers(-cells, cells + 1, (20, 3)) * np.array(pbc)
        positions = rng.uniform(0, 5, (20, 3)) + away @ cell + 5.0 * cells
        compare(make_batch((positions, cell, np.array(pbc))), SETTINGS[0])


@pytest.mark.parametrize("settings", [*SETTINGS, TRUNCATED[0]])
def test_threads_change_no_bit(settings: GraphSettings) -> None:
    rng = np.random.default_rng(4)
    batch = make_batch((rng.random((700, 3)) * 16, CUBE * 16, PERIODIC), random_system(rng, "skewed", 4.0))
    systems, cutoff = Systems.read(batch), search_cutoff(settings)
    same_bits_on_threads(
        lambda: [x for x in vars(native_graph(systems, settings, None, cutoff, 0.0)).values() if torch.is_tensor(x)]
    )


def test_what_a_user_calls_is_this(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word from the plain operations."""
    for name in ("reference_graph", "Systems.check"):
        monkeypatch.delattr(f"escaip.graph.tokens.{name}")
    batch = make_batch(random_system(np.random.default_rng(5), "skewed_mixed", 4.0))
    batch.positions = batch.positions.to(torch.float32).t().contiguous().t()
    assert build_graph(batch, SETTINGS[0]).num_tokens > len(batch.positions)
    assert_same(build_graph(batch, SETTINGS[0], neighbor_list(batch, 6.0)), build_graph(batch, SETTINGS[0]))


def test_without_a_compiler_the_plain_operations_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(random_system(np.random.default_rng(6), "skewed", 4.0))
    graph, found = build_graph(batch, SETTINGS[0]), neighbor_list(batch, 4.0)
    monkeypatch.setattr(cpp, "has_kernels", lambda: False)
    assert not native.has_kernels(Systems.read(batch))
    assert_same(build_graph(batch, SETTINGS[0]), graph)
    assert_same(neighbor_list(batch, 4.0), found)


def listed(rows: list[list[int]]) -> NeighborList:
    table = torch.tensor(rows)
    return NeighborList(table[:, 0], table[:, 1], table[:, 2:], 9.0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "rows",
    [
        [[0, 1, 0, 0, 0]],
        [[0, 1, 0, 0, 0], [1, 0, 0, 0, 1]],
        [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
        [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
        [[0, 2, 0, 0, 0], [2, 0, 0, 0, 0]],
        [[0, -1, 0, 0, 0], [-1, 0, 0, 0, 0]],
        [[0, 1, 1 << 40, 0, 0], [1, 0, -(1 << 40), 0, 0]],
    ],
    ids=["one direction", "another image", "itself", "twice", "beyond", "negative", "far"],
)
def test_lists_that_it_leaves(rows: list[list[int]]) -> None:
    batch = make_batch((np.array([[0.0, 0, 0], [1, 0, 0]]), CUBE * 5, PERIODIC))
    systems = Systems.read(batch)
    assert native_graph(systems, SETTINGS[0], listed(rows), search_cutoff(SETTINGS[0]), 0.0) is None


@pytest.mark.bad_input
def test_systems_that_it_leaves() -> None:
    """Flat cells that the plain operations take, and whatever contradicts itself."""
    flat = np.array([[4.0, 0, 0], [4.0, 1e-3, 0], [0, 0, 4.0]])
    rows = np.array([[0.0, 0, 0], [1, 0, 0]])
    good = make_batch((rows, CUBE * 5, PERIODIC), (rows, CUBE * 5, PERIODIC))
    batches = [make_batch((rows, flat, PERIODIC))]
    for changed in (
        {"ptr": torch.tensor([0, 3, 4])},
        {"ptr": torch.tensor([0, 9, 4])},
        {"batch": torch.tensor([0, 0, 1, 7])},
    ):
        batches.append(SimpleNamespace(**{**vars(good), **changed}))
    for batch in batches:
        assert native_graph(Systems.read(batch), SETTINGS[4], None, 3.5, 0.0) is None
    assert native_graph(Systems.read(good), SETTINGS[4], None, 3.5, 0.0) is not None
    assert build_graph(batches[0], GraphSettings(cutoff=0.5, num_neighbors=None)).num_tokens > 100
