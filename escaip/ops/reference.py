"""The specification: neighborhood attention written out pair by pair.

Every (query, key) pair of every neighborhood is one row, softmax is a segmented sum, and
autograd differentiates it as often as asked. Nothing is padded and nothing is fused: other
backends are held against this one in value, gradient and double gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_L = 4


def neighborhood_pairs(offsets: Tensor, self_queries_only: bool) -> tuple[Tensor, Tensor]:
    """Lists all (query, key) pairs within each neighborhood.

    Args:
        offsets: ``(N + 1,)`` int64.
        self_queries_only: the queries are the ``N`` self tokens alone.

    Returns:
        ``query (P,)``, an index into the queries, and ``key (P,)``, an index into the tokens;
        sorted by query.
    """
    sizes = offsets.diff()
    atoms = torch.arange(sizes.numel(), device=offsets.device)
    owner = atoms if self_queries_only else torch.repeat_interleave(atoms, sizes)
    keys_per_query = sizes[owner]
    query = torch.repeat_interleave(torch.arange(owner.numel(), device=offsets.device), keys_per_query)
    first = torch.cumsum(keys_per_query, 0) - keys_per_query
    key = offsets[:-1][owner][query] + torch.arange(query.numel(), device=offsets.device) - first[query]
    return query, key


def reference_attention(
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
    query, key = neighborhood_pairs(offsets, self_queries_only)
    num_queries, values = q.shape[0], v[key]  # (P, h, d)
    products = q[query] * k[key]  # (P, h, d)
    if angular_channels is None or self_queries_only:
        # Without angles one group; a self token sees only the group l = 0 (its direction is zero).
        width = q.shape[-1] if angular_channels is None else angular_channels[0]
        logits = products[..., :width].sum(-1)
    else:
        cosine = (direction[query] * direction[key]).sum(-1)
        has_direction = (direction != 0).any(-1)
        angular = (has_direction[query] & has_direction[key]).to(q.dtype)
        logits = torch.zeros_like(products[..., 0])
        groups = products.split(angular_channels, -1)
        polynomials = legendre_polynomials(cosine, len(angular_channels) - 1)
        for degree, polynomial in enumerate(polynomials):
            weight = polynomial * angular if degree else polynomial
            logits = logits + weight.unsqueeze(-1) * groups[degree].sum(-1)
        if angular_values:
            weights = [polynomial * angular + (1 - angular) for polynomial in polynomials]
            parts = zip(weights, values.split(angular_channels, -1), strict=True)
            values = torch.cat([weight[:, None, None] * part for weight, part in parts], -1)
    logits = scale * logits + log_envelope[key].unsqueeze(-1)  # (P, h)

    rows = query.unsqueeze(-1).expand_as(logits)
    largest = logits.new_full((num_queries, logits.shape[1]), -torch.inf)
    largest = largest.scatter_reduce(0, rows, logits.detach(), "amax")
    exponential = (logits - largest[query]).exp()
    total = torch.zeros_like(largest).index_add(0, query, exponential)
    probability = exponential / total[query]
    if dropout > 0.0:
        probability = torch.nn.functional.dropout(probability, dropout)
    return torch.zeros_like(q).index_add(0, query, probability.unsqueeze(-1) * values)


def legendre_polynomials(cosine: Tensor, l_max: int) -> list[Tensor]:
    """Evaluates ``P_0 .. P_l_max`` by Bonnet's recursion.

    Args:
        cosine: any shape, cosine of the angle.
        l_max: highest degree, at least 0.

    Returns:
        ``l_max + 1`` tensors of the shape of ``cosine``.
    """
    polynomials = [cosine.new_ones(()).expand_as(cosine), cosine]
    for degree in range(1, l_max):
        following = ((2 * degree + 1) * cosine * polynomials[degree] - degree * polynomials[degree - 1]) / (degree + 1)
        polynomials.append(following)
    return polynomials[: l_max + 1]
