"""The graph of a batch on the CPU in C++: what :func:`escaip.graph.knn.reference_graph` computes, field by field.

What the C++ does not take, bad input above all, it leaves to the plain operations, which name what is wrong.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from escaip.graph.geometry import support_of
from escaip.graph.systems import Systems
from escaip.ops.native.build import compiled, library
from escaip.types import Graph, GraphSettings, NeighborList

_DONE = 0
_LIST, _RADIUS, _HARD, _SOFT = 0, 1, 2, 3
_INTEGERS = (
    "atoms", "systems", "threads", "kind", "num_neighbors", "ranked", "bump",
    "edges", "center_stride", "neighbor_stride",
)  # fmt: skip
_NUMBERS = ("cutoff", "radius", "support", "rank_scale", "envelope_scale", "slack")
_POINTERS = ("positions", "cell", "pbc", "index", "ptr", "center", "neighbor", "shift")


class _Problem(ctypes.Structure):
    """Mirrors the struct of graph_problem.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


# What is kept: kind, num_neighbors, ranked, bump, and radius, support, rank_scale, envelope_scale, slack.
_Choice = tuple[tuple[int, int, int, int], tuple[float, float, float, float, float]]
_EVERY_PAIR: _Choice = (_LIST, 0, -1, 0), (0.0, 0.0, 0.0, 0.0, 0.0)


def has_kernels(systems: Systems) -> bool:
    """Whether the functions below take systems like these here."""
    return systems.positions.device.type == "cpu" and compiled("double", "graph")


def native_graph(
    systems: Systems, settings: GraphSettings, neighbors: NeighborList | None, cutoff: float, slack: float
) -> Graph | None:
    """Builds a graph, see :func:`escaip.graph.knn.reference_graph`; None where the plain operations must.

    Args:
        systems: on the CPU, not checked yet.
        settings: radius, k and the shape of the ranks.
        neighbors: a list that is complete up to ``cutoff``; None to search.
        cutoff: Å up to which pairs are needed.
        slack: see :func:`escaip.graph.build_graph`.
    """
    made = _build(systems, neighbors, cutoff, _choice(settings, slack))
    if made is None:
        return None
    handle, (num_rows, num_tokens, num_compared, longest) = made
    num_atoms = len(systems.positions)
    try:
        lengths = (num_atoms + 1, num_rows, num_rows, 3 * num_rows, num_tokens, num_atoms, num_compared, num_compared)
        arrays = [torch.empty(length, dtype=torch.int64) for length in lengths]
        rank_base = torch.empty(num_tokens, dtype=torch.float64)
    except BaseException:
        _functions().escaip_graph_free(handle)
        raise
    _write(handle, [*arrays, rank_base])
    offsets, center, neighbor, shift, reverse, self_token, rank_token, rank_other = arrays
    return Graph(
        offsets=offsets,
        center=center,
        neighbor=neighbor,
        shift=shift.view(num_rows, 3),
        reverse=reverse,
        self_token=self_token,
        rank_base=rank_base,
        rank_token=rank_token,
        rank_other=rank_other,
        max_neighborhood=longest,
    )


def native_list(systems: Systems, cutoff: float) -> NeighborList | None:
    """Finds all directed pairs, see :func:`escaip.graph.neighbor_list`; None where the plain operations must."""
    made = _build(systems, None, cutoff, _EVERY_PAIR)
    if made is None:
        return None
    handle, (num_edges, *_) = made
    try:
        center, neighbor, shift = (torch.empty(n, dtype=torch.int64) for n in (num_edges, num_edges, 3 * num_edges))
    except BaseException:
        _functions().escaip_graph_free(handle)
        raise
    _write(handle, [None, center, neighbor, shift, *([None] * 5)])
    return NeighborList(center, neighbor, shift.view(num_edges, 3), cutoff)


def _choice(settings: GraphSettings, slack: float) -> _Choice:
    k, support = settings.num_neighbors, support_of(settings)
    numbers = (settings.cutoff, support, settings.rank_scale, settings.envelope_scale, slack)
    if k is None:
        return (_RADIUS, 0, -1, 0), numbers
    ranked = -1 if settings.rank_truncation is None else k + settings.rank_truncation
    return (_SOFT if settings.soft else _HARD, k, ranked, settings.rank_step == "bump"), numbers


def _build(
    systems: Systems, neighbors: NeighborList | None, cutoff: float, choice: _Choice
) -> tuple[ctypes.c_void_p, list[int]] | None:
    """A graph that the C++ holds, and its sizes; None where it holds none."""
    held = [x.contiguous() for x in (systems.positions, systems.cell, systems.pbc, systems.index, systems.ptr)]
    edges = (-1, 0, 0)  # to search
    if neighbors is not None:
        center, neighbor, shift = (
            x.to("cpu", torch.int64) for x in (neighbors.center, neighbors.neighbor, neighbors.shift)
        )
        held += [center, neighbor, shift.contiguous()]
        edges = (len(center), center.stride(0), neighbor.stride(0))
    problem = _Problem(
        len(held[0]), len(held[1]), torch.get_num_threads(), *choice[0], *edges, cutoff, *choice[1],
        *[x.data_ptr() for x in held],
    )  # fmt: skip
    made, sizes = ctypes.c_void_p(), (ctypes.c_int64 * 4)()
    status = _functions().escaip_graph_build(ctypes.byref(problem), ctypes.byref(made), sizes)
    return (made, list(sizes)) if status == _DONE else None


def _write(handle: ctypes.c_void_p, arrays: list[Tensor | None]) -> None:
    """Fills the arrays, in the order of the struct in graph.cpp, and lets go of the graph."""
    pointers = (ctypes.c_void_p * len(arrays))(*[None if x is None else x.data_ptr() for x in arrays])
    _functions().escaip_graph_write(handle, pointers)


@functools.cache
def _functions() -> ctypes.CDLL:
    functions = library("double", "graph")
    functions.escaip_graph_build.restype = ctypes.c_int64
    functions.escaip_graph_write.restype = functions.escaip_graph_free.restype = None
    return functions
