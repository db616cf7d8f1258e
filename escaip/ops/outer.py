"""Sums of outer products over the tokens of each atom: on a GPU an operator in Triton, which with its derivative is
closed under differentiation, any number of times.

With ``i(t)`` the atom of a token,

    A_i = Σ_{t: i(t) = i} x_t ⊗ y_t        ∂/∂x_t = G_i(t) y_t        ∂/∂y_t = G_i(t)ᵀ x_t

for a cotangent ``G`` of ``A``; and the derivatives of ``G_i(t) y_t`` are ``A`` of its cotangents and ``y``, and ``Gᵀ``
times its cotangents.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from escaip.ops import triton
from escaip.ops.rows import sum_rows


def sum_outer(x: Tensor, y: Tensor, center: Tensor, num_atoms: int, offsets: Tensor | None = None) -> Tensor:
    """Computes ``A_i = Σ x_t ⊗ y_t`` over the tokens of each atom, differentiable any number of times.

    Args:
        x: ``(T, C)``.
        y: ``(T, M)``.
        center: ``(T,)`` int64, atom of each token.
        num_atoms: ``N``.
        offsets: ``(N + 1,)`` int64 where the tokens of an atom are consecutive, for the GPU.

    Returns:
        ``(N, C, M)``.
    """
    if offsets is not None and y.is_cuda and y.dtype == torch.float32 and triton.availability() is None:
        found: Tensor = torch.ops.escaip.sum_outer(x.float(), y, offsets)
        return found
    return sum_rows((x.unsqueeze(-1) * y.unsqueeze(1)).flatten(1), center, num_atoms).view(num_atoms, x.shape[1], -1)


def _kernels() -> Any:
    return importlib.import_module("escaip.ops.triton.outer")


@torch.library.custom_op("escaip::sum_outer", mutates_args=())
def _sum_outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    found: Tensor = _kernels().sum_outer(x, y, offsets)
    return found


@torch.library.custom_op("escaip::apply_rows", mutates_args=())
def _apply_rows(factors: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    found: Tensor = _kernels().apply(factors, y, offsets)
    return found


@_sum_outer.register_fake
def _(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], y.shape[1])


@_apply_rows.register_fake
def _(factors: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    return y.new_empty(y.shape[0], factors.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_sum(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, y, offsets = ctx.saved_tensors
    return _apply_rows(grad, y, offsets), _apply_rows(grad.transpose(1, 2), x, offsets), None


def _differentiate_apply(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    factors, y, offsets = ctx.saved_tensors
    return _sum_outer(grad, y, offsets), _apply_rows(factors.transpose(1, 2), grad, offsets), None


_sum_outer.register_autograd(_differentiate_sum, setup_context=_keep)
_apply_rows.register_autograd(_differentiate_apply, setup_context=_keep)
