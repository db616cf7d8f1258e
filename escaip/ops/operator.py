"""Attention as registered PyTorch operators: value, first and second derivative, each an operator of its own.

A kernel family (``blocked``, ``native``, ``triton``) is three functions (:class:`escaip.ops.problem.Family`). Behind
custom operators they are opaque to ``torch.compile``, which sees shapes only, and autograd goes from each to the next;
a third derivative is refused.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.problem import Family, Gradients, Problem, Result, accumulation_dtype

FAMILIES = ("blocked", "native", "triton")


def kernel_family(name: str) -> Family:
    """The module with the three functions; imported when first asked for."""
    return cast(Family, importlib.import_module(f"escaip.ops.{name}"))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_envelope: Tensor | None,
    direction: Tensor | None,
    query_offsets: Tensor,
    key_offsets: Tensor,
    widths: list[int],
    scale: float,
    family: str,
) -> tuple[Tensor, Tensor]:
    """The attended values and the log of the softmax normaliser, which carries no gradient; arguments of `Problem`."""
    problem = Problem(q, k, v, log_envelope, direction, query_offsets, key_offsets, tuple(widths), scale)
    with _full_precision(q):
        return kernel_family(family).forward(problem)


def _attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_envelope: Tensor | None,
    direction: Tensor | None,
    query_offsets: Tensor,
    key_offsets: Tensor,
    out: Tensor,
    lse: Tensor,
    widths: list[int],
    scale: float,
    family: str,
    with_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log envelope and direction; the last two are empty where there is none."""
    problem = Problem(q, k, v, log_envelope, direction, query_offsets, key_offsets, tuple(widths), scale)
    with _full_precision(q):
        gradients = kernel_family(family).backward(problem, Result(out, lse), grad_out, with_direction)
    return _without_none(gradients)


attention = torch.library.custom_op("escaip::attention", _attend, mutates_args=())
attention_backward = torch.library.custom_op("escaip::attention_backward", _attend_backward, mutates_args=())
# Where kernels of the dispatcher have taken their place (escaip.ops.native.operators), these serve the other families.
torch.library.custom_op("escaip::attention_in_python", _attend, mutates_args=())
torch.library.custom_op("escaip::attention_backward_in_python", _attend_backward, mutates_args=())


@torch.library.custom_op("escaip::attention_double_backward", mutates_args=())
def attention_double_backward(
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    tb: Tensor | None,
    tn: Tensor | None,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_envelope: Tensor | None,
    direction: Tensor | None,
    query_offsets: Tensor,
    key_offsets: Tensor,
    out: Tensor,
    lse: Tensor,
    widths: list[int],
    scale: float,
    family: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``grad_out``, q, k, v, log envelope and direction for cotangents of what the backward returns."""
    problem = Problem(q, k, v, log_envelope, direction, query_offsets, key_offsets, tuple(widths), scale)
    tangents = Gradients(tq, tk, tv, tb, tn)
    with _full_precision(q):
        g_out, gradients = kernel_family(family).double_backward(problem, Result(out, lse), grad_out, tangents)
    return g_out, *_without_none(gradients)


@attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))


@attention_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, log_envelope: Tensor | None, direction: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with_direction = rest[-1]
    return _shapes(q, k, v, log_envelope, direction if with_direction else None)


@attention_double_backward.register_fake
def _(
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    tb: Tensor | None,
    tn: Tensor | None,
    grad_out: Tensor,
    *inputs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _like(grad_out), *_shapes(*inputs[:5])


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, log_envelope, direction, query_offsets, key_offsets, widths, scale, family = inputs
    ctx.save_for_backward(q, k, v, log_envelope, direction, query_offsets, key_offsets, *output)
    ctx.constants = (widths, scale, family)
    ctx.mark_non_differentiable(output[1])


def _backward_of_forward(ctx: Any, grad_out: Tensor, grad_lse: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: with recomputation each is given out once
    log_envelope, direction = saved[3:5]
    with_direction = direction is not None and ctx.needs_input_grad[4]
    dq, dk, dv, db, dn = attention_backward(grad_out, *saved, *ctx.constants, with_direction)
    geometry = (None if log_envelope is None else db, dn if with_direction else None)
    return dq, dk, dv, *geometry, None, None, None, None, None


attention.register_autograd(_backward_of_forward, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.constants, ctx.with_direction = inputs[10:13], inputs[13]


def _backward_of_backward(ctx: Any, tq: Tensor, tk: Tensor, tv: Tensor, tb: Tensor, tn: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    log_envelope, direction = saved[4:6]
    g_out, gq, gk, gv, gb, gn = attention_double_backward(
        tq, tk, tv, None if log_envelope is None else tb, tn if ctx.with_direction else None, *saved, *ctx.constants,
    )  # fmt: skip
    geometry = (None if log_envelope is None else gb, None if direction is None else gn)
    # out and lse are functions of the others: the gradients include what passes through them.
    return g_out, gq, gk, gv, *geometry, *(None,) * 8


attention_backward.register_autograd(_backward_of_backward, setup_context=_setup_backward)


def _setup_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.family = inputs[-1]


def _third_derivative(ctx: Any, *_: Any) -> None:
    raise ConfigError(
        f"attention backend {ctx.family!r} has two derivatives, and a third was asked for: "
        "use backend='reference' or 'dense' (attention_backend in the model's config)"
    )


attention_double_backward.register_autograd(_third_derivative, setup_context=_setup_double_backward)


def _full_precision(q: Tensor) -> torch.autocast:
    """Inside a kernel the dtypes are settled: autocast must not round its sums."""
    return torch.autocast(q.device.type, enabled=False)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, log_envelope: Tensor | None, direction: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    db, dn = (None if x is None else _like(x) for x in (log_envelope, direction))
    return _without_none(Gradients(_like(q), _like(k), _like(v), db, dn))


def _without_none(gradients: Gradients) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Operators return tensors only: an empty one stands for none."""
    q, k, v, log_envelope, direction = gradients
    return q, k, v, _or_empty(log_envelope, q), _or_empty(direction, q)


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x
