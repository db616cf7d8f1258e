"""Neighborhood attention on padded, batched matrices: all derivatives.

Tokens are laid out as ``(N, h, M, d)`` with ``M`` the longest neighborhood. Padding carries a log envelope of −inf,
so it takes no part as key, and its rows as query are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from escaip.ops.reference import legendre_polynomials


@dataclass(frozen=True)
class Padding:
    """Places of the tokens of ``N`` neighborhoods when each is padded to the longest, ``M``.

    Attributes:
        slot: ``(T,)`` int64, place of each token among ``N * M``.
        shape: ``(N, M)``.
    """

    slot: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, offsets: Tensor, num_tokens: int) -> Padding:
        """Lays out neighborhoods ``offsets[i] : offsets[i + 1]``; reads the longest from the device."""
        sizes = offsets.diff()
        longest = int(sizes.max())
        shift = torch.arange(sizes.numel(), device=offsets.device) * longest - offsets[:-1]
        tokens = torch.arange(num_tokens, device=offsets.device)
        slot = tokens + torch.repeat_interleave(shift, sizes, output_size=num_tokens)
        return cls(slot, (sizes.numel(), longest))

    def pad(self, tokens: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """``(T, ...)`` to ``(N, M, ...)``, with ``fill``, broadcast over a token, where there is none."""
        count = self.shape[0] * self.shape[1]
        if count > tokens.shape[0]:
            fill = torch.as_tensor(fill, dtype=tokens.dtype, device=tokens.device)
            tokens = fill.expand(count, *tokens.shape[1:]).index_copy(0, self.slot, tokens)
        return tokens.unflatten(0, self.shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """``(N, M, ...)`` to ``(T, ...)``."""
        return padded.flatten(0, 1).index_select(0, self.slot)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_envelope: Tensor,
    direction: Tensor,
    offsets: Tensor,
    angular_channels: tuple[int, ...] | None,
    scale: float,
    self_queries_only: bool = False,
    dropout: float = 0.0,
    angular_values: bool = False,
) -> Tensor:
    """See ``escaip.ops.neighborhood_attention``; differentiable any number of times."""
    padding = Padding.of(offsets, k.shape[0])
    keys = padding.pad(k).transpose(1, 2)  # (N, h, M, d)
    values = padding.pad(v).transpose(1, 2)
    bias = padding.pad(log_envelope, -torch.inf)[:, None, None, :]  # (N, 1, 1, M)
    weights = None
    if self_queries_only:
        width = q.shape[-1] if angular_channels is None else angular_channels[0]
        logits = q[:, :, None, :width] @ keys[..., :width].transpose(-1, -2)  # (N, h, 1, M)
    else:
        queries = padding.pad(q).transpose(1, 2)
        logits, weights = _angular_logits(queries, keys, padding.pad(direction), angular_channels)
    probability = torch.softmax(scale * logits + bias, -1)
    if dropout > 0.0:
        probability = torch.nn.functional.dropout(probability, dropout)
    if weights is None or not angular_values:
        attended = probability @ values  # (N, h, M or 1, d)
    else:
        parts = zip(weights, values.split(angular_channels, -1), strict=True)
        attended = torch.cat([probability * weight.unsqueeze(1) @ part for weight, part in parts], -1)
    if self_queries_only:
        return attended.squeeze(2)
    return padding.unpad(attended.transpose(1, 2))


def _angular_logits(
    queries: Tensor, keys: Tensor, direction: Tensor, angular_channels: tuple[int, ...] | None
) -> tuple[Tensor, list[Tensor] | None]:
    """``Σ_l P_l(n_j·n_k) (q_j^l · k_k^l)``, and the weights of the values by degree, ``(N, M, M)``, with angles.

    Args:
        queries: ``(N, h, M, d)``.
        keys: ``(N, h, M, d)``.
        direction: ``(N, M, 3)``.
        angular_channels: channels per degree; None for no angles.
    """
    if angular_channels is None:
        return queries @ keys.transpose(-1, -2), None
    cosine = direction @ direction.transpose(-1, -2)  # (N, M, M)
    has_direction = (direction != 0).any(-1)
    angular = (has_direction.unsqueeze(-1) & has_direction.unsqueeze(-2)).to(queries.dtype)
    query_groups = queries.split(angular_channels, -1)
    key_groups = keys.split(angular_channels, -1)
    polynomials = legendre_polynomials(cosine, len(angular_channels) - 1)
    logits = query_groups[0] @ key_groups[0].transpose(-1, -2)  # P_0 = 1, self tokens included
    for degree in range(1, len(angular_channels)):
        if angular_channels[degree]:
            products = query_groups[degree] @ key_groups[degree].transpose(-1, -2)
            logits = logits + (polynomials[degree] * angular).unsqueeze(1) * products
    return logits, [polynomial * angular + (1 - angular) for polynomial in polynomials]
