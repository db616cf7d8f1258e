"""Activation and norm: in plain operations and, on the CPU where nothing is compiled, by kernels in C++ with two
derivatives, of which the second in plain operations is a dozen passes over memory.

With the normal distribution ``Φ`` and its density ``φ``, ``gelu = x Φ``, ``gelu' = Φ + x φ``, ``gelu'' = (2 − x²) φ``.
The norm of a row of ``H`` is ``y = r w x`` with ``r = (Σ x²/H + ε)^{-1/2}``; with ``s = Σ w g x`` its derivatives are
``r w g − (r³/H) s x`` by ``x`` and ``Σ r g x`` over rows by ``w``. For cotangents ``a`` and ``b`` of these, with
``t = Σ a x`` and ``u = Σ g (a w + b x) − 3 r² s t/H``, the second derivative is

    ∂/∂g = r (a w + b x) − (r³/H) t w x
    ∂/∂x = r b g − (r³/H) (s a + t w g + u x)
    ∂/∂w = Σ g (r a − (r³/H) t x) over rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from escaip.ops.cpp import has_kernels
from escaip.ops.inputs import accumulation_dtype
from escaip.ops.rows import is_traced


def gelu(x: Tensor) -> Tensor:
    """``x Φ(x)``, exactly (arXiv 1606.08415), in the shape of ``x``; differentiable any number of times."""
    if _has_kernel(x):
        found: Tensor = torch.ops.escaip.gelu(x)
        return found
    return torch.nn.functional.gelu(x)


def rms_norm(x: Tensor, weight: Tensor, floor: float) -> Tensor:
    """Root-mean-square norm with a weight (arXiv 1910.07467), differentiable any number of times.

    Args:
        x: ``(..., H)``.
        weight: ``(H,)``.
        floor: ``ε``.

    Returns:
        ``(..., H)`` in the dtype of ``x``, computed in float32 or more.
    """
    if _has_kernel(x) and weight.dtype == x.dtype:
        found: Tensor = torch.ops.escaip.rms_norm(x, weight, floor)
        return found
    return _plain_norm(x, weight, floor)


def _has_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not is_traced() and has_kernels()


def _plain_norm(x: Tensor, weight: Tensor, floor: float) -> Tensor:
    wide = x.to(accumulation_dtype(x))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + floor) * weight).to(x.dtype)


def _define(name: str, schema: str, fake: Any, backward: Any) -> None:
    """Defines an operator of ``cpp/binding.cpp``."""
    torch.library.define(f"escaip::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"escaip::{name}", fake)
    torch.library.register_autograd(f"escaip::{name}", backward, setup_context=_keep)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.constants = tuple(x for x in inputs if not isinstance(x, Tensor))


def _like(*places: int) -> Any:
    """A fake whose results have the shapes of these arguments."""

    def fake(*inputs: Any) -> Any:
        found = tuple(torch.empty_like(inputs[place], memory_format=torch.contiguous_format) for place in places)
        return found[0] if len(found) == 1 else found

    return fake


def _differentiate(name: str) -> Any:
    """By the operator of the next derivative, which takes cotangents first."""

    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        found = getattr(torch.ops.escaip, name)(*cotangents, *ctx.saved_tensors, *ctx.constants)
        return (*(found if isinstance(found, tuple) else (found,)), *(None for _ in ctx.constants))

    return backward


def _third(function: Any, number: int) -> Any:
    """Derivatives of a second derivative, in plain operations."""

    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        with torch.enable_grad():
            here = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
            tangents, (grad, *leaves) = here[:number], here[number:]
            first = torch.autograd.grad(function(*leaves, *ctx.constants), leaves, grad, create_graph=True)
            second = torch.autograd.grad(first, [grad, *leaves], tangents, create_graph=True, materialize_grads=True)
            found = torch.autograd.grad(
                second, here, cotangents, create_graph=torch.is_grad_enabled(), materialize_grads=True
            )
        return (*found, *(None for _ in ctx.constants))

    return backward


_define("gelu", "(Tensor x) -> Tensor", _like(0), _differentiate("gelu_backward"))
_define("gelu_backward", "(Tensor grad, Tensor x) -> Tensor", _like(1), _differentiate("gelu_double_backward"))
_define(
    "gelu_double_backward", "(Tensor tangent, Tensor grad, Tensor x) -> (Tensor, Tensor)", _like(1, 2),
    _third(torch.nn.functional.gelu, 1),
)  # fmt: skip
_NORM = "Tensor x, Tensor weight, float floor"
_define("rms_norm", f"({_NORM}) -> Tensor", _like(0), _differentiate("rms_norm_backward"))
_define(
    "rms_norm_backward", f"(Tensor grad, {_NORM}) -> (Tensor, Tensor)", _like(1, 2),
    _differentiate("rms_norm_double_backward"),
)  # fmt: skip
_define(
    "rms_norm_double_backward", f"(Tensor to_x, Tensor to_weight, Tensor grad, {_NORM}) -> (Tensor, Tensor, Tensor)",
    _like(2, 3, 4), _third(_plain_norm, 2),
)  # fmt: skip
