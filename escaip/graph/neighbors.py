"""Neighbor search: which pairs of atoms are closer than a cutoff, for any cell and any mix of periodic axes.

A library searches slightly beyond the cutoff; which pairs are kept is decided here,
by one distance per undirected pair, so that ``(i, j, S)`` is in the list exactly when ``(j, i, −S)`` is.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vesin import NeighborList as VesinSearch

from escaip.errors import DataError, UsageError
from escaip.graph.native import has_kernels, native_list
from escaip.graph.systems import Systems
from escaip.types import NeighborList

# Pairs measured at once: bounds the memory, and stays in the processor's cache.
_CHUNK_PAIRS = 100_000
# Below this many atoms per thread, starting threads costs more than they save.
_ATOMS_PER_THREAD = 2000
_FIRST_GUESS = 128
# Up to so many atoms an open structure is searched pair by pair: vesin divides by zero, and ends the process, for some
# whose atoms are far apart.
_MOST_OPEN = 500
# A library may round the other way at the cutoff, so it searches a little farther than what is kept.
SEARCH_MARGIN = 1e-6

Pairs = tuple[Tensor, Tensor, Tensor]


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
        """Returns both directions of every pair, in order (docs of ``DirectedEdges``)."""
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


def search_pairs(positions: Tensor, cell: Tensor, pbc: Tensor, index: Tensor, ptr: Tensor, cutoff: float) -> Pairs:
    """Searches by the library for the device: nvalchemiops on CUDA where it is installed, else vesin on the CPU.

    Every search takes ``positions (N, 3)`` Å, ``cell (B, 3, 3)`` Å, ``pbc (B, 3)``, ``index (N,)``, ``ptr (B + 1,)``
    and a cutoff in Å, and returns every closer pair once: ``first``, ``second`` ``(M,)`` int64 and ``shift (M, 3)``
    int32, in no particular order.
    """
    if positions.is_cuda and importlib.util.find_spec("nvalchemiops") is not None:
        return search_nvalchemiops(positions, cell, pbc, index, ptr, cutoff)
    return search_vesin(positions, cell, pbc, index, ptr, cutoff)


def search_vesin(positions: Tensor, cell: Tensor, pbc: Tensor, index: Tensor, ptr: Tensor, cutoff: float) -> Pairs:
    """One search per system on the CPU; results are copied to the device of ``positions``."""
    arrays = [x.cpu().numpy() for x in (positions, cell, pbc)]
    found = [(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int32))]
    for system, (start, stop) in enumerate(itertools.pairwise(ptr.tolist())):
        threads = max(1, min(torch.get_num_threads(), (stop - start) // _ATOMS_PER_THREAD))
        if stop - start <= _MOST_OPEN and not arrays[2][system].any():
            found.append(_search_open(positions[start:stop].cpu(), start, cutoff))
            continue
        search = VesinSearch(cutoff=cutoff, full_list=False, n_threads=threads)
        pairs, shift = search.compute(arrays[0][start:stop], arrays[1][system], arrays[2][system], "PS")
        found.append((torch.from_numpy(pairs.view("int64")).add_(start), torch.from_numpy(shift)))
    # One system is the large case: no copy there.
    pairs, shift = found[1] if len(found) == 2 else (torch.cat(parts) for parts in zip(*found, strict=True))
    device = index.device
    return pairs[:, 0].to(device), pairs[:, 1].to(device), shift.to(device)


def _search_open(positions: Tensor, start: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """Pairs ``(M, 2)`` of one structure without periodic axes, its first atom ``start``, and their shifts: zeros."""
    first, second = torch.triu_indices(len(positions), len(positions), offset=1)
    distance = (positions[second] - positions[first]).square_().sum(dim=1).sqrt_()
    pairs = torch.stack([first, second], dim=1)[distance < cutoff]
    return pairs.add_(start), torch.zeros(len(pairs), 3, dtype=torch.int32)


def search_nvalchemiops(
    positions: Tensor, cell: Tensor, pbc: Tensor, index: Tensor, ptr: Tensor, cutoff: float
) -> Pairs:
    """One batched search on the device of ``positions``.

    Where the library falls short: it needs cells with volume, so non-periodic axes are completed; it stores a fixed
    number of neighbors per atom and raises when they do not fit, so the number is doubled until they do.
    """
    from nvalchemiops.neighbors.neighbor_utils import NeighborOverflowError
    from nvalchemiops.torch.neighbors import neighbor_list

    if not len(positions):
        return index, index, index.new_zeros(0, 3, dtype=torch.int32)
    arguments = {
        "cell": _complete_cell(positions, cell, pbc, cutoff),
        "pbc": pbc,
        "batch_idx": index.to(torch.int32),
        "batch_ptr": ptr.to(torch.int32),
        "half_fill": True,
        "return_neighbor_list": True,
    }
    capacity = _FIRST_GUESS
    while True:
        try:
            edges, _, shift = neighbor_list(positions, cutoff, max_neighbors=capacity, **arguments)
            return edges[0].to(torch.int64), edges[1].to(torch.int64), shift
        except NeighborOverflowError:
            capacity *= 2


def _complete_cell(positions: Tensor, cell: Tensor, pbc: Tensor, cutoff: float) -> Tensor:
    """``(B, 3, 3)`` Å: non-periodic axes replaced by normals to the periodic ones, as long as the atoms reach."""
    rows = torch.where(pbc[:, :, None], cell, 0.0)
    _, axes = torch.linalg.eigh(torch.linalg.pinv(rows) @ rows)  # columns outside of the span of the rows come first
    order = torch.argsort(torch.argsort(pbc.to(torch.int8), dim=1, stable=True), dim=1)
    normals = axes.transpose(1, 2).gather(1, order[:, :, None].expand(-1, -1, 3))
    length = (positions.amax(dim=0) - positions.amin(dim=0)).norm().clamp(min=cutoff)
    return torch.where(pbc[:, :, None], cell, normals * length)
