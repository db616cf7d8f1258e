"""Curves in feature space: a uniform quintic B-spline, evaluated at many points, differentiable any number of times.

A feature of a distance alone is a curve ``f: [0, r_c] → R^H``. A spline of degree five through its values at ``K + 1``
knots replaces it with an error that falls with the sixth power of the spacing (the fifth for its slope), and four
continuous derivatives. Coefficients come from values by the local quasi-interpolant that is exact for polynomials
of degree five (de Boor, A Practical Guide to Splines), so no system of equations is solved and gradients reach the
weights behind the values through five neighbors each.

With ``t`` a point in units of the spacing, ``i = ⌊t⌋`` and ``u = t − i``, the ``n``-th derivative is
``Σ_{j<6} B_j^(n)(u) c_{i+j}``. Three linear maps are closed under differentiation: evaluation ``I_n`` at every point,
its product with a cotangent ``D_n = Σ_H g · I_n``, and its transpose ``S_n`` onto the coefficients:

    ∂I_n/∂t = I_{n+1}        ∂D_n/∂t = D_{n+1}       ∂S_n/∂t = D_{n+1}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.cpp import has_kernels
from escaip.ops.rows import sum_rows, take_rows

DEGREE = 5
# A table has this many rows before the first knot and after the last but one.
GHOSTS = 4
# Row j: 120 · B_j in powers of u, for the six coefficients around an interval.
_BASIS = (
    (1.0, -5.0, 10.0, -10.0, 5.0, -1.0),
    (26.0, -50.0, 20.0, 20.0, -20.0, 5.0),
    (66.0, 0.0, -60.0, 0.0, 30.0, -10.0),
    (26.0, 50.0, 20.0, -20.0, -20.0, 10.0),
    (1.0, 5.0, 10.0, 10.0, 5.0, -5.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
)
_QUASI = (13.0 / 240.0, -112.0 / 240.0, 438.0 / 240.0)


def knots(num_intervals: int, end: float, *, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Points at which a curve on ``[0, end]`` must be known: the knots and four beyond either end.

    Returns:
        ``(num_intervals + 9,)``, in the unit of ``end``.
    """
    index = torch.arange(-GHOSTS, num_intervals + GHOSTS + 1, dtype=torch.float64, device=device)
    return (index * (end / num_intervals)).to(dtype)


def coefficients(values: Tensor) -> Tensor:
    """Turns values at ``knots`` into coefficients of the spline.

    Args:
        values: ``(K + 9, H)``.

    Returns:
        ``(K + 5, H)``; the six around interval ``i`` begin at row ``i``.
    """
    far, near, middle = _QUASI
    # Products of whole slices, not a convolution: exact order of five terms, in any precision, on any device.
    return middle * values[2:-2] + near * (values[1:-3] + values[3:-1]) + far * (values[:-4] + values[4:])


def interpolate(table: Tensor, point: Tensor) -> Tensor:
    """Evaluates the spline.

    Args:
        table: ``(K + 5, H)`` of ``coefficients``.
        point: ``(T,)`` in units of the spacing, in ``[0, K]``; outside, the polynomial of the nearest interval.

    Returns:
        ``(T, H)``, differentiable in both any number of times.

    Raises:
        ConfigError: fewer than six rows.
    """
    if table.shape[0] <= DEGREE:
        raise ConfigError(f"a spline table has {table.shape[0]} rows: it must have at least {DEGREE + 1}")
    if table.device.type != "cpu":
        return _plain(table, point, 0)  # for compilers that fuse it
    has_kernels()
    return spline_values(table, point, 0)


def _basis(u: Tensor, order: int) -> Tensor:
    """``(T, 6)``: the ``order``-th derivatives of the six basis functions."""
    if order > DEGREE:
        return u.new_zeros(len(u), DEGREE + 1)
    rows = []
    for powers in _BASIS:
        terms = list(powers)
        for _ in range(order):
            terms = [power * term for power, term in enumerate(terms)][1:]
        value = torch.full_like(u, terms[-1] / 120.0)
        for term in reversed(terms[:-1]):
            value = value * u + term / 120.0
        rows.append(value)
    return torch.stack(rows, dim=1)


def _locate(table_rows: int, point: Tensor) -> tuple[Tensor, Tensor]:
    """Interval ``(T,)`` int64 and place in it ``(T,)``."""
    interval = point.detach().floor().clamp(0, table_rows - DEGREE - 1)
    return interval.long(), point - interval


def _plain(table: Tensor, point: Tensor, order: int) -> Tensor:
    """``I_n`` in plain operations."""
    interval, u = _locate(table.shape[0], point)
    basis = _basis(u, order)
    value = basis[:, :1] * take_rows(table, interval)
    for j in range(1, DEGREE + 1):
        value = value + basis[:, j : j + 1] * take_rows(table, interval + j)
    return value


# The operators in plain PyTorch, for CPUs without the kernels of cpp/binding.cpp, which take their place when loaded.


@torch.library.custom_op("escaip::spline_values", mutates_args=())
def spline_values(table: Tensor, point: Tensor, order: int) -> Tensor:
    """``I_n``: ``(K + 5, H)``, ``(T,)`` to ``(T, H)``."""
    return _plain(table, point, order)


@torch.library.custom_op("escaip::spline_products", mutates_args=())
def spline_products(cotangent: Tensor, table: Tensor, point: Tensor, order: int) -> Tensor:
    """``D_n``: ``(T, H)``, ``(K + 5, H)``, ``(T,)`` to ``(T,)``."""
    return (cotangent * _plain(table, point, order)).sum(1)


@torch.library.custom_op("escaip::spline_transpose", mutates_args=())
def spline_transpose(cotangent: Tensor, point: Tensor, order: int, num_rows: int) -> Tensor:
    """``S_n``: ``(T, H)``, ``(T,)`` to ``(num_rows, H)``."""
    interval, u = _locate(num_rows, point)
    basis = _basis(u, order)
    table = cotangent.new_zeros(num_rows, cotangent.shape[1])
    for j in range(DEGREE + 1):
        table = table + sum_rows(basis[:, j : j + 1] * cotangent, interval + j, num_rows)
    return table


@spline_values.register_fake
def _(table: Tensor, point: Tensor, order: int) -> Tensor:
    return table.new_empty(point.shape[0], table.shape[1])


@spline_products.register_fake
def _(cotangent: Tensor, table: Tensor, point: Tensor, order: int) -> Tensor:
    return point.new_empty(point.shape[0])


@spline_transpose.register_fake
def _(cotangent: Tensor, point: Tensor, order: int, num_rows: int) -> Tensor:
    return cotangent.new_empty(num_rows, cotangent.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.order = inputs[2] if isinstance(inputs[2], int) else inputs[3]


def _values_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    table, point = ctx.saved_tensors
    to_table, to_point = ctx.needs_input_grad[:2]
    return (
        spline_transpose(grad, point, ctx.order, table.shape[0]) if to_table else None,
        spline_products(grad, table, point, ctx.order + 1) if to_point else None,
        None,
    )


def _products_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    cotangent, table, point = ctx.saved_tensors
    to_cotangent, to_table, to_point = ctx.needs_input_grad[:3]
    scaled = grad.unsqueeze(1)
    return (
        scaled * spline_values(table, point, ctx.order) if to_cotangent else None,
        spline_transpose(scaled * cotangent, point, ctx.order, table.shape[0]) if to_table else None,
        grad * spline_products(cotangent, table, point, ctx.order + 1) if to_point else None,
        None,
    )


def _transpose_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    cotangent, point = ctx.saved_tensors
    to_cotangent, to_point = ctx.needs_input_grad[:2]
    return (
        spline_values(grad, point, ctx.order) if to_cotangent else None,
        spline_products(cotangent, grad, point, ctx.order + 1) if to_point else None,
        None,
        None,
    )


spline_values.register_autograd(_values_backward, setup_context=_keep)
spline_products.register_autograd(_products_backward, setup_context=_keep)
spline_transpose.register_autograd(_transpose_backward, setup_context=_keep)
