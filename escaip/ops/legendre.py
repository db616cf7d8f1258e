"""Legendre polynomials of the angle between two bonds."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_L = 4


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


def legendre_derivatives(cosine: Tensor, l_max: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Evaluates ``P_l, P_l', P_l''`` for ``l = 0 .. l_max``.

    ``P_{l+1}' = P_{l-1}' + (2l + 1) P_l``, and the same relation one derivative higher.

    Args:
        cosine: any shape, cosine of the angle.
        l_max: highest degree, at least 0.

    Returns:
        ``l_max + 1`` triples of tensors of the shape of ``cosine``.
    """
    values = legendre_polynomials(cosine, l_max)
    zero = torch.zeros_like(cosine)
    first, second = [zero, torch.ones_like(cosine)], [zero, zero]
    for degree in range(1, l_max):
        first.append(first[degree - 1] + (2 * degree + 1) * values[degree])
        second.append(second[degree - 1] + (2 * degree + 1) * first[degree])
    return list(zip(values, first[: l_max + 1], second[: l_max + 1], strict=True))
