"""Differentiable geometry of the tokens: displacements, distances, directions and the log envelope.

Pure functions of positions and cell over a fixed topology, differentiable twice everywhere they are finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from escaip.graph.step import rank_step
from escaip.ops import sum_rows, take_rows
from escaip.types import Geometry, Graph, GraphSettings, TokenLayout


def compute_geometry(
    positions: Tensor,
    cell: Tensor,
    batch_index: Tensor,
    graph: Graph,
    settings: GraphSettings,
    dtype: torch.dtype,
) -> Geometry:
    """Evaluates the geometry of a graph's tokens.

    Args:
        positions: ``(N, 3)`` Å, float64.
        cell: ``(B, 3, 3)`` Å, float64; rows are lattice vectors.
        batch_index: ``(N,)`` int64, system of each atom.
        graph: token layout of these atoms, from :func:`escaip.graph.build_graph` at these positions.
        settings: what the graph was built with.
        dtype: of the results; displacements are formed in the dtype of ``positions`` before.

    Returns:
        Displacement, distance, direction and log envelope (model notes, section 2) of the ``T`` tokens.
    """
    return token_geometry(displacements(positions, cell, batch_index, graph), graph, settings, dtype)


def token_geometry(vector: Tensor, layout: TokenLayout, settings: GraphSettings, dtype: torch.dtype) -> Geometry:
    """Evaluates the geometry of a graph's tokens.

    Args:
        vector: ``(T + X, 3)`` Å, displacements of all rows. Lengths and directions are formed in their dtype: in
            float64 a float32 model's stress is several times more accurate.
        layout: of the tokens.
        settings: what the graph was built with.
        dtype: of the results.
    """
    length, inverse = _safe_norm(vector)
    num_tokens = layout.num_tokens
    distance, displacement = length.to(dtype), vector[:num_tokens]
    return Geometry(
        displacement=displacement.to(dtype),
        distance=distance[:num_tokens],
        direction=(displacement * inverse[:num_tokens, None]).to(dtype),
        log_envelope=_log_envelope(envelope_coordinate(distance, layout, settings), layout.self_token),
    )


def displacements(positions: Tensor, cell: Tensor, batch_index: Tensor, graph: Graph) -> Tensor:
    """``(T + X, 3)`` Å: ``r_j + S·cell − r_i`` of every row of a graph, see :func:`compute_geometry`."""
    vector = take_rows(positions, graph.neighbor) - take_rows(positions, graph.center)
    shift = graph.shift.to(positions.dtype)
    if len(cell) == 1:
        return vector + shift @ cell[0]
    row_cell = take_rows(cell, batch_index.index_select(0, graph.center))  # (T + X, 3, 3)
    return vector + (shift[:, :, None] * row_cell).sum(dim=1)


def _safe_norm(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Length and inverse length ``(R,)``; both, and all their derivatives, are 0 for a zero vector."""
    squared = vector.square().sum(dim=1)
    is_zero = squared == 0
    inverse = torch.where(is_zero, 1.0, squared).rsqrt()
    return torch.where(is_zero, 0.0, squared * inverse), torch.where(is_zero, 0.0, inverse)


def envelope_coordinate(distance: Tensor, layout: TokenLayout, settings: GraphSettings) -> Tensor:
    """``(T,)``: ``τ log(e^{rank/(kτ)} + e^{rank of the reverse/(kτ)} + e^{d/(r_c τ)})``, or ``d/r_c`` without k."""
    radial = distance[: layout.num_tokens] / settings.cutoff
    if settings.num_neighbors is None:
        return radial
    rank = layout.rank_base.to(distance.dtype)
    if layout.rank_token.numel():
        gap = take_rows(distance, layout.rank_token) - take_rows(distance, layout.rank_other)
        steps = rank_step(gap / settings.rank_scale, settings.rank_step)
        rank = rank + sum_rows(steps, layout.rank_token, layout.num_tokens)
    rank = rank / settings.num_neighbors
    scale = settings.envelope_scale
    return scale * torch.logsumexp(torch.stack([rank, rank[layout.reverse], radial], dim=1) / scale, dim=1)


def _log_envelope(x: Tensor, self_token: Tensor) -> Tensor:
    """``(T,)``: ``−x²/(1 − x²)``; 0 for self tokens, −inf (with zero derivatives) where ``x ≥ 1``."""
    squared = x.square()
    squared = squared.index_fill(0, self_token, 0.0)
    outside = squared >= 1.0
    inside = torch.where(outside, 0.0, squared)
    return torch.where(outside, -torch.inf, -inside / (1.0 - inside))
