"""The graph of a batch on the CPU in C++: computes ``escaip.graph.knn.reference_graph`` field by field.

Input that the C++ refuses, bad input above all, goes to the plain operations, which say what is wrong with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from escaip.graph.geometry import support_of
from escaip.graph.systems import Systems
from escaip.ops import cpp
from escaip.types import Graph, GraphSettings, NeighborList

_FIELDS = (
    "offsets", "center", "neighbor", "shift", "reverse", "self_token", "rank_base", "rank_token", "rank_other",
)  # fmt: skip
_LIST, _RADIUS, _HARD, _SOFT = 0, 1, 2, 3
# What to keep: kind, num_neighbors, ranked, bump; and radius, support, rank_scale, envelope_scale, slack.
_Choice = tuple[tuple[int, int, int, int], tuple[float, float, float, float, float]]
_EVERY_PAIR: _Choice = (_LIST, 0, -1, 0), (0.0, 0.0, 0.0, 0.0, 0.0)


def has_kernels(systems: Systems) -> bool:
    """Whether the functions below take systems like these here."""
    return systems.positions.device.type == "cpu" and cpp.has_kernels()


def native_graph(
    systems: Systems, settings: GraphSettings, neighbors: NeighborList | None, cutoff: float, slack: float
) -> Graph | None:
    """Builds a graph, see ``escaip.graph.knn.reference_graph``; None where the plain operations must.

    Args:
        systems: on the CPU, not checked yet.
        settings: radius, k and the shape of the ranks.
        neighbors: a list that is complete up to ``cutoff``; None to search.
        cutoff: Å up to which pairs are needed.
        slack: see ``escaip.graph.build_graph``.
    """
    arrays, longest = _build(systems, neighbors, cutoff, _choice(settings, slack))
    if not arrays:
        return None
    return Graph(**dict(zip(_FIELDS, arrays, strict=True)), max_neighborhood=longest)


def native_list(systems: Systems, cutoff: float) -> NeighborList | None:
    """Finds all directed pairs, see ``escaip.graph.neighbor_list``; None where the plain operations must."""
    arrays, _ = _build(systems, None, cutoff, _EVERY_PAIR)
    if not arrays:
        return None
    center, neighbor, shift = arrays
    return NeighborList(center, neighbor, shift, cutoff)


def _choice(settings: GraphSettings, slack: float) -> _Choice:
    k, support = settings.num_neighbors, support_of(settings)
    numbers = (settings.cutoff, support, settings.rank_scale, settings.envelope_scale, slack)
    if k is None:
        return (_RADIUS, 0, -1, 0), numbers
    ranked = -1 if settings.rank_truncation is None else k + settings.rank_truncation
    return (_SOFT if settings.soft else _HARD, k, ranked, settings.rank_step == "bump"), numbers


def _build(
    systems: Systems, neighbors: NeighborList | None, cutoff: float, choice: _Choice
) -> tuple[list[Tensor], int]:
    """Arrays of the graph and the size of the longest neighborhood; no arrays where it is refused."""
    edges: tuple[Tensor | None, ...] = (None, None, None)  # to search
    if neighbors is not None:
        edges = tuple(x.to("cpu", torch.int64) for x in (neighbors.center, neighbors.neighbor, neighbors.shift))
    own = (systems.positions, systems.cell, systems.pbc, systems.index, systems.ptr)
    return torch.ops.escaip.graph(*own, *edges, choice[0], (cutoff, *choice[1]))
