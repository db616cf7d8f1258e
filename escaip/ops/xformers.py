"""Neighborhood attention by xformers' ``memory_efficient_attention`` on packed tokens: one derivative, CUDA only.

Nothing is padded: a ``BlockDiagonalMask`` tells the neighborhoods apart. That mask takes no bias beside it, so the key
bias is a channel, as the angles are (:mod:`escaip.ops.expanded`). Of the kernels only the CUTLASS one, which is
PyTorch's own memory-efficient kernel, takes 320 channels of queries and keys beside 64 of values; it is named, so that
no other is tried. It wants a compute capability from 5.0 to 9.0.

The attention lives in ``xformers.ops.fmha`` (xformers 0.0.35 holds it), and in ``mslk.attention.fmha``, where it moves
(package ``mslk-cuda``; ``mslk`` on PyPI is an empty placeholder); the first that works is taken. The wheels on PyPI are
for one CUDA each, 12 of xformers 0.0.35 and 13 of mslk-cuda 1.1.0, and one for another CUDA than PyTorch's refuses.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.expanded import (
    CHANNEL_MULTIPLE,
    first_derivative_only,
    pad_channels,
    plain_operands,
)

# A CUDA grid is at most this long in the dimension that counts sequences (facebookresearch/xformers#845).
MAX_SEQUENCES = 65535

_HOMES = ("xformers.ops.fmha", "mslk.attention.fmha")
_REMEDY = "pip install 'escaip[cuda]'"


def availability() -> str | None:
    """Why it is not usable here and what would help, in one line; None where it is."""
    if all(importlib.util.find_spec(home.partition(".")[0]) is None for home in _HOMES):
        return f"needs xformers: {_REMEDY}"
    if not torch.cuda.is_available():
        return "needs a CUDA device, and none is usable here"
    try:
        _library()
    except ConfigError as error:
        return str(error)
    return None


def xformers_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_envelope: Tensor,
    direction: Tensor,
    offsets: Tensor,
    angular_channels: tuple[int, ...] | None,
    scale: float,
    self_queries_only: bool = False,
) -> Tensor:
    """See :func:`escaip.ops.neighborhood_attention`; differentiable once.

    Reads the sizes of the neighborhoods from the device, which the mask must know on the host.

    Raises:
        ConfigError: when differentiated a second time.
    """
    fmha = _library()
    q, k, v, log_envelope, direction = first_derivative_only("xformers", q, k, v, log_envelope, direction)
    queries, keys = plain_operands(q, k, log_envelope, direction, angular_channels, scale, self_queries_only)
    head_size = v.shape[-1]
    values = pad_channels(v, head_size + -head_size % CHANNEL_MULTIPLE).contiguous()
    bounds = offsets.tolist()
    parts = []
    for low in range(0, len(bounds) - 1, MAX_SEQUENCES):
        run = bounds[low : low + MAX_SEQUENCES + 1]
        sizes = [last - first for first, last in pairwise(run)]
        tokens = slice(run[0], run[-1])
        rows = slice(low, low + len(sizes)) if self_queries_only else tokens
        row_sizes = [1] * len(sizes) if self_queries_only else sizes
        parts.append(
            fmha.memory_efficient_attention(
                queries[rows].unsqueeze(0),
                keys[tokens].unsqueeze(0),
                values[tokens].unsqueeze(0),
                attn_bias=fmha.BlockDiagonalMask.from_seqlens(row_sizes, sizes, device=q.device),
                scale=scale,
                op=fmha.MemoryEfficientAttentionCutlassOp,
            ).squeeze(0)
        )
    return torch.cat(parts)[..., :head_size]


@functools.cache
def _library() -> Any:
    """The module with ``memory_efficient_attention``, from the first package whose kernel can run here."""
    problems = []
    for home in _HOMES:
        try:
            fmha = importlib.import_module(home)
            reasons = _refusals(fmha, torch.device("cuda"))
        except Exception as error:  # compiled code of a third party, for another PyTorch or CUDA maybe
            reasons = [(str(error).splitlines() or [type(error).__name__])[0]]
        if not reasons:
            return fmha
        problems.append(f"{home}: {', '.join(reasons)}")
    found = "; ".join(problems)
    raise ConfigError(f"finds no usable kernel ({found}): {_REMEDY} for the CUDA of this PyTorch, or use sdpa")


def _refusals(fmha: Any, device: torch.device) -> list[str]:
    """What the library has against the kernels we name, of forward and backward pass, on ``device``."""
    wide, narrow = (torch.zeros(1, 1, 1, width, device=device) for width in (2 * CHANNEL_MULTIPLE, CHANNEL_MULTIPLE))
    mask = fmha.BlockDiagonalMask.from_seqlens([1], device=device)
    inputs = fmha.Inputs(query=wide, key=wide, value=narrow, attn_bias=mask, scale=1.0)
    reasons = [reason for op in fmha.MemoryEfficientAttentionCutlassOp for reason in op.not_supported_reasons(inputs)]
    return list(dict.fromkeys(map(str, reasons)))
