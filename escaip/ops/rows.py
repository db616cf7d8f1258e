"""Taking rows by index and summing rows by index: each the other's derivative.

In eager mode these are ``index_select`` and ``index_add``. Under ``torch.compile`` the sum is an opaque operator, on
the CPU in C++ (``cpp/binding.cpp``): on one thread, Inductor (PyTorch 2.13, CPU) turns a sum over repeated indices into
a loop marked ``#pragma GCC ivdep``, which promises that no index repeats, and GCC then reorders loads and stores into
wrong sums. A graph that is traced first and differentiated by the compiler afterwards must keep the pair together, so
there the gather is opaque as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_traced: ContextVar[str] = ContextVar("escaip_rows_traced", default="")


@contextlib.contextmanager
def traced_rows(differentiable: bool) -> Iterator[None]:
    """While a graph is traced for a compiler: the sum, and where it will be differentiated the gather, stay operators.

    Args:
        differentiable: whether the compiler will differentiate what is traced.
    """
    token = _traced.set("differentiable" if differentiable else "plain")
    try:
        yield
    finally:
        _traced.reset(token)


def is_traced() -> bool:
    """Whether a graph is traced for a compiler, which joins plain operations better than kernels do."""
    return torch.compiler.is_compiling() or bool(_traced.get())


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``, differentiable any number of times.

    Args:
        x: ``(N, ...)``.
        index: ``(T,)`` int64 in ``[0, N)``.

    Returns:
        ``(T, ...)``.
    """
    if torch.compiler.is_compiling():
        return _TakeRows.apply(x, index)
    traced = _traced.get()
    if traced:
        return _take_rows(x, index) if traced == "differentiable" else _TakeRows.apply(x, index)
    return x.index_select(0, index)


def sum_rows(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """``out[n] = Σ x[t]`` over the ``t`` with ``index[t] = n``, differentiable any number of times.

    Args:
        x: ``(T, ...)``.
        index: ``(T,)`` int64 in ``[0, num_rows)``.
        num_rows: ``N``.

    Returns:
        ``(N, ...)``, zero where no row belongs.
    """
    return _sum_rows(x, index, num_rows) if is_traced() else _index_add(x, index, num_rows)


def _index_add(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return x.new_zeros(num_rows, *x.shape[1:]).index_add(0, index, x)


class _TakeRows(torch.autograd.Function):
    """A gather that Inductor may fuse, with the opaque sum as its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _sum_rows(gradients[0], index, ctx.num_rows), None


@torch.library.custom_op("escaip::sum_rows", mutates_args=())
def _sum_rows(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return x.new_zeros(num_rows, *x.shape[1:]).index_add_(0, index, x)


@_sum_rows.register_fake
def _(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return x.new_empty(num_rows, *x.shape[1:])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return take_rows(gradient, ctx.saved_tensors[0]), None, None


_sum_rows.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("escaip::take_rows", mutates_args=())
def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


@_take_rows.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], *x.shape[1:])


def _setup_take(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.num_rows = inputs[0].shape[0]


def _take_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return sum_rows(gradient, ctx.saved_tensors[0], ctx.num_rows), None


_take_rows.register_autograd(_take_backward, setup_context=_setup_take)
