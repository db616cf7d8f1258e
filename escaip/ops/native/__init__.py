"""Fused C++ attention for the CPU with two derivatives, compiled on first use.

Float32 and float64; half types are computed in float32. A neighborhood is one thread's, which makes every sum of it in
one order: results have the same bits however many threads there are. Formulas in docs/attention.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.legendre import MAX_L
from escaip.ops.native.build import availability, library
from escaip.ops.problem import Gradients, Problem, Result, accumulation_dtype

__all__ = ["availability", "backward", "double_backward", "forward"]

_INPUTS = ("q", "k", "v", "log_envelope", "direction", "grad_out", "out", "lse", "tq", "tk", "tv", "tb", "tn")
_RESULTS = ("to_out", "to_lse", "to_q", "to_k", "to_v", "to_b", "to_n")
_SIZES = ("neighborhoods", "queries", "tokens", "heads", "head_size", "groups", "threads")


class _Problem(ctypes.Structure):
    """``escaip::Problem`` of worker.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("widths", ctypes.c_int64 * (MAX_L + 1)),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("query_offsets", "key_offsets", *_INPUTS, *_RESULTS)),
    )


def forward(problem: Problem) -> Result:
    """See :class:`escaip.ops.problem.Family`.

    Raises:
        ConfigError: the kernels do not compile, or the offsets do not fit the tensors.
    """
    q = problem.q
    out, lse = _new(q), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))
    _call("forward", problem, {}, {"to_out": out, "to_lse": lse})
    return Result(out.to(q.dtype), lse)


def backward(problem: Problem, result: Result, grad_out: Tensor, with_direction: bool) -> Gradients:
    """See :class:`escaip.ops.problem.Family`; errors as :func:`forward`."""
    gradients = _new_gradients(problem, with_direction)
    _call("backward", problem, {"grad_out": grad_out, **result._asdict()}, _named("to_", gradients))
    return _cast(gradients, problem)


def double_backward(
    problem: Problem, result: Result, grad_out: Tensor, tangents: Gradients
) -> tuple[Tensor, Gradients]:
    """See :class:`escaip.ops.problem.Family`; errors as :func:`forward`."""
    g_out, gradients = _new(problem.q), _new_gradients(problem, True)
    inputs = {"grad_out": grad_out, **result._asdict(), **_named("t", tangents)}
    _call("double_backward", problem, inputs, {"to_out": g_out, **_named("to_", gradients)})
    return g_out.to(problem.q.dtype), _cast(gradients, problem)


def _call(
    name: str, problem: Problem, inputs: Mapping[str, Tensor | None], results: Mapping[str, Tensor | None]
) -> None:
    """Calls ``escaip_<name>``, which writes the results; contiguous copies live until it returns."""
    q, k, widths = problem.q, problem.k, problem.widths
    dtype = accumulation_dtype(q)
    features = {x: getattr(problem, x) for x in ("q", "k", "v", "log_envelope", "direction")}
    held = {x: t.to(dtype).contiguous() for x, t in {**features, **inputs}.items() if t is not None}
    held |= {x: t for x, t in results.items() if t is not None}
    held |= {x: getattr(problem, x).contiguous() for x in ("query_offsets", "key_offsets")}
    structure = _Problem(
        problem.query_offsets.numel() - 1, q.shape[0], k.shape[0], q.shape[1], q.shape[2], len(widths),
        torch.get_num_threads(),
    )  # fmt: skip
    structure.widths[: len(widths)] = widths
    structure.scale = problem.scale
    for field, tensor in held.items():
        setattr(structure, field, tensor.data_ptr())
    scalar = "double" if dtype == torch.float64 else "float"
    status = getattr(library(scalar), f"escaip_{name}")(ctypes.byref(structure))
    if status:
        raise ConfigError(_MESSAGES[status])


_MESSAGES = {
    1: "attention offsets must start at 0, never fall, and end at the number of queries and of tokens",
    2: "attention backend 'native' found no memory for its tiles: use fewer threads or backend='blocked'",
}


def _new(like: Tensor) -> Tensor:
    """Contiguous memory for a result, in the accumulation dtype."""
    return torch.empty(like.shape, dtype=accumulation_dtype(like), device=like.device)


def _new_gradients(problem: Problem, with_direction: bool) -> Gradients:
    b, n = problem.log_envelope, problem.direction if with_direction else None
    geometry = (None if x is None else _new(x) for x in (b, n))
    return Gradients(_new(problem.q), _new(problem.k), _new(problem.v), *geometry)


def _named(prefix: str, gradients: Gradients) -> dict[str, Tensor | None]:
    """By the names of the C++ side."""
    return {f"{prefix}{name}": x for name, x in zip("qkvbn", gradients, strict=True)}


def _cast(gradients: Gradients, problem: Problem) -> Gradients:
    """Those of q, k and v in their dtype."""
    q, k, v, *geometry = gradients
    return Gradients(*(x.to(problem.q.dtype) for x in (q, k, v)), *geometry)
