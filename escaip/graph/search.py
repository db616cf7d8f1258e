"""The libraries that search for neighbors, and the one place that chooses between them (docs/graph.md).

Every search takes ``positions (N, 3)`` Å, ``cell (B, 3, 3)`` Å, ``pbc (B, 3)``, ``index (N,)`` (system of each atom),
``ptr (B + 1,)`` and a cutoff in Å, and returns every pair closer than that once: ``first``, ``second`` ``(M,)`` int64
and ``shift (M, 3)`` int32, in no particular order.
"""

from __future__ import annotations

import importlib.util
import itertools

import torch
from torch import Tensor
from vesin import NeighborList

# Below this many atoms per thread, starting threads costs more than they save.
_ATOMS_PER_THREAD = 2000
_FIRST_GUESS = 128
# Up to so many atoms an open structure is searched pair by pair: vesin divides by zero, and ends the process, for some
# whose atoms are far apart.
_MOST_OPEN = 500
# A library may round the other way at the cutoff, so it searches a little farther than what is kept.
SEARCH_MARGIN = 1e-6

Pairs = tuple[Tensor, Tensor, Tensor]


def search_pairs(positions: Tensor, cell: Tensor, pbc: Tensor, index: Tensor, ptr: Tensor, cutoff: float) -> Pairs:
    """Searches by the library for the device: nvalchemiops on CUDA where it is installed, else vesin on the CPU.

    The nvalchemiops path is tested on the CPU, where its kernels run too; nobody has run it on a GPU here yet.
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
        search = NeighborList(cutoff=cutoff, full_list=False, n_threads=threads)
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
