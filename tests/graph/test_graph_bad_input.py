"""What the graph refuses, each with one line that names the system and the remedy; and what it must survive."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from graph_reference import make_batch, random_system

from escaip.errors import ConfigError, DataError, UsageError
from escaip.graph import build_graph, neighbor_list, search_cutoff
from escaip.graph.neighbors import Systems, find_pairs
from escaip.types import GraphSettings

GOOD = (np.array([[0.0, 0, 0], [1.0, 0, 0]]), np.eye(3) * 5.0, np.ones(3, bool))
SETTINGS = GraphSettings(cutoff=4.0, num_neighbors=8)


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
        build_graph(make_batch(GOOD, system, GOOD), SETTINGS)
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
        build_graph(make_batch(GOOD), dataclasses.replace(SETTINGS, **change))


@pytest.mark.bad_input
def test_neighbor_list_that_is_too_short() -> None:
    batch = make_batch(GOOD)
    with pytest.raises(UsageError, match=r"reaches 4 Å but these settings need 4\.62832 Å: build it with"):
        build_graph(batch, SETTINGS, neighbor_list(batch, 4.0))


@pytest.mark.bad_input
def test_neighbor_list_of_one_direction_only() -> None:
    batch = make_batch(GOOD)
    full = neighbor_list(batch, 5.0)
    half = full.center < full.neighbor
    halved = dataclasses.replace(full, center=full.center[half], neighbor=full.neighbor[half], shift=full.shift[half])
    with pytest.raises(DataError, match="some edge lacks its reverse"):
        build_graph(batch, SETTINGS, halved)


def test_search_cutoff() -> None:
    assert search_cutoff(SETTINGS) == pytest.approx(4.0 + 0.2 * np.pi)
    assert search_cutoff(dataclasses.replace(SETTINGS, rank_step="bump")) == pytest.approx(4.8)
    assert search_cutoff(dataclasses.replace(SETTINGS, soft=False)) == 4.0
    assert search_cutoff(dataclasses.replace(SETTINGS, num_neighbors=None)) == 4.0


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
    build_graph(batch, SETTINGS, old)
    for x, y in zip(before, (batch.positions, batch.cell, old.center, old.neighbor, old.shift), strict=True):
        assert torch.equal(x, y)


def test_no_gradient_is_recorded_or_needed() -> None:
    batch = make_batch(GOOD)
    batch.positions.requires_grad_()
    graph = build_graph(batch, SETTINGS)
    assert not graph.rank_base.requires_grad


def test_no_systems_at_all() -> None:
    batch = make_batch(GOOD)
    batch.positions, batch.batch, batch.ptr = batch.positions[:0], batch.batch[:0], batch.ptr[:1]
    batch.cell, batch.pbc = batch.cell[:0], batch.pbc[:0]
    graph = build_graph(batch, SETTINGS)
    assert graph.num_tokens == graph.num_atoms == graph.max_neighborhood == 0
