"""The tokens of a batch: built from its neighbors, pruned, and processed in chunks of whole neighborhoods."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from escaip.errors import ConfigError, DataError, UsageError
from escaip.graph.geometry import envelope_coordinate, step_support, support_of
from escaip.graph.knn import reference_graph
from escaip.graph.native import has_kernels, native_graph
from escaip.graph.systems import Systems
from escaip.types import Geometry, Graph, GraphSettings, NeighborList, TokenLayout, Tokens

T = TypeVar("T")
# Rounding of an envelope coordinate, or of a gap over the rank scale, in float32, many times over.
_MARGIN = 1e-4


@torch.no_grad()
def build_graph(
    batch: Any, settings: GraphSettings, neighbors: NeighborList | None = None, graph_skin: float = 0.0
) -> Graph:
    """Builds the packed token layout of a batch.

    Args:
        batch: PyG batch (or one structure) with ``positions (N, 3)`` Å, ``cell (B, 3, 3)`` Å, ``pbc (B, 3)``,
            ``batch (N,)`` and ``ptr (B + 1,)``.
        settings: radius, k and the shape of the ranks.
        neighbors: a list that is complete up to ``search_cutoff(settings) + graph_skin`` or beyond at the present
            positions; it is filtered by present distances, so the result is that of a fresh build. None to search.
        graph_skin: Å by which distances may change before the graph must be built again. It then has every token and
            every comparison of ranks that may come to count; the log envelope of the others is ``−inf``.

    Raises:
        ConfigError: a setting is out of range.
        DataError: see ``escaip.graph.neighbor_list``; or a periodic structure for settings that know none.
        UsageError: ``neighbors`` does not reach far enough, or ``graph_skin`` is negative, or positive for hard or
            truncated ranks, which may change with any distance.
    """
    cutoff = search_cutoff(settings) + check_skin(graph_skin, settings)
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
        graph = native_graph(systems, settings, neighbors, cutoff, graph_skin)
        if graph is not None:
            return graph
    systems.check()
    return reference_graph(systems, settings, neighbors, cutoff, graph_skin)


def attached_neighbors(batch: Any) -> NeighborList | None:
    """Returns the neighbor list that a loader attached to a batch, None where it did not."""
    if getattr(batch, "edge_shift", None) is None:
        return None
    return NeighborList(
        center=batch.edge_index[0],
        neighbor=batch.edge_index[1],
        shift=batch.edge_shift,
        cutoff=float(batch.edge_cutoff.min()),
    )


def search_cutoff(settings: GraphSettings) -> float:
    """Returns the radius in Å within which an atom can influence a token: ``r_c``, plus the step's support.

    Raises:
        ConfigError: a setting is out of range.
    """
    check_settings(settings)
    return settings.cutoff + support_of(settings)


def check_skin(skin: float, settings: GraphSettings) -> float:
    """Returns the skin of a graph.

    Raises:
        UsageError: it is negative, or positive for ranks that may change with any distance.
    """
    if not (skin >= 0.0 and math.isfinite(skin)):
        raise UsageError(f"graph_skin is {skin}: it must be 0 or more Å")
    if skin > 0.0 and settings.num_neighbors is not None:
        if not settings.soft:
            raise UsageError(f"graph_skin is {skin:g} Å, but hard ranks change with any distance: leave it out")
        if settings.rank_truncation is not None:
            raise UsageError(f"graph_skin is {skin:g} Å, but truncated ranks change with any distance: leave it out")
    return skin


def check_settings(settings: GraphSettings) -> None:
    """Raises ConfigError for a setting that is out of range."""
    for name in ("cutoff", "rank_scale", "envelope_scale"):
        value = getattr(settings, name)
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"graph setting {name} is {value}: it must be a positive number")
    if settings.num_neighbors is not None and settings.num_neighbors < 1:
        raise ConfigError(
            f"graph setting num_neighbors is {settings.num_neighbors}: it must be at least 1, or None for a plain "
            "radius graph"
        )
    if settings.rank_truncation is not None and settings.rank_truncation < 0:
        raise ConfigError(f"graph setting rank_truncation is {settings.rank_truncation}: it must be None or at least 0")
    step_support(settings.rank_step)


@torch.no_grad()
def prune_graph(graph: Graph, vector: Tensor, settings: GraphSettings) -> Graph:
    """Drops tokens whose envelope is zero at the present positions, and comparisons of ranks that are constant.

    A graph with a skin of 0.3 Å has up to twice the tokens that count, and five times the comparisons. Dropped entries
    add zero, or a whole number to a rank, so results and all their derivatives change by rounding only. The host waits
    once for the device, for the sizes.

    Args:
        graph: from ``escaip.graph.build_graph`` with a skin.
        vector: ``(T + X, 3)`` Å, displacements of its rows at the present positions, within the skin.
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
    """Returns the indices of the ``count`` true entries of a mask."""
    return mask.nonzero().squeeze(1) if mask.device.type == "cpu" else _scattered(mask, count)


def _scattered(mask: Tensor, count: int) -> Tensor:
    """Does the same without waiting for the device."""
    target = torch.where(mask, mask.cumsum(0) - 1, count)  # all others to one place behind the end
    found = torch.empty(count + 1, dtype=torch.int64, device=mask.device)
    return found.scatter_(0, target, torch.arange(len(mask), device=mask.device))[:count]


class TokenChunks:
    """All tokens of a batch, in chunks that a model processes one after the other.

    A model states what happens to tokens; the chunks decide how many are processed at once, in which precision, and
    what is kept for the derivative. Results do not depend on any of that beyond rounding.

    Args:
        layout: of all tokens.
        geometry: of the same tokens.
        max_tokens: of a chunk, unless one neighborhood alone has more; None for a single chunk.
        recompute: share of the calls of which only the inputs are kept; the calls are repeated when the derivative is
            taken (activation checkpointing, arXiv 1604.06174).
        rounded: half precision for products within the calls (autocast); None for that of the inputs.

    Attributes:
        layout: as given.
        chunks: in order; together they are all atoms and all tokens.
    """

    def __init__(
        self,
        layout: TokenLayout,
        geometry: Geometry,
        max_tokens: int | None = None,
        recompute: float = 0.0,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.layout = layout
        self.chunks = split_tokens(layout, geometry, max_tokens)
        self._recompute, self._rounded, self._due = recompute, rounded, 0.0

    def map(self, function: Callable[..., T], *values: Sequence[Any]) -> list[T]:
        """Applies a function to each chunk.

        Args:
            function: takes the ``Tokens`` of a chunk, then what each of ``values`` holds for it. It
                may be called again later, so variables that it closes over must not be assigned anew.
            values: one entry for each chunk, as another call of this method returns them.

        Returns:
            The results, one for each chunk.
        """
        return [self._call(function, *arguments) for arguments in zip(self.chunks, *values, strict=True)]

    def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        device = self.layout.offsets.device.type
        with contextlib.nullcontext() if self._rounded is None else torch.autocast(device, self._rounded):
            self._due += self._recompute
            if self._due < 1.0:
                return function(*arguments)
            self._due -= 1.0
            return checkpoint(function, *arguments, use_reentrant=False)


def split_tokens(layout: TokenLayout, geometry: Geometry, max_tokens: int | None = None) -> list[Tokens]:
    """Divides the tokens into chunks of whole neighborhoods; see ``TokenChunks``."""
    center, neighbor = layout.token_center, layout.token_neighbor
    if max_tokens is None or layout.num_tokens <= max_tokens:
        whole = (layout.offsets, layout.self_token, center, neighbor)
        return [Tokens(0, *whole, geometry.distance, geometry.direction, geometry.log_envelope)]
    ends = _cuts(layout.offsets.tolist(), max_tokens)
    starts = [0, *ends[:-1]]
    bounds = layout.offsets[[0, *ends]]
    # The derivative of a split is one concatenation; that of a slice would be as large as the whole.
    rows = [
        x.split(bounds.diff().tolist())
        for x in (center, neighbor, geometry.distance, geometry.direction, geometry.log_envelope)
    ]
    places = [
        (first, layout.offsets[first : end + 1] - offset, layout.self_token[first:end] - offset)
        for first, end, offset in zip(starts, ends, bounds, strict=False)
    ]
    return [Tokens(*place, *chunk) for place, *chunk in zip(places, *rows, strict=True)]


def _cuts(offsets: list[int], max_tokens: int) -> list[int]:
    """Returns the ends of runs of neighborhoods with at most ``max_tokens`` tokens, or one neighborhood, each."""
    ends, start = [], 0
    for atom in range(1, len(offsets)):
        if offsets[atom] - start > max_tokens and offsets[atom - 1] > start:
            ends.append(atom - 1)
            start = offsets[atom - 1]
    return [*ends, len(offsets) - 1]
