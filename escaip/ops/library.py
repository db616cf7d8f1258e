"""Attention by kernels of libraries, differentiable once: PyTorch's ``scaled_dot_product_attention`` and xformers.

Angles and key bias become further channels. By the addition theorem, ``P_l(n·n') = Σ_m Y_lm(n) Y_lm(n')``: with every
channel of group ``l`` multiplied by the ``2l + 1`` harmonics of its bond, plain dot products of queries and keys are
the angular logits (EScAIP, arXiv 2410.24169, section 4). The key bias is the dot product of a constant channel of the
queries with a channel of the keys. Off the unit sphere the harmonics and the Legendre polynomials of the other backends
differ, and with them the radial part of the derivative by the direction, which normalising a bond does not pass on.

``sdpa`` pads neighborhoods to the longest, with keys whose bias leaves them without influence: a mask would shut out
the flash kernels. With angles, queries and keys are wider than values (64 channels become 320), which the
memory-efficient kernel takes on CUDA; otherwise PyTorch's own composition holds all logits. Without angles all widths
are equal, for the flash kernels. ``xformers`` pads nothing: a ``BlockDiagonalMask`` separates the neighborhoods. Of its
kernels only CUTLASS takes wider keys than values, so it is named. It lives in ``xformers.ops.fmha`` or, in newer
releases, in ``mslk.attention.fmha`` (package ``mslk-cuda``); each wheel is for one version of CUDA and refuses another.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.files import first_line
from escaip.ops.dense import Padding
from escaip.ops.harmonics import spherical_harmonics
from escaip.ops.inputs import HALF_TYPES

# CUDA kernels read rows in units of 16 bytes.
CHANNEL_MULTIPLE = 8
# A logit without influence: far below what exp() rounds to zero, far above where sums overflow.
_FLOOR = -1e30
# A CUDA grid is at most this long in the dimension that counts sequences (facebookresearch/xformers#845).
MAX_SEQUENCES = 65535
_HOMES = ("xformers.ops.fmha", "mslk.attention.fmha")
_REMEDY = "pip install 'escaip[cuda]'"


def sdpa_attention(
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
    """See ``escaip.ops.neighborhood_attention``; reads the longest neighborhood from the device.

    Raises:
        ConfigError: when differentiated a second time.
    """
    q, k, v, log_envelope, direction = _differentiable_once("sdpa", q, k, v, log_envelope, direction)
    queries, keys, channels = _operands(q, k, log_envelope, direction, angular_channels, scale, self_queries_only)
    width, head_size = keys.shape[-1], v.shape[-1]
    equal_widths = angular_channels is None and not self_queries_only
    values = _pad_channels(v, width if equal_widths else head_size + -head_size % CHANNEL_MULTIPLE)
    padding = Padding.of(offsets, k.shape[0])
    unseen = torch.zeros(width, dtype=k.dtype, device=k.device)
    unseen[channels] = _floor(k.dtype)
    keys, values = padding.pad(keys, unseen).transpose(1, 2), padding.pad(values).transpose(1, 2)
    queries = queries.unsqueeze(2) if self_queries_only else padding.pad(queries).transpose(1, 2)
    attended = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=scale)[..., :head_size]
    return attended.squeeze(2) if self_queries_only else padding.unpad(attended.transpose(1, 2))


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
    """See ``escaip.ops.neighborhood_attention``; reads the sizes of the neighborhoods from the device.

    Raises:
        ConfigError: when differentiated a second time.
    """
    fmha = _library()
    q, k, v, log_envelope, direction = _differentiable_once("xformers", q, k, v, log_envelope, direction)
    queries, keys, _ = _operands(q, k, log_envelope, direction, angular_channels, scale, self_queries_only)
    head_size = v.shape[-1]
    values = _pad_channels(v, head_size + -head_size % CHANNEL_MULTIPLE).contiguous()
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


def xformers_unusable() -> str | None:
    """Why xformers is not usable here and what would help, in one line; None where it is."""
    if all(importlib.util.find_spec(home.partition(".")[0]) is None for home in _HOMES):
        return f"needs xformers: {_REMEDY}"
    if not torch.cuda.is_available():
        return "needs a CUDA device, and none is usable here"
    try:
        _library()
    except ConfigError as error:
        return str(error)
    return None


@functools.cache
def _library() -> Any:
    """The module with ``memory_efficient_attention``, from the first package whose kernel can run here."""
    problems = []
    for home in _HOMES:
        try:
            fmha = importlib.import_module(home)
            reasons = _refusals(fmha, torch.device("cuda"))
        except Exception as error:  # compiled code of a third party, for another PyTorch or CUDA maybe
            reasons = [first_line(error)]
        if not reasons:
            return fmha
        problems.append(f"{home}: {', '.join(reasons)}")
    found = "; ".join(problems)
    raise ConfigError(f"finds no usable kernel ({found}): {_REMEDY} for the CUDA of this PyTorch, or use sdpa")


def _refusals(fmha: Any, device: torch.device) -> list[str]:
    """Reasons for which the library refuses the named kernels, of forward and backward pass, on ``device``."""
    wide, narrow = (torch.zeros(1, 1, 1, width, device=device) for width in (2 * CHANNEL_MULTIPLE, CHANNEL_MULTIPLE))
    mask = fmha.BlockDiagonalMask.from_seqlens([1], device=device)
    inputs = fmha.Inputs(query=wide, key=wide, value=narrow, attn_bias=mask, scale=1.0)
    reasons = [reason for op in fmha.MemoryEfficientAttentionCutlassOp for reason in op.not_supported_reasons(inputs)]
    return list(dict.fromkeys(map(str, reasons)))


def _operands(
    q: Tensor,
    k: Tensor,
    log_envelope: Tensor,
    direction: Tensor,
    angular_channels: tuple[int, ...] | None,
    scale: float,
    self_queries_only: bool,
) -> tuple[Tensor, Tensor, int]:
    """Queries ``(Q, h, D)`` and keys ``(T, h, D)`` whose dot products, times ``scale``, are the logits with the bias.

    ``D`` is a multiple of ``CHANNEL_MULTIPLE``; the third result counts the channels before those of the bias.
    """
    if angular_channels is not None and self_queries_only:
        q, k = q[..., : angular_channels[0]], k[..., : angular_channels[0]]
    elif angular_channels is not None:
        q, k = (_expand(x, direction, angular_channels) for x in (q, k))
    # A power of two, exact in every type, by which scale is about one: a bias keeps its size as a channel.
    factor = math.copysign(2.0 ** min(15, max(-15, round(-math.log2(abs(scale))))), scale)
    bias = _bias_channels(log_envelope.unsqueeze(-1).expand(-1, k.shape[1]) / (scale * factor), k.dtype)
    padding = -(k.shape[-1] + bias.shape[-1]) % CHANNEL_MULTIPLE
    constant = torch.nn.functional.pad(q.new_full((bias.shape[-1],), factor), (0, padding))
    queries = torch.cat([q, constant.expand(*q.shape[:2], -1)], -1)
    return queries, torch.cat([k, torch.nn.functional.pad(bias, (0, padding))], -1), k.shape[-1]


def _expand(x: Tensor, direction: Tensor, angular_channels: tuple[int, ...]) -> Tensor:
    """``(T, h, d)`` to ``(T, h, Σ_l (2l + 1) angular_channels[l])``; of self tokens only ``l = 0`` is not zero."""
    l_max = len(angular_channels) - 1
    harmonics = spherical_harmonics(direction, l_max).split([2 * degree + 1 for degree in range(l_max + 1)], -1)
    groups = zip(x.split(angular_channels, -1), harmonics, strict=True)
    return torch.cat([(g.unsqueeze(-1) * y[:, None, None, :]).flatten(2).to(x.dtype) for g, y in groups], -1)


def _bias_channels(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``(T, h)`` to ``(T, h, n)`` of ``dtype`` whose sum is the bias: parts of few bits each, so that none is lost."""
    bias = bias.clamp(min=_floor(dtype))  # passes no gradient where it acts
    parts = [bias.to(dtype)]
    if dtype in HALF_TYPES:
        rest = bias.detach()
        for _ in range(2):
            rest = rest - parts[-1].detach()
            parts.append(rest.to(dtype))
    return torch.stack(parts, -1)


def _floor(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min if dtype == torch.float16 else _FLOOR


def _pad_channels(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _differentiable_once(backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors themselves, whose gradients refuse to be differentiated."""
    return tuple(_DifferentiableOnce.apply(x, backend) if x.requires_grad else x for x in tensors)


class _DifferentiableOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        ctx.backend = backend
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Refusing.apply(grad, ctx.backend), None


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, backend: str) -> Tensor:
        ctx.backend = backend
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ConfigError(
            f"attention backend {ctx.backend!r} has one derivative, and a second was asked for: "
            "use auto, blocked, dense or reference (attention_backend in the model's config)"
        )
