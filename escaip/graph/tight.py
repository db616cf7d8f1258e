"""A graph with slack, less what does not count at the positions of the moment."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from escaip.graph.geometry import envelope_coordinate
from escaip.graph.settings import support_of
from escaip.types import Graph, GraphSettings

# What rounding in float32 may do to an envelope coordinate, and to a gap over the rank scale, times many.
_MARGIN = 1e-4


@torch.no_grad()
def tight_graph(graph: Graph, vector: Tensor, settings: GraphSettings) -> Graph:
    """Leaves out the tokens whose envelope is zero, and the comparisons of ranks that have become constant.

    A graph that is good for 0.3 Å has up to twice the tokens that count, and five times the comparisons. What is left
    out adds zero, or a whole number to a rank, so that results and all their derivatives stay the same to rounding.
    Everything is a handful of operations on the device, which is asked once: for the sizes.

    Args:
        graph: from :func:`escaip.graph.build_graph` with some slack.
        vector: ``(T + X, 3)`` Å, displacements of its rows at the present positions, which have not used up the slack.
        settings: what the graph was built with.

    Returns:
        The graph of the present positions. Tokens keep their order, which was by distance when the graph was built.
    """
    distance = vector.double().square().sum(dim=1).sqrt().float()
    num_rows, num_tokens = len(distance), graph.num_tokens
    token = envelope_coordinate(distance, graph, settings) < 1.0 + _MARGIN
    token &= token[graph.reverse]
    token.index_fill_(0, graph.self_token, True)

    gap = (distance[graph.rank_token] - distance[graph.rank_other]) / settings.rank_scale
    reach = support_of(settings) / settings.rank_scale + _MARGIN
    compared = (gap.abs() < reach) & token[graph.rank_token]
    base = graph.rank_base.index_add(0, graph.rank_token, (gap >= reach).double())

    row = torch.zeros(num_rows, dtype=torch.bool, device=distance.device)
    row.index_fill_(0, graph.rank_other.where(compared, graph.rank_other.new_zeros(())), True)
    row[:num_tokens] &= ~token  # tokens come first, and what others are compared with after them
    before = torch.cat([token.new_zeros(1, dtype=torch.int64), token.cumsum(0)])
    offsets = before[graph.offsets]
    longest = offsets.diff().max() if graph.num_atoms else before[-1]
    sizes = torch.stack([before[-1], row.sum(), compared.sum(), longest]).tolist()
    kept_tokens, kept_rows, kept_pairs, max_neighborhood = sizes

    of_token, of_pair = _places(token, kept_tokens), _places(compared, kept_pairs)
    rows = torch.cat([of_token, _places(row, kept_rows)])
    moved = torch.empty(num_rows, dtype=torch.int64, device=distance.device)
    moved[rows] = torch.arange(len(rows), device=distance.device)
    return replace(
        graph,
        offsets=offsets,
        center=graph.center[rows],
        neighbor=graph.neighbor[rows],
        shift=graph.shift[rows],
        reverse=moved[graph.reverse[of_token]],
        self_token=offsets[:-1].clone(),
        rank_base=base[of_token],
        rank_token=moved[graph.rank_token[of_pair]],
        rank_other=moved[graph.rank_other[of_pair]],
        max_neighborhood=max_neighborhood,
    )


def _places(mask: Tensor, count: int) -> Tensor:
    """``(count,)`` int64: where a mask of so many true entries is true."""
    return mask.nonzero().squeeze(1) if mask.device.type == "cpu" else _scattered(mask, count)


def _scattered(mask: Tensor, count: int) -> Tensor:
    """As :func:`_places`, without asking the device for the number."""
    target = torch.where(mask, mask.cumsum(0) - 1, count)  # all others to one place behind the end
    found = torch.empty(count + 1, dtype=torch.int64, device=mask.device)
    return found.scatter_(0, target, torch.arange(len(mask), device=mask.device))[:count]
