"""Differentiable geometry of the tokens: displacements, distances, directions and the log envelope.

Pure functions of positions and cell over a fixed topology, differentiable twice everywhere they are finite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops import sum_rows, take_rows
from escaip.types import Geometry, Graph, GraphSettings, TokenLayout

SUPPORT = {"sine": math.pi, "bump": 4.0}
# The bump's exponent reaches ±800 here: its value is exactly 0 or 1 and its derivatives exactly 0 in float64.
_BUMP_EDGE = 0.9975


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
        graph: token layout of these atoms, from ``escaip.graph.build_graph`` at these positions.
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
    """Returns ``r_j + S·cell − r_i`` of every row of a graph, ``(T + X, 3)`` Å; see ``compute_geometry``."""
    vector = take_rows(positions, graph.neighbor) - take_rows(positions, graph.center)
    shift = graph.shift.to(positions.dtype)
    if len(cell) == 1:
        return vector + shift @ cell[0]
    row_cell = take_rows(cell, batch_index.index_select(0, graph.center))  # (T + X, 3, 3)
    return vector + (shift[:, :, None] * row_cell).sum(dim=1)


def _safe_norm(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Returns length and inverse length ``(R,)``; both, and all their derivatives, are 0 for a zero vector."""
    squared = vector.square().sum(dim=1)
    is_zero = squared == 0
    inverse = torch.where(is_zero, 1.0, squared).rsqrt()
    return torch.where(is_zero, 0.0, squared * inverse), torch.where(is_zero, 0.0, inverse)


def envelope_coordinate(distance: Tensor, layout: TokenLayout, settings: GraphSettings) -> Tensor:
    """Returns ``τ log(e^{rank/(kτ)} + e^{rank of the reverse/(kτ)} + e^{d/(r_c τ)})``, or ``d/r_c``; ``(T,)``."""
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
    """Returns ``−x²/(1 − x²)``, ``(T,)``; 0 for self tokens, −inf (with zero derivatives) where ``x ≥ 1``."""
    squared = x.square()
    squared = squared.index_fill(0, self_token, 0.0)
    outside = squared >= 1.0
    inside = torch.where(outside, 0.0, squared)
    return torch.where(outside, -torch.inf, -inside / (1.0 - inside))


def support_of(settings: GraphSettings) -> float:
    """Returns the gap in Å beyond which two distances no longer exchange rank."""
    if settings.num_neighbors is None or not settings.soft:
        return 0.0
    return step_support(settings.rank_step) * settings.rank_scale


def step_support(name: str) -> float:
    """Returns ``|x|`` beyond which the step is constant.

    Raises:
        ConfigError: no such step.
    """
    if name not in SUPPORT:
        raise ConfigError(f"rank_step {name!r} does not exist: choose {' or '.join(SUPPORT)}")
    return SUPPORT[name]


def rank_step(x: Tensor, name: str) -> Tensor:
    """Computes the step between two ranks: 0 where a neighbor is farther, 1 where it is nearer.

    ``x`` has any shape and no unit; derivatives are exactly 0 outside of its support.

    ``"sine"``: ``½ + ½ sin(x/2)`` for ``|x| < π`` (EScAIP, arXiv 2410.24169), continuous with its first
    derivative. ``"bump"``: ``e^{−2/(y+1)} / (e^{−2/(y+1)} + e^{−2/(1−y)})`` with ``y = x/4`` for ``|x| < 4``
    (AllScAIP, arXiv 2603.06567), evaluated as ``sigmoid(4y / (1 − y²))``; every derivative is continuous.

    Raises:
        ConfigError: no such step.
    """
    support = step_support(name)
    if name == "sine":
        return 0.5 + 0.5 * torch.sin(0.5 * x.clamp(-support, support))
    y = (x / support).clamp(-_BUMP_EDGE, _BUMP_EDGE)
    return torch.sigmoid(4.0 * y / (1.0 - y * y))
