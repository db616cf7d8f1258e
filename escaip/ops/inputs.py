"""Inputs and outputs of a kernel backend: three functions that compute attention and its two derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

HALF_TYPES = (torch.float16, torch.bfloat16)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, softmax and geometry: float32 for half types, else that of ``x``."""
    return torch.float32 if x.dtype in HALF_TYPES else x.dtype


@dataclass(frozen=True)
class AttentionInputs:
    """Attention of each query over the keys of its neighborhood (symbols as in docs/concepts/attention.md).

    Attributes:
        q: ``(Q, h, d)``, any strides, as k and v.
        k: ``(T, h, d)``.
        v: ``(T, h, d)``.
        log_envelope: ``(T,)`` in the accumulation dtype, added to the logits of a key, or None. −inf removes the key;
            at least one of each neighborhood is finite.
        direction: ``(T, 3)`` in the accumulation dtype, zero for self tokens; given if and only if there is more than
            one group. Queries are the tokens then.
        query_offsets: ``(N + 1,)`` int64, queries of each neighborhood.
        key_offsets: ``(N + 1,)`` int64, keys of each neighborhood; a neighborhood may have none.
        widths: channels per angular degree; channels beyond their sum take no part in the logits.
        scale: factor on the products.
        angular_values: whether the channels of degree ``l`` of the values are multiplied by ``P_l`` where both tokens
            have a direction; the widths then sum to ``d``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_envelope: Tensor | None
    direction: Tensor | None
    query_offsets: Tensor
    key_offsets: Tensor
    widths: tuple[int, ...]
    scale: float
    angular_values: bool = False


class AttentionOutputs(NamedTuple):
    """``out (Q, h, d)``, and ``lse (Q, h)``, the log of the softmax normaliser, in the accumulation dtype."""

    out: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """One tensor like each input: gradients, or the cotangents of gradients (``tq, tk, tv, tb, tn``).

    That of the log envelope is None without a log envelope; that of the direction also where nobody asks for it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_envelope: Tensor | None
    direction: Tensor | None


class KernelBackend(Protocol):
    """Three functions that never change their arguments and give the same bits on every run."""

    def forward(self, inputs: AttentionInputs) -> AttentionOutputs:
        """Computes the value."""

    def backward(
        self, inputs: AttentionInputs, outputs: AttentionOutputs, grad_out: Tensor, with_direction: bool
    ) -> Gradients:
        """Computes gradients of the inputs for the cotangent ``grad_out (Q, h, d)`` of the value."""

    def double_backward(
        self, inputs: AttentionInputs, outputs: AttentionOutputs, grad_out: Tensor, tangents: Gradients
    ) -> tuple[Tensor, Gradients]:
        """Computes gradients of ``grad_out`` and of the inputs for cotangents of the results of ``backward``."""
