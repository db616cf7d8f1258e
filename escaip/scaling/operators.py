"""What the package's fused operators cost, for PyTorch's counter of floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import escaip.ops  # noqa: F401  # registers the operators


def operator_formulas() -> dict[Any, Callable[..., int]]:
    """What the package's operators cost: the ``custom_mapping`` of a :class:`FlopCounterMode`.

    Useful operations: those of the value, its derivative and that one's derivative where all intermediates are kept, as
    autograd takes them from padded matrices without padding. Kernels compute logits again instead of keeping them, and
    share the work of the second derivative otherwise; what they execute is not counted.
    """
    operators = torch.ops.escaip
    formulas: dict[Any, Any] = {
        operators.attention: _forward,
        operators.attention_backward: _backward,
        operators.attention_double_backward: _double_backward,
    }
    for formula in formulas.values():
        formula._get_raw = True  # takes tensors, not their shapes alone: sizes of neighborhoods are values
    return formulas


def _forward(q: Tensor, k: Tensor, v: Tensor, log_envelope: Any, direction: Any, *rest: Any, out_val: Any) -> int:
    products, cosines = _operands(q, *rest[:3])
    return products + (0 if direction is None else cosines)


def _backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any) -> int:
    products, cosines = _operands(q, rest[2], rest[3], rest[6])
    return 2 * products + (2 * cosines if rest[-1] else 0)


def _double_backward(
    tq: Tensor, tk: Tensor, tv: Tensor, tb: Any, tn: Any, grad_out: Tensor, q: Tensor, *rest: Any, out_val: Any
) -> int:
    products, cosines = _operands(q, rest[4], rest[5], rest[8])
    return 4 * products + (0 if tn is None else 4 * cosines)


def _operands(q: Tensor, query_offsets: Tensor, key_offsets: Tensor, widths: list[int]) -> tuple[int, int]:
    """Operations of logits and values, and of the cosines between directions."""
    pairs = int((query_offsets.diff() * key_offsets.diff()).sum())
    heads, head_size = q.shape[1:]
    return 2 * pairs * heads * (sum(widths) + head_size), 6 * pairs
