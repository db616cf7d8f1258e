"""Legendre polynomials of the angle between two bonds."""

from __future__ import annotations

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
