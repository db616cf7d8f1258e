"""From a batch to its graph: in C++ on the CPU, in plain operations elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from escaip.errors import DataError, UsageError
from escaip.graph.knn import plain_graph
from escaip.graph.native import has_kernels, native_graph
from escaip.graph.settings import check_slack, search_cutoff
from escaip.graph.systems import Systems
from escaip.types import Graph, GraphSettings, NeighborList


@torch.no_grad()
def build_graph(
    batch: Any, settings: GraphSettings, neighbors: NeighborList | None = None, slack: float = 0.0
) -> Graph:
    """Builds the packed token layout of a batch.

    Args:
        batch: PyG batch (or one structure) with ``positions (N, 3)`` Å, ``cell (B, 3, 3)`` Å, ``pbc (B, 3)``,
            ``batch (N,)`` and ``ptr (B + 1,)``.
        settings: radius, k and the shape of the ranks.
        neighbors: a list that is complete up to ``search_cutoff(settings) + slack`` or beyond at the present positions
            (so one with a skin stays valid until it is used up); re-filtered by present distances, so the
            result is that of a fresh build. None to search.
        slack: Å by which distances may change before the graph must be built again: it then has every token and every
            comparison of ranks that may come to count, and the geometry of those that do not says so (``−inf``).

    Raises:
        ConfigError: a setting is out of range.
        DataError: see :func:`escaip.graph.neighbor_list`; or a periodic structure for settings that know none.
        UsageError: ``neighbors`` does not reach far enough, or ``slack`` is negative, or positive for settings whose
            ranks are hard or truncated, and so may change with any distance.
    """
    cutoff = search_cutoff(settings) + check_slack(slack, settings)
    systems = Systems.read(batch)
    if not settings.periodic and bool(systems.pbc.any()):
        raise DataError(
            f"system {int(systems.pbc.any(dim=1).nonzero()[0])} is periodic, but the model treats every structure as "
            "open (periodic: false): set its pbc to False, or use another model"
        )
    if neighbors is not None and neighbors.cutoff < cutoff:
        raise UsageError(
            f"neighbor list reaches {neighbors.cutoff:g} Å but these settings need {cutoff:g} Å: build it with "
            f"escaip.graph.neighbor_list(batch, {cutoff:g})"
        )
    if has_kernels(systems):
        graph = native_graph(systems, settings, neighbors, cutoff, slack)
        if graph is not None:
            return graph
    systems.check()
    return plain_graph(systems, settings, neighbors, cutoff, slack)


def attached_neighbors(batch: Any) -> NeighborList | None:
    """The candidate list that a loader's worker attached to a batch, if it did."""
    if "edge_shift" not in batch:
        return None
    return NeighborList(
        center=batch.edge_index[0],
        neighbor=batch.edge_index[1],
        shift=batch.edge_shift,
        cutoff=float(batch.edge_cutoff.min()),
    )
