"""Neighbor search: which pairs of atoms are closer than a cutoff, for any cell and any mix of periodic axes.

A library searches (:mod:`escaip.graph.search`), slightly beyond the cutoff; which pairs are kept is decided here,
by one distance per undirected pair, so that ``(i, j, S)`` is in the list exactly when ``(j, i, −S)`` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from escaip.errors import DataError, UsageError
from escaip.graph.native import has_kernels, native_list
from escaip.graph.search import SEARCH_MARGIN, search_pairs
from escaip.graph.systems import Systems
from escaip.types import NeighborList

# Pairs measured at once: bounds the memory, and stays in the processor's cache.
_CHUNK_PAIRS = 100_000


@dataclass(frozen=True)
class UndirectedPairs:
    """Every pair closer than a cutoff once; ``M`` pairs.

    Attributes:
        first, second: ``(M,)`` int64, atoms; with ``shift``, ``second`` sits at ``positions[second] + shift @ cell``.
        shift: ``(M, 3)`` int32 or int64.
        distance: ``(M,)`` float64, Å, below ``cutoff``.
        cutoff: radius in Å.
    """

    first: Tensor
    second: Tensor
    shift: Tensor
    distance: Tensor
    cutoff: float

    def directed(self) -> DirectedEdges:
        """Returns both directions of every pair, in order (docs of :class:`DirectedEdges`)."""
        center = torch.cat([self.first, self.second])
        neighbor = torch.cat([self.second, self.first])
        key = self.distance.repeat(2).add_(center, alpha=self.stride)
        key, order = torch.sort(key, stable=True)
        _sort_ties(key, order, neighbor, self.shift)
        return DirectedEdges(center[order], neighbor[order], key, order)

    @property
    def stride(self) -> float:
        """Power of two, in Å, that separates the keys of two centers, with room for ``cutoff`` on either side."""
        return 2.0 ** math.ceil(math.log2(4.0 * self.cutoff))

    def of_edge(self, edge: Tensor) -> Tensor:
        """Returns the pair of each directed edge."""
        half = len(self.first)
        return torch.where(edge < half, edge, edge - half)

    def edge_shift(self, edge: Tensor) -> Tensor:
        """Returns the ``(…, 3)`` int64 shift of each directed edge."""
        sign = torch.where(edge < len(self.first), 1, -1)
        return self.shift.index_select(0, self.of_edge(edge)).to(torch.int64).mul_(sign[:, None])


@dataclass(frozen=True)
class DirectedEdges:
    """The ``E = 2M`` directed edges of ``M`` pairs, ordered by center, distance, neighbor, shift.

    Attributes:
        center, neighbor: ``(E,)`` int64.
        key: ``(E,)`` float64, ascending: ``center · stride + distance``. Distances closer than its rounding are ties.
        edge: ``(E,)`` int64; edge ``m`` is pair ``m`` from first to second, edge ``M + m`` its reverse.
    """

    center: Tensor
    neighbor: Tensor
    key: Tensor
    edge: Tensor


@torch.no_grad()
def neighbor_list(batch: Any, cutoff: float) -> NeighborList:
    """Finds all directed pairs ``(i, j, S)`` with ``|r_j + S·cell − r_i| < cutoff``, the atom itself excluded.

    Args:
        batch: PyG batch (or one structure) with ``positions (N, 3)`` Å, ``cell (B, 3, 3)`` Å, ``pbc (B, 3)``,
            ``batch (N,)`` and ``ptr (B + 1,)``. Positions may lie anywhere, in or out of the cell.
        cutoff: radius in Å.

    Returns:
        Edges ordered by center, then distance, then neighbor and shift, whatever the number of threads.

    Raises:
        DataError: a NaN or infinite position, a cell without volume along its periodic axes, or one that is too thin.
        UsageError: the cutoff is not a positive number.
    """
    systems = Systems.read(batch)
    _check_cutoff(cutoff)
    if has_kernels(systems):
        found = native_list(systems, cutoff)
        if found is not None:
            return found
    systems.check()
    pairs = find_pairs(systems, cutoff)
    edges = pairs.directed()
    return NeighborList(edges.center, edges.neighbor, pairs.edge_shift(edges.edge), cutoff)


def find_pairs(systems: Systems, cutoff: float) -> UndirectedPairs:
    """Finds every pair closer than ``cutoff`` Å once.

    Raises:
        DataError: a cell is too thin.
        UsageError: the cutoff is not a positive number.
    """
    _check_cutoff(cutoff)
    systems.check_images(cutoff)
    batch = (systems.positions, systems.cell, systems.pbc, systems.index, systems.ptr)
    first, second, shift = search_pairs(*batch, cutoff + SEARCH_MARGIN)
    return _closer_than(systems, first, second, shift, cutoff)


def _check_cutoff(cutoff: float) -> None:
    if not (cutoff > 0 and math.isfinite(cutoff)):
        raise UsageError(f"cutoff is {cutoff}: it must be a positive number of Å")


def pairs_from(neighbors: NeighborList, systems: Systems, cutoff: float) -> UndirectedPairs:
    """Re-filters a list, by the present distances, to the pairs closer than ``cutoff`` Å.

    Args:
        neighbors: full list (both directions of each pair) that is complete up to ``cutoff`` at least.
        systems: present positions and cells.
        cutoff: radius in Å, not above ``neighbors.cutoff``.

    Raises:
        DataError: the list does not hold both directions of every pair.
    """
    device = systems.positions.device
    center, neighbor, shift = (x.to(device) for x in (neighbors.center, neighbors.neighbor, neighbors.shift))
    # Keep one of (i, j, S) and (j, i, −S): i < j, or the first non-zero component of S above 0.
    leading = torch.where(shift[:, 0] != 0, shift[:, 0], torch.where(shift[:, 1] != 0, shift[:, 1], shift[:, 2]))
    half = ((center < neighbor) | ((center == neighbor) & (leading > 0))).nonzero().squeeze(1)
    if 2 * len(half) != len(center):
        raise DataError(
            f"neighbor list of {len(center)} edges holds {len(half)} forward ones, so some edge lacks its reverse: "
            "use a full list, as from escaip.graph.neighbor_list"
        )
    return _closer_than(systems, center[half], neighbor[half], shift[half], cutoff)


def _sort_ties(key: Tensor, order: Tensor, neighbor: Tensor, shift: Tensor) -> None:
    """Reorders, in place, the runs of ``order`` whose keys are equal by neighbor, then shift.

    Args:
        key: ``(E,)`` ascending.
        order: ``(E,)`` int64, directed edge at each place.
        neighbor: ``(E,)`` int64 of each directed edge.
        shift: ``(E / 2, 3)`` of each pair.
    """
    equal = key[1:] == key[:-1]
    tied = torch.zeros_like(key, dtype=torch.bool)
    tied[1:] |= equal
    tied[:-1] |= equal
    place = tied.nonzero().squeeze(1)
    if not len(place):
        return
    edge, half = order[place], len(shift)
    image = torch.where((edge < half)[:, None], shift[edge % half], -shift[edge % half])
    run = torch.zeros_like(order)
    run[1:] = (~equal).cumsum(0)
    inner = torch.arange(len(place), device=place.device)
    for column in (image[:, 2], image[:, 1], image[:, 0], neighbor[edge], run[place]):  # least significant first
        inner = inner[column[inner].argsort(stable=True)]
    order[place] = edge[inner]


def _closer_than(systems: Systems, first: Tensor, second: Tensor, shift: Tensor, cutoff: float) -> UndirectedPairs:
    distance = pair_distance(systems, first, second, shift)
    keep = (distance < cutoff).nonzero().squeeze(1)
    if len(keep) < len(first):
        first, second, shift, distance = first[keep], second[keep], shift[keep], distance[keep]
    return UndirectedPairs(first, second, shift, distance, cutoff)


def pair_distance(systems: Systems, first: Tensor, second: Tensor, shift: Tensor) -> Tensor:
    """Returns ``(M,)`` float64 distances in Å, bitwise the same for a pair and its reverse."""
    distance = systems.positions.new_empty(len(first))
    for begin in range(0, len(first), _CHUNK_PAIRS):
        part = slice(begin, begin + _CHUNK_PAIRS)
        center = first[part]
        vector = systems.positions.index_select(0, second[part]) - systems.positions.index_select(0, center)
        moved = shift[part].any(dim=1).nonzero().squeeze(1)
        if len(moved):
            cell = systems.cell.index_select(0, systems.index.index_select(0, center[moved]))
            image = shift[part][moved].to(torch.float64)
            # Written out, because a matrix product may round (S) and (−S) differently.
            translation = image[:, 0:1] * cell[:, 0] + image[:, 1:2] * cell[:, 1] + image[:, 2:3] * cell[:, 2]
            vector.index_add_(0, moved, translation)
        squared = vector.square_().sum(dim=1)
        if squared.device.type != "cpu":
            distance[part] = squared.sqrt_()
        else:  # rounded right, which PyTorch's is not everywhere on a CPU: one in a hundred is off by the last bit
            np.sqrt(squared.numpy(), out=distance[part].numpy())
    return distance
