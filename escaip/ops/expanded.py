"""Angles and key bias as further channels, so that an attention kernel of any library computes both.

By the addition theorem, ``P_l(n·n') = Σ_m Y_lm(n) Y_lm(n')``: with every channel of group ``l`` multiplied by the
``2l + 1`` harmonics of its bond, plain dot products of queries and keys are the angular logits (EScAIP, arXiv
2410.24169, section 4). The key bias is a dot product as well, of a constant channel of the queries with a channel of
the keys.

The harmonics are those of the solid kind, ``|v|^l Y_lm(v/|v|)``. On the unit sphere their products are the Legendre
polynomials of the other backends and off it they are not; nor is the radial part of the derivative with respect to the
direction, which depends on that continuation. The part along the sphere is the same, and it alone reaches positions,
since normalising a bond passes no other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.problem import HALF_TYPES

# CUDA kernels read rows in units of 16 bytes.
CHANNEL_MULTIPLE = 8
# Where a logit is exactly without influence: far below what exp() rounds to zero, far above where sums overflow.
_FLOOR = -1e30


def unit_harmonics(direction: Tensor, l_max: int) -> tuple[Tensor, ...]:
    """Real harmonics of unit norm, as homogeneous polynomials: all but ``l = 0`` vanish at the zero vector.

    Args:
        direction: ``(T, 3)``.
        l_max: highest degree, 4 at most.

    Returns:
        ``(T, 2l + 1)`` for each degree, with ``Σ_m Y_lm(n) Y_lm(n') = P_l(n·n')`` for unit vectors.
    """
    x, y, z = direction.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    rr, flat = xx + yy + zz, xx - yy
    degrees = [[torch.ones_like(x)]]
    if l_max >= 1:
        degrees.append([x, y, z])
    if l_max >= 2:
        root = math.sqrt(3.0)
        degrees.append([root * x * y, root * y * z, 1.5 * zz - 0.5 * rr, root * x * z, 0.5 * root * flat])
    if l_max >= 3:
        tesseral, polar = 5.0 * zz - rr, 2.5 * zz - 1.5 * rr
        cubic, planar, mixed = math.sqrt(5 / 8), math.sqrt(3 / 8), math.sqrt(15.0)
        degrees.append([
            cubic * y * (3.0 * xx - yy), mixed * x * y * z, planar * y * tesseral, z * polar, planar * x * tesseral,
            0.5 * mixed * z * flat, cubic * x * (xx - 3.0 * yy),
        ])  # fmt: skip
    if l_max >= 4:
        second, first = 7.0 * zz - rr, 7.0 * zz - 3.0 * rr
        quartic, cubic, square, single = math.sqrt(35.0), math.sqrt(35 / 8), math.sqrt(5.0), math.sqrt(5 / 8)
        degrees.append([
            0.5 * quartic * x * y * flat, cubic * y * z * (3.0 * xx - yy), 0.5 * square * x * y * second,
            single * y * z * first, 0.125 * (35.0 * zz * zz - 30.0 * zz * rr + 3.0 * rr * rr), single * x * z * first,
            0.25 * square * flat * second, cubic * x * z * (xx - 3.0 * yy),
            0.125 * quartic * (xx * xx - 6.0 * xx * yy + yy * yy),
        ])  # fmt: skip
    return tuple(torch.stack(columns, -1) for columns in degrees)


def expand_channels(x: Tensor, harmonics: tuple[Tensor, ...], angular_channels: tuple[int, ...]) -> Tensor:
    """Multiplies each channel of group ``l`` by the harmonics of degree ``l``, in their dtype, rounded once.

    Args:
        x: ``(T, h, d)``, groups of ``angular_channels[l]`` channels.
        harmonics: of :func:`unit_harmonics`.
        angular_channels: channels per degree; channels beyond their sum are dropped.

    Returns:
        ``(T, h, Σ_l (2l + 1) angular_channels[l])``; of self tokens only the group ``l = 0`` is not zero.
    """
    expanded, start = [], 0
    for degree, count in enumerate(angular_channels):
        group = x[..., start : start + count]
        start += count
        if degree > 0:
            group = (group.unsqueeze(-1) * harmonics[degree][:, None, None, :]).flatten(2).to(x.dtype)
        expanded.append(group)
    return torch.cat(expanded, -1)


def plain_operands(
    q: Tensor,
    k: Tensor,
    log_envelope: Tensor,
    direction: Tensor,
    angular_channels: tuple[int, ...] | None,
    scale: float,
    self_queries_only: bool,
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose dot products, times ``scale``, are all of the logits, the key bias included.

    Args:
        q: ``(T, h, d)``; ``(N, h, d)`` with ``self_queries_only``.
        k: ``(T, h, d)``.
        log_envelope: ``(T,)``.
        direction: ``(T, 3)``.
        angular_channels: channels per degree, or None.
        scale: factor on the products.
        self_queries_only: the queries are the self tokens, which see the group ``l = 0`` alone.

    Returns:
        ``(Q, h, D)`` and ``(T, h, D)`` with ``D`` a multiple of ``CHANNEL_MULTIPLE``.
    """
    if angular_channels is not None and self_queries_only:
        q, k = q[..., : angular_channels[0]], k[..., : angular_channels[0]]
    elif angular_channels is not None:
        harmonics = unit_harmonics(direction, len(angular_channels) - 1)
        q, k = (expand_channels(x, harmonics, angular_channels) for x in (q, k))
    factor = _bias_factor(scale)
    bias = _bias_channels(log_envelope.unsqueeze(-1).expand(-1, k.shape[1]) / (scale * factor), k.dtype)
    padding = -(k.shape[-1] + bias.shape[-1]) % CHANNEL_MULTIPLE
    constant = torch.nn.functional.pad(q.new_full((bias.shape[-1],), factor), (0, padding))
    queries = torch.cat([q, constant.expand(*q.shape[:2], -1)], -1)
    keys = torch.cat([k, torch.nn.functional.pad(bias, (0, padding))], -1)
    return queries, keys


def padding_key(width: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A key ``(width,)`` that no query sees; ``channels`` of :func:`logit_channels` come before its bias."""
    key = torch.zeros(width, dtype=dtype, device=device)
    key[channels] = _floor(dtype)
    return key


def logit_channels(head_size: int, angular_channels: tuple[int, ...] | None, self_queries_only: bool) -> int:
    """Channels of :func:`plain_operands` before those of the bias."""
    if angular_channels is None:
        return head_size
    if self_queries_only:
        return angular_channels[0]
    return sum((2 * degree + 1) * count for degree, count in enumerate(angular_channels))


def first_derivative_only(backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors themselves, whose gradients refuse to be differentiated, by whichever way they came about."""
    return tuple(_DifferentiableOnce.apply(x, backend) if x.requires_grad else x for x in tensors)


def pad_channels(x: Tensor, width: int) -> Tensor:
    """``(..., d)`` to ``(..., width)`` by zeros."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _bias_factor(scale: float) -> float:
    """A power of two, exact in every type, by which ``scale`` is about one: a bias keeps its size as a channel."""
    return math.copysign(2.0 ** min(15, max(-15, round(-math.log2(abs(scale))))), scale)


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
        from escaip.ops.backends import BACKENDS

        able = ", ".join(info.name for info in BACKENDS if info.derivatives is None or info.derivatives >= 2)
        raise ConfigError(
            f"attention backend {ctx.backend!r} has one derivative, and a second was asked for: "
            f"use auto or one of {able} (attention_backend in the model's config)"
        )
