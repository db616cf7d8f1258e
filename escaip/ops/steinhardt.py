"""Sums over pairs of bonds of an atom, for its bond-orientational order, in C++ with two derivatives.

By the addition theorem the norm over ``m`` of ``Σ_j w_j Ŷ_lm(n_j)`` needs no harmonics:

    N_l = Σ_jk w_j w_k P_l(n_j · n_k)

with the Legendre polynomials ``P_l``; a token without a direction counts in ``l = 0`` only. With cotangents ``g_l`` and
``f(c) = Σ_l g_l P_l(c)`` the first derivative is

    ∂/∂w_j = 2 Σ_k w_k f(c_jk)        ∂/∂n_j = 2 w_j Σ_k w_k f'(c_jk) n_k

and for cotangents ``a_j`` and ``b_j`` of these two, with ``s_jk = b_j · n_k + b_k · n_j``, the second is

    ∂/∂g_l = 2 Σ_jk [a_j w_k P_l(c_jk) + w_j w_k P_l'(c_jk) b_j · n_k]
    ∂/∂w_j = 2 Σ_k [a_k f(c_jk) + w_k f'(c_jk) s_jk]
    ∂/∂n_j = 2 Σ_k {[(a_j w_k + a_k w_j) f'(c_jk) + w_j w_k f''(c_jk) s_jk] n_k + w_j w_k f'(c_jk) b_k}

The polynomial extends off the unit sphere otherwise than the solid harmonics do, which a direction never notices: it is
a displacement over its length, whose derivative has no part along it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.native.build import SCALARS, compiled, library


def has_kernels(x: Tensor) -> bool:
    """Whether :func:`pair_power` takes tensors like this one here."""
    return x.device.type == "cpu" and x.dtype in SCALARS and compiled(SCALARS[x.dtype], "orientation")


def pair_power(direction: Tensor, weight: Tensor, offsets: Tensor, l_max: int) -> Tensor:
    """``N_l`` of every atom.

    Args:
        direction: ``(T, 3)`` unit vectors, or zero.
        weight: ``(T,)``.
        offsets: ``(N + 1,)`` int64; tokens of an atom are consecutive.
        l_max: highest degree, at most 16.

    Returns:
        ``(N, l_max + 1)``, differentiable twice in ``direction`` and ``weight``.
    """
    return orientation_value(direction, weight, offsets, l_max)


@torch.library.custom_op("escaip::orientation", mutates_args=())
def orientation_value(direction: Tensor, weight: Tensor, offsets: Tensor, l_max: int) -> Tensor:
    """The value, see :func:`pair_power`."""
    out = direction.new_empty(offsets.numel() - 1, l_max + 1)
    _call("value", (direction, weight), offsets, (out,), out.shape)
    return out


@torch.library.custom_op("escaip::orientation_backward", mutates_args=())
def orientation_backward(grad: Tensor, direction: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``(T, 3)`` and ``(T,)`` for cotangents ``(N, l_max + 1)``."""
    results = torch.zeros_like(direction), torch.zeros_like(weight)
    _call("backward", (grad, direction, weight), offsets, results, grad.shape)
    return results


@torch.library.custom_op("escaip::orientation_double_backward", mutates_args=())
def orientation_double_backward(
    to_direction: Tensor, to_weight: Tensor, grad: Tensor, direction: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``grad``, direction and weight for cotangents of what the backward returns."""
    results = torch.empty(grad.shape, dtype=grad.dtype), torch.zeros_like(direction), torch.zeros_like(weight)
    _call("double_backward", (to_direction, to_weight, grad, direction, weight), offsets, results, grad.shape)
    return results


def _call(
    name: str, inputs: tuple[Tensor, ...], offsets: Tensor, results: tuple[Tensor, ...], shape: tuple[int, ...]
) -> None:
    """Calls ``escaip_orientation_<name>``, which writes the results; contiguous copies live until it returns."""
    dtype = results[0].dtype
    held = [*(x.to(dtype).contiguous() for x in inputs), offsets.contiguous()]
    sizes = (*shape, torch.get_num_threads())
    function = getattr(library(SCALARS[dtype], "orientation"), f"escaip_orientation_{name}")
    pointers = [[ctypes.c_void_p(x.data_ptr()) for x in group] for group in (held, results)]
    function(*pointers[0], *map(ctypes.c_int64, sizes), *pointers[1])


# Called by kernels of the dispatcher (escaip.ops.native.operators) for what they do not serve.
for _served in (orientation_value, orientation_backward):
    torch.library.custom_op(f"{_served._qualname}_in_python", _served._init_fn, mutates_args=())


@orientation_value.register_fake
def _(direction: Tensor, weight: Tensor, offsets: Tensor, l_max: int) -> Tensor:
    return direction.new_empty(offsets.shape[0] - 1, l_max + 1)


@orientation_backward.register_fake
def _(grad: Tensor, direction: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(direction), torch.empty_like(weight)


@orientation_double_backward.register_fake
def _(
    to_direction: Tensor, to_weight: Tensor, grad: Tensor, direction: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(direction), torch.empty_like(weight)


def _keep_value(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate_value(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*orientation_backward(grad, *ctx.saved_tensors), None, None)


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_backward(ctx: Any, to_direction: Tensor, to_weight: Tensor) -> tuple[Any, ...]:
    return (*orientation_double_backward(to_direction, to_weight, *ctx.saved_tensors), None)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _third_derivative(ctx: Any, *_: Any) -> None:
    raise ConfigError(
        "the bond-orientational order has two derivatives on the CPU, and a third was asked for: compute it in plain "
        "operations, with escaip.graph.bond_orientational_order(..., offsets=None)"
    )


orientation_value.register_autograd(_differentiate_value, setup_context=_keep_value)
orientation_backward.register_autograd(_differentiate_backward, setup_context=_keep_backward)
orientation_double_backward.register_autograd(_third_derivative, setup_context=_keep_nothing)
