"""Fused C++ attention for the CPU with two derivatives, compiled on first use.

Neighborhoods of 1 to 1024 tokens, float32 and float64; half types are computed in float32. Every sum is made by one
thread in one order: results have the same bits however many threads there are. Formulas in docs/attention.md.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.legendre import MAX_L
from escaip.ops.native.build import availability, library

__all__ = ["MAX_KEYS", "availability", "backward", "double_backward", "forward"]

MAX_KEYS = 1024
_INPUTS = ("q", "k", "v", "log_envelope", "direction", "grad_out", "out", "lse", "tq", "tk", "tv", "tb", "tn")
_RESULTS = ("to_out", "to_lse", "to_q", "to_k", "to_v", "to_b", "to_n")
_SIZES = ("neighborhoods", "queries", "tokens", "heads", "head_size", "groups", "threads", "most_keys")


class _Problem(ctypes.Structure):
    """``escaip::Problem`` of worker.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("widths", ctypes.c_int64 * (MAX_L + 1)),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("query_offsets", "key_offsets", *_INPUTS, *_RESULTS)),
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_envelope: Tensor | None,
    direction: Tensor | None,
    query_offsets: Tensor,
    key_offsets: Tensor,
    widths: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns the attended ``(Q, h, d)`` and the log of the softmax normaliser ``(Q, h)``.

    Raises:
        ConfigError: a neighborhood of more than ``MAX_KEYS`` tokens, or the kernels do not compile.
    """
    dtype = _accumulation(q)
    out, lse = _new(q), q.new_empty(q.shape[:2], dtype=dtype)
    inputs: dict[str, Tensor | None] = {"q": q, "k": k, "v": v, "log_envelope": log_envelope, "direction": direction}
    _call("forward", dtype, inputs, {"to_out": out, "to_lse": lse}, query_offsets, key_offsets, widths, scale)
    return out.to(q.dtype), lse


def backward(
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
    widths: tuple[int, ...],
    scale: float,
    with_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns ``dq, dk, dv, db, dn`` for the cotangent ``grad_out``; errors as :func:`forward`."""
    dtype = _accumulation(q)
    db = None if log_envelope is None else _new(log_envelope)
    dn = _new(direction) if with_direction and direction is not None else None
    results = {"to_q": _new(q), "to_k": _new(k), "to_v": _new(v), "to_b": db, "to_n": dn}
    inputs = {"q": q, "k": k, "v": v, "log_envelope": log_envelope, "direction": direction, "grad_out": grad_out,
              "out": out, "lse": lse}  # fmt: skip
    _call("backward", dtype, inputs, results, query_offsets, key_offsets, widths, scale)
    return (*(_cast(results[f"to_{name}"], q) for name in "qkv"), db, dn)  # type: ignore[return-value]


def double_backward(
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
    widths: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns the cotangents of ``grad_out, q, k, v, log_envelope, direction``; errors as :func:`forward`."""
    dtype = _accumulation(q)
    gb = None if log_envelope is None else _new(log_envelope)
    gn = None if direction is None else _new(direction)
    results = {"to_out": _new(q), "to_q": _new(q), "to_k": _new(k), "to_v": _new(v), "to_b": gb, "to_n": gn}
    inputs = {"q": q, "k": k, "v": v, "log_envelope": log_envelope, "direction": direction, "grad_out": grad_out,
              "out": out, "lse": lse, "tq": tq, "tk": tk, "tv": tv, "tb": tb, "tn": tn}  # fmt: skip
    _call("double_backward", dtype, inputs, results, query_offsets, key_offsets, widths, scale)
    return (*(_cast(results[f"to_{name}"], q) for name in ("out", "q", "k", "v")), gb, gn)  # type: ignore[return-value]


def _call(
    name: str,
    dtype: torch.dtype,
    inputs: dict[str, Tensor | None],
    results: dict[str, Tensor | None],
    query_offsets: Tensor,
    key_offsets: Tensor,
    widths: tuple[int, ...],
    scale: float,
) -> None:
    """Calls ``escaip_<name>_<scalar>``, which writes the results; contiguous copies live until it returns."""
    q, k = inputs["q"], inputs["k"]
    assert q is not None
    assert k is not None
    held: dict[str, Tensor] = {x: t.to(dtype).contiguous() for x, t in inputs.items() if t is not None}
    held |= {x: t for x, t in results.items() if t is not None}
    held |= {"query_offsets": query_offsets.contiguous(), "key_offsets": key_offsets.contiguous()}
    problem = _Problem(
        query_offsets.numel() - 1, q.shape[0], k.shape[0], q.shape[1], q.shape[2], len(widths),
        torch.get_num_threads(), MAX_KEYS,
    )  # fmt: skip
    problem.widths[: len(widths)] = widths
    problem.scale = scale
    for field, tensor in held.items():
        setattr(problem, field, tensor.data_ptr())
    scalar = "double" if dtype == torch.float64 else "float"
    status = getattr(library(scalar), f"escaip_{name}")(ctypes.byref(problem))
    if status:
        raise ConfigError(_MESSAGES[status])


_MESSAGES = {
    1: "attention offsets must start at 0, never fall, and end at the number of queries and of tokens",
    2: f"attention backend 'native' takes at most {MAX_KEYS} tokens in a neighborhood: use backend='blocked'",
    3: "attention backend 'native' found no memory for its tiles: use fewer threads or backend='blocked'",
}


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _new(like: Tensor) -> Tensor:
    """Contiguous memory for a result, in the accumulation dtype."""
    return torch.empty(like.shape, dtype=_accumulation(like), device=like.device)


def _cast(x: Tensor | None, like: Tensor) -> Tensor:
    assert x is not None
    return x.to(like.dtype)
