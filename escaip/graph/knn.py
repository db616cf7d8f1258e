"""Which neighbors become tokens: the radius and differentiable k-nearest-neighbor graph (docs/concepts/graph.md).

All decisions are made in float64 and without gradient; what the gradient needs is listed in the graph and
evaluated by ``escaip.graph.compute_geometry``. Symbols: ``N`` atoms, ``E`` directed edges, ``M = N + E``
list entries, ``T`` tokens, ``X`` extra rows, ``P`` rank pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from escaip.graph.geometry import rank_step, support_of
from escaip.graph.neighbors import UndirectedPairs, find_pairs, pairs_from
from escaip.graph.systems import Systems
from escaip.types import Graph, GraphSettings, NeighborList

# Two distances are tied, for hard ranks, within this fraction.
_TIE = 1e-9
# Window pairs evaluated at once: bounds the memory of the exact ranks, and stays in the processor's cache.
_CHUNK_PAIRS = 250_000
_CHUNK_ATOMS = 2_048
# Distances whose keys round to a tie may stand in either order: worth this much rank at most.
_BOUND_MARGIN = 1e-6


def reference_graph(
    systems: Systems, settings: GraphSettings, neighbors: NeighborList | None, cutoff: float, skin: float
) -> Graph:
    """Builds a graph in plain operations, on any device: the specification of ``escaip.graph.build_graph``.

    Args:
        systems: checked.
        settings: radius, k and the shape of the ranks.
        neighbors: a list that is complete up to ``cutoff``; None to search.
        cutoff: Å up to which pairs are needed.
        skin: ``graph_skin`` of ``escaip.graph.build_graph``.

    Raises:
        DataError: the list does not hold both directions of every pair.
    """
    pairs = find_pairs(systems, cutoff) if neighbors is None else pairs_from(neighbors, systems, cutoff)
    lists = _make_lists(pairs, len(systems.positions))
    if settings.num_neighbors is None:
        windows = _select_radius(lists)
    elif skin > 0.0:
        windows = _select_soft_within(lists, settings, skin)
    elif settings.soft:
        windows = _select_soft(lists, settings)
    else:
        windows = _select_hard(lists, settings)
    return _pack(pairs, lists, windows)


@dataclass(frozen=True)
class _Lists:
    """Every atom's list: itself first, then its candidates by distance.

    Attributes:
        start: ``(N + 1,)`` int64, first entry of each list.
        center, neighbor: ``(M,)`` int64.
        distance: ``(M,)`` float64, Å; 0 for the atom itself.
        key: ``(M,)`` float64, ascending, ``center · stride + distance``.
        edge: ``(M,)`` int64, directed edge of each entry; −1 for the atom itself.
    """

    start: Tensor
    center: Tensor
    neighbor: Tensor
    distance: Tensor
    key: Tensor
    edge: Tensor


@dataclass(frozen=True)
class _Windows:
    """Entries chosen as neighbor tokens and the part of the list that decides their rank; ``C`` of them.

    Attributes:
        entry: ``(C,)`` int64, ascending.
        reverse: ``(C,)`` int64 in ``[0, C)``, the reversed edge.
        base: ``(C,)`` float64, rank from entries before the window.
        low, high: ``(C,)`` int64, the window ``low : high`` of entries that add to the rank by the step.
    """

    entry: Tensor
    reverse: Tensor
    base: Tensor
    low: Tensor
    high: Tensor

    @property
    def not_farther(self) -> Tensor:
        """``(C,)`` float64, how many entries of the list are not farther, itself included."""
        return self.base + (self.entry - self.low + 1)

    def choose(self, keep: Tensor) -> _Windows:
        """Returns the windows where the ``(C,)`` bool ``keep``, the same for an edge and its reverse, is true."""
        moved = keep.cumsum(0) - 1
        return _Windows(self.entry[keep], moved[self.reverse[keep]], self.base[keep], self.low[keep], self.high[keep])


def _make_lists(pairs: UndirectedPairs, num_atoms: int) -> _Lists:
    edges = pairs.directed()
    atom = torch.arange(num_atoms, device=edges.edge.device)
    count = torch.bincount(edges.center, minlength=num_atoms) + 1
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    # Sorted edge e of center c has the self entries of atoms 0 .. c before it.
    place = torch.arange(1, len(edges.edge) + 1, device=atom.device) + edges.center

    def merge(of_atom: Tensor, of_edge: Tensor) -> Tensor:
        merged = of_edge.new_empty(len(place) + num_atoms)
        merged[start[:-1]] = of_atom.to(of_edge.dtype)
        merged[place] = of_edge
        return merged

    return _Lists(
        start=start,
        center=torch.repeat_interleave(count),
        neighbor=merge(atom, edges.neighbor),
        distance=merge(torch.zeros_like(atom), pairs.distance[pairs.of_edge(edges.edge)]),
        key=merge(atom * pairs.stride, edges.key),
        edge=merge(torch.full_like(atom, -1), edges.edge),
    )


def _select_radius(lists: _Lists) -> _Windows:
    """All neighbors, no ranks."""
    entry = (lists.edge >= 0).nonzero().squeeze(1)
    none = torch.zeros_like(entry)
    return _pair(lists, entry, none, none, none)


def _select_hard(lists: _Lists, settings: GraphSettings) -> _Windows:
    """Ranks by counting, half a rank for each tie (itself included): the limit of small rank scales."""
    found = []
    for entry, start in _within_reach(lists, settings):
        key, margin = lists.key[entry], _TIE * lists.distance[entry]
        nearer = torch.searchsorted(lists.key, key - margin) - start
        not_farther = torch.searchsorted(lists.key, key + margin, right=True) - start
        found.append((entry, 0.5 * (nearer + not_farther)))
    entry, rank = (torch.cat(parts) for parts in zip(*found, strict=True))
    none = torch.zeros_like(entry)
    windows = _pair(lists, entry, rank, none, none)
    return windows.choose(_coordinate(lists, windows, windows.base, settings) < 1.0)


def _select_soft(lists: _Lists, settings: GraphSettings) -> _Windows:
    """Soft ranks: bounds decide most edges, the exact sum over their windows the others."""
    assert settings.num_neighbors is not None
    support = support_of(settings)
    found = []
    for entry, start in _within_reach(lists, settings):
        low = torch.searchsorted(lists.key, lists.key[entry] - support, right=True)
        # Of those not farther, whoever is before the window adds 1 to the rank and the others at least ½ ...
        before, not_farther = low - start, entry - start + 1
        keep = (before + not_farther < 2 * settings.num_neighbors).nonzero().squeeze(1)
        found.append((entry[keep], before[keep], low[keep]))
    entry, before, low = (torch.cat(parts) for parts in zip(*found, strict=True))
    high = torch.searchsorted(lists.key, lists.key[entry] + support)
    if settings.rank_truncation is not None:
        ranked = settings.num_neighbors + settings.rank_truncation
        high = torch.minimum(high, lists.start[lists.center[entry]] + ranked)
    windows = _pair(lists, entry, before, low, high)
    windows = windows.choose(_coordinate(lists, windows, 0.5 * (windows.base + windows.not_farther), settings) < 1.0)
    # ... and of those farther, whoever is in the window adds at most ½.
    upper_bound = 0.5 * (windows.not_farther + windows.base + windows.high - windows.low) + _BOUND_MARGIN
    keep = _coordinate(lists, windows, upper_bound, settings) < 1.0
    unsure = windows.choose(~keep)
    keep[~keep] = _coordinate(lists, unsure, _exact_ranks(lists, unsure, settings), settings) < 1.0
    return windows.choose(keep)


def _select_soft_within(lists: _Lists, settings: GraphSettings, skin: float) -> _Windows:
    """As ``_select_soft``, for all distances that differ from these by at most ``skin`` Å.

    A gap of two distances then differs by twice as much at most, and so do the windows; whoever may come to be in one
    is in it. An edge is kept if it is a token at the smallest distance and the smallest rank that it may get.
    """
    assert settings.num_neighbors is not None
    reach = support_of(settings) + 2.0 * skin
    entry = ((lists.distance < settings.cutoff + skin) & (lists.edge >= 0)).nonzero().squeeze(1)
    key, start = lists.key[entry], lists.start[lists.center[entry]]
    low = torch.searchsorted(lists.key, key - reach, right=True)
    surely_nearer = torch.searchsorted(lists.key, key - 2.0 * skin) - start
    possible = (low - start) + surely_nearer + 1 < 2 * settings.num_neighbors
    entry, key, low, start = entry[possible], key[possible], low[possible], start[possible]
    windows = _pair(lists, entry, low - start, low, torch.searchsorted(lists.key, key + reach))
    rank = _exact_ranks(lists, windows, settings, 2.0 * skin)
    return windows.choose(_coordinate(lists, windows, rank, settings, skin) < 1.0)


def _within_reach(lists: _Lists, settings: GraphSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """Entries that are ranked, inside the cutoff with fewer than ``2k`` not farther: each adds at least half a rank.

    Yields, for some atoms at a time, the entries and the starts of their lists.
    """
    assert settings.num_neighbors is not None
    starts = lists.start[::_CHUNK_ATOMS].tolist()
    for begin, end in itertools.pairwise([*starts, len(lists.edge)]):
        start = lists.start.index_select(0, lists.center[begin:end])
        entry = torch.arange(begin, end, device=start.device)
        keep = (lists.distance[begin:end] < settings.cutoff) & (lists.edge[begin:end] >= 0)
        place = entry - start
        keep &= place + 1 < 2 * settings.num_neighbors
        if settings.rank_truncation is not None:
            keep &= place < settings.num_neighbors + settings.rank_truncation
        yield entry[keep], start[keep]


def _pair(lists: _Lists, entry: Tensor, base: Tensor, low: Tensor, high: Tensor) -> _Windows:
    """Windows of those entries whose reversed edge is among them."""
    num_edges = len(lists.edge) - (len(lists.start) - 1)
    edge = lists.edge[entry]
    index = torch.full((num_edges,), -1, dtype=torch.int64, device=edge.device)
    index[edge] = torch.arange(len(edge), device=edge.device)
    reverse = index[torch.where(edge < num_edges // 2, edge + num_edges // 2, edge - num_edges // 2)]
    return _Windows(entry, reverse, base.to(torch.float64), low, high).choose(reverse >= 0)


def _coordinate(lists: _Lists, windows: _Windows, rank: Tensor, settings: GraphSettings, skin: float = 0.0) -> Tensor:
    """``(C,)`` envelope coordinate ``x``, given ranks or bounds of them, at distances less ``skin`` Å.

    The same, to the last bit, for an edge and its reverse, so that what is decided by it is symmetric.
    """
    assert settings.num_neighbors is not None
    scale = settings.envelope_scale
    own = rank / (settings.num_neighbors * scale)
    other = own[windows.reverse]
    radial = (lists.distance[windows.entry] - skin) / (settings.cutoff * scale)
    top = torch.maximum(torch.maximum(own, other), radial)
    total = (torch.exp(own - top) + torch.exp(other - top)) + torch.exp(radial - top)
    return scale * (top + torch.log(total))


def _exact_ranks(lists: _Lists, windows: _Windows, settings: GraphSettings, less: float = 0.0) -> Tensor:
    """``(C,)`` float64: base plus the step over each window, of gaps less ``less`` Å."""
    rank, distance = windows.base.clone(), lists.distance[windows.entry]
    for of, other in _window_pairs(windows):
        gap = distance.index_select(0, of) - lists.distance.index_select(0, other) - less
        rank.index_add_(0, of, rank_step(gap / settings.rank_scale, settings.rank_step))
    return rank


def _window_pairs(windows: _Windows) -> Iterator[tuple[Tensor, Tensor]]:
    """Lists the members of every window, some windows at a time: ``(index of the window, entry)``, int64."""
    count = windows.high - windows.low
    ends = count.cumsum(0)
    shift = windows.low - (ends - count)
    num_pairs = int(ends[-1]) if len(ends) else 0
    cuts = torch.arange(1, max(1, math.ceil(num_pairs / _CHUNK_PAIRS)), device=ends.device) * _CHUNK_PAIRS
    bounds = [0, *torch.searchsorted(ends, cuts).tolist(), len(ends)]
    done = 0
    for begin, end in itertools.pairwise(bounds):
        of = torch.repeat_interleave(count[begin:end]).add_(begin)
        yield of, torch.arange(done, done + len(of), device=of.device).add_(shift.index_select(0, of))
        done += len(of)


def _pack(pairs: UndirectedPairs, lists: _Lists, windows: _Windows) -> Graph:
    """Lays out tokens, extra rows and rank pairs."""
    num_atoms, size, device = len(lists.start) - 1, len(lists.edge), lists.edge.device
    is_token = lists.edge < 0
    is_token[windows.entry] = True
    # Windows are runs of entries: one sweep over their ends tells which entries any of them covers.
    sweep = torch.zeros(size + 1, dtype=torch.int64, device=device)
    one = torch.ones_like(windows.low)
    sweep.index_add_(0, windows.low, one)
    sweep.index_add_(0, windows.high, -one)
    is_extra = (sweep.cumsum(0)[:-1] > 0) & ~is_token
    token, extra = is_token.nonzero().squeeze(1), is_extra.nonzero().squeeze(1)
    num_tokens = len(token)

    entry = torch.cat([token, extra])
    row = torch.empty(size, dtype=torch.int64, device=device)
    row[entry] = torch.arange(len(entry), device=device)
    edge = lists.edge[entry]
    is_neighbor = (edge >= 0).nonzero().squeeze(1)
    shift = edge.new_zeros(len(entry), 3)
    shift.index_copy_(0, is_neighbor, pairs.edge_shift(edge[is_neighbor]))

    neighbor_row = row[windows.entry]
    reverse = torch.arange(num_tokens, device=device)
    reverse[neighbor_row] = neighbor_row[windows.reverse]
    rank_base = torch.zeros(num_tokens, dtype=torch.float64, device=device)
    rank_base[neighbor_row] = windows.base
    rank_token = torch.empty(int((windows.high - windows.low).sum()), dtype=torch.int64, device=device)
    rank_other = torch.empty_like(rank_token)
    done = 0
    for of, other in _window_pairs(windows):
        torch.index_select(neighbor_row, 0, of, out=rank_token[done : done + len(of)])
        torch.index_select(row, 0, other, out=rank_other[done : done + len(of)])
        done += len(of)

    count = torch.bincount(lists.center[token], minlength=num_atoms)
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return Graph(
        offsets=offsets,
        center=lists.center[entry],
        neighbor=lists.neighbor[entry],
        shift=shift,
        reverse=reverse,
        self_token=offsets[:-1].clone(),
        rank_base=rank_base,
        rank_token=rank_token,
        rank_other=rank_other,
        max_neighborhood=int(count.max()) if num_atoms else 0,
    )
