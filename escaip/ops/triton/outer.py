"""Sums of outer products over the tokens of each atom, and their derivative (``escaip.ops.outer``).

A program serves an atom. Matrix products take 16 rows, columns and terms at least, so channels are padded.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, operator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from escaip.ops.triton.common import SMALLEST, dot
from escaip.ops.triton.launch import matmul_precision

TOKENS = 32  # of a step of the walk over an atom's


@triton.jit
def sum_outer_kernel(
    x, y, offsets, out, C: tl.constexpr, M: tl.constexpr, C_PADDED: tl.constexpr, M_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes ``out (N, C, M)``, ``Σ_t x_t ⊗ y_t`` over the tokens of an atom."""
    atom = tl.program_id(0)
    first, last = tl.load(offsets + atom), tl.load(offsets + atom + 1)
    c, m, row = tl.arange(0, C_PADDED), tl.arange(0, M_PADDED), tl.arange(0, BLOCK)
    total = tl.zeros([C_PADDED, M_PADDED], tl.float32)
    for t in range(first, last, BLOCK):
        here = row < last - t
        a = tl.load(x + (t + row)[None, :] * C + c[:, None], mask=(c < C)[:, None] & here[None, :], other=0.0)
        b = tl.load(y + (t + row)[:, None] * M + m[None, :], mask=here[:, None] & (m < M)[None, :], other=0.0)
        total = dot(a, b, total, PRECISION)
    tl.store(
        out + atom.to(tl.int64) * (C * M) + c[:, None] * M + m[None, :], total,
        mask=(c < C)[:, None] & (m < M)[None, :],
    )  # fmt: skip


@triton.jit
def apply_kernel(
    factors, y, offsets, out, of_atom, of_row, of_column, C: tl.constexpr, M: tl.constexpr, C_PADDED: tl.constexpr,
    M_PADDED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes ``out (T, C)``: the atom's ``factors (C, M)``, of these strides, times ``y (T, M)``."""
    atom = tl.program_id(0)
    first, last = tl.load(offsets + atom), tl.load(offsets + atom + 1)
    c, m, row = tl.arange(0, C_PADDED), tl.arange(0, M_PADDED), tl.arange(0, BLOCK)
    b = tl.load(
        factors + atom.to(tl.int64) * of_atom + m[:, None] * of_column + c[None, :] * of_row,
        mask=(m < M)[:, None] & (c < C)[None, :], other=0.0,
    )  # fmt: skip
    for t in range(first, last, BLOCK):
        here = row < last - t
        a = tl.load(y + (t + row)[:, None] * M + m[None, :], mask=here[:, None] & (m < M)[None, :], other=0.0)
        found = dot(a, b, tl.zeros([BLOCK, C_PADDED], tl.float32), PRECISION)
        tl.store(out + (t + row)[:, None] * C + c[None, :], found, mask=here[:, None] & (c < C)[None, :])


def sizes(channels: int, others: int) -> dict[str, int]:
    """Constants of both kernels for ``C`` and ``M``."""
    padded = [max(SMALLEST, triton.next_power_of_2(size)) for size in (channels, others)]
    return {"C": channels, "M": others, "C_PADDED": padded[0], "M_PADDED": padded[1], "BLOCK": TOKENS}


def exact(x: Tensor) -> str:
    """Float32's digits even where a user allows TF32: symmetry makes sums of harmonics cancel."""
    return "ieee" if matmul_precision(x) == "ieee" else "tf32x3"


def sum_outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """See ``escaip.ops.outer.sum_outer``; float32."""
    out = x.new_empty(offsets.shape[0] - 1, x.shape[1], y.shape[1])
    if out.numel():
        chosen, precision = sizes(x.shape[1], y.shape[1]), exact(x)
        with torch.cuda.device_of(x):
            sum_outer_kernel[(len(out),)](x.contiguous(), y.contiguous(), offsets, out, **chosen, PRECISION=precision)
    return out


def apply(factors: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """See ``escaip.ops.outer.apply_rows``; float32. Tokens of no atom stay undefined, as there are none."""
    out = y.new_empty(y.shape[0], factors.shape[1])
    if out.numel() and len(factors):
        chosen, precision = sizes(*factors.shape[1:]), exact(y)
        with torch.cuda.device_of(y):
            apply_kernel[(len(factors),)](
                factors, y.contiguous(), offsets, out, *factors.stride(), **chosen, PRECISION=precision
            )
    return out
