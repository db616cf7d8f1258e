"""Activation and norm: in plain operations and, on the CPU where nothing is compiled, by kernels in C++ with two
derivatives (``cpp/layer_binding.cpp``), of which the second in plain operations is a dozen passes over memory. Higher
ones are of plain operations.

With the normal distribution ``Φ`` and its density ``φ``, ``gelu = x Φ``, ``gelu' = Φ + x φ``, ``gelu'' = (2 − x²) φ``.
The norm of a row of ``H`` is ``y = r w x`` with ``r = (Σ x²/H + ε)^{-1/2}``; with ``s = Σ w g x`` its derivatives are
``r w g − (r³/H) s x`` by ``x`` and ``Σ r g x`` over rows by ``w``. For cotangents ``a`` and ``b`` of these, with
``t = Σ a x`` and ``u = Σ g (a w + b x) − 3 r² s t/H``, the second derivative is

    ∂/∂g = r (a w + b x) − (r³/H) t w x
    ∂/∂x = r b g − (r³/H) (s a + t w g + u x)
    ∂/∂w = Σ g (r a − (r³/H) t x) over rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from escaip.ops.cpp import has_kernels
from escaip.ops.inputs import accumulation_dtype
from escaip.ops.rows import is_traced, take_rows


def gelu(x: Tensor) -> Tensor:
    """``x Φ(x)``, exactly (arXiv 1606.08415), in the shape of ``x``; differentiable any number of times."""
    if _has_kernel(x):
        found: Tensor = torch.ops.escaip.gelu(x, None, None, None, None)
        return found
    return torch.nn.functional.gelu(x)


def gelu_of_rows(base: Tensor | None, first: Tensor, i: Tensor, second: Tensor, j: Tensor) -> Tensor:
    """``gelu(base + first[i] + second[j])``, whose sum is never kept; differentiable any number of times.

    Args:
        base: ``(T, H)``, or None for zero.
        first: ``(N, H)``.
        i: ``(T,)`` int64 in ``[0, N)``.
        second: ``(N, H)``.
        j: ``(T,)`` int64 in ``[0, N)``.

    Returns:
        ``(T, H)``.
    """
    if _has_kernel(first) and all(x is None or x.dtype == first.dtype for x in (base, second)):
        found: Tensor = torch.ops.escaip.gelu(base, first, second, i, j)
        return found
    return torch.nn.functional.gelu(add_rows(base, first, i, second, j))


def add_rows(base: Tensor | None, first: Tensor, i: Tensor, second: Tensor, j: Tensor) -> Tensor:
    """``base + first[i] + second[j]``; see ``gelu_of_rows``."""
    rows = take_rows(first, i)
    return (rows if base is None else base + rows) + take_rows(second, j)


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
    if type(x) not in (Tensor, torch.nn.Parameter):  # a tensor without numbers, for instance
        return False
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not is_traced() and has_kernels()


def _plain_norm(x: Tensor, weight: Tensor, floor: float) -> Tensor:
    wide = x.to(accumulation_dtype(x))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + floor) * weight).to(x.dtype)
