"""Attention within the neighborhoods of atoms, and among all atoms of a system."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.files import first_line
from escaip.ops.autograd import OPERATORS
from escaip.ops.backends import BackendInfo, Request, choose_backend
from escaip.ops.inputs import HALF_TYPES, accumulation_dtype
from escaip.ops.reference import MAX_L


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_envelope: Tensor,
    direction: Tensor,
    offsets: Tensor,
    angular_channels: tuple[int, ...] | None,
    scale: float,
    backend: str = "auto",
    *,
    self_queries_only: bool = False,
    dropout: float = 0.0,
    angular_values: bool = False,
    derivatives: int | None = None,
) -> Tensor:
    """Attention of each token over the tokens of the same atom, with bond-angle logits.

    ``out_j = Σ_k softmax_k(scale · Σ_l P_l(n_j·n_k) (q_j^l·k_k^l) + b_k) v_k`` over the tokens
    ``k`` of the atom of ``j``, where the head dimension is split into groups ``l`` of
    ``angular_channels[l]`` channels and ``P_l`` is the Legendre polynomial, ``δ_l0`` where either
    token is a self token (zero direction). By the addition theorem this equals multiplying each
    channel by the ``2l + 1`` spherical harmonics of its bond (EScAIP, arXiv 2410.24169, section 4).

    Under autocast q, k and v are taken in autocast's dtype; log envelope, directions and all sums
    stay in float32 (float64 where q is).

    Args:
        q: ``(T, h, d)`` queries; ``(N, h, d)`` with ``self_queries_only``.
        k: ``(T, h, d)`` keys.
        v: ``(T, h, d)`` values.
        log_envelope: ``(T,)`` added to every logit whose key is that token; −inf removes it. At
            least one token of each neighborhood, the self token, must be finite.
        direction: ``(T, 3)`` unit vectors, zero for the self token.
        offsets: ``(N + 1,)`` int64; tokens of atom ``i`` are ``offsets[i] : offsets[i + 1]``.
        angular_channels: channels per degree ``l = 0 .. 4``, summing to ``d``; None for no angles.
        scale: factor on the products.
        backend: ``"auto"`` or a name from ``available_backends``.
        self_queries_only: compute the ``N`` self tokens' rows alone (their logits involve the
            group ``l = 0`` only).
        dropout: probability of dropping an attention weight.
        angular_values: multiply the channels of degree ``l`` of ``v_k`` by ``P_l(n_j·n_k)`` too, where both tokens
            have a direction; off, the sum above.
        derivatives: how often the result will be differentiated, which ``"auto"`` must allow for; by
            default twice where the log envelope or the directions require gradients (forces by
            differentiation), once where only q, k or v do.

    Returns:
        ``(T, h, d)``, or ``(N, h, d)`` with ``self_queries_only``, in the dtype of q.

    Raises:
        ConfigError: the backend does not exist, is not usable here or cannot do what is asked; q, k
            and v differ in dtype; ``angular_channels`` does not fit ``d``; or values with angles and no groups.
    """
    _check_channels(angular_channels, q.shape[-1])
    if angular_values and angular_channels is None:
        raise ConfigError("angular_values needs angular_channels: give the channels of each degree")
    q, k, v = _one_dtype(q, k, v)
    geometry = (log_envelope, direction)
    if derivatives is None:
        derivatives = _expected_derivatives((q, k, v), geometry) if backend == "auto" else 0
    angular_values = angular_values and not self_queries_only  # self tokens have no angles
    request = Request(q.device.type, q.dtype, derivatives, dropout > 0.0, False, angular_values)
    info = choose_backend(backend, request)
    if k.shape[0] == 0:
        return q.new_zeros(q.shape)
    log_envelope, direction = (x.to(accumulation_dtype(q)) for x in geometry)
    if info.name not in OPERATORS:
        options = (self_queries_only, dropout, angular_values)
        return _run(info, q, k, v, log_envelope, direction, offsets, angular_channels, scale, *options)
    widths = (q.shape[-1],) if angular_channels is None else tuple(angular_channels)
    query_offsets = offsets
    if self_queries_only:  # the direction of a self token is zero: group 0 alone
        widths, query_offsets = widths[:1], torch.arange(offsets.numel(), device=offsets.device)
    angles = direction if len(widths) > 1 else None
    constants = (list(widths), scale, angular_values and angles is not None)
    return _attend(info.name, q, k, v, log_envelope, angles, query_offsets, offsets, *constants)


def node_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    scale: float,
    backend: str = "auto",
    *,
    derivatives: int | None = None,
) -> Tensor:
    """Attention of each atom over all atoms of its system (AllScAIP, arXiv 2603.06567).

    ``out_i = Σ_j softmax_j(scale · q_i·k_j) v_j`` over the atoms ``j`` of the system of ``i``. Systems are
    packed; memory is linear in the atoms with the backends that ``"auto"`` takes.

    Args:
        q: ``(N, h, d)`` queries.
        k: ``(N, h, d)`` keys.
        v: ``(N, h, d)`` values.
        offsets: ``(B + 1,)`` int64; atoms of system ``b`` are ``offsets[b] : offsets[b + 1]``.
        scale: factor on the products.
        backend: ``"auto"`` or a name from ``available_backends``.
        derivatives: how often the result will be differentiated; by default twice where q, k or v
            require gradients.

    Returns:
        ``(N, h, d)`` in the dtype of q.

    Raises:
        ConfigError: the backend does not exist, is not usable here or cannot do what is asked, or q, k and v
            differ in dtype.
    """
    q, k, v = _one_dtype(q, k, v)
    if derivatives is None:
        derivatives = _expected_derivatives((), (q, k, v)) if backend == "auto" else 0
    request = Request(q.device.type, q.dtype, derivatives, False, True, False)
    info = choose_backend(backend, request)
    if k.shape[0] == 0:
        return q.new_zeros(q.shape)
    if info.name in OPERATORS:
        return _attend(info.name, q, k, v, None, None, offsets, offsets, [q.shape[-1]], scale, False)
    nothing = q.new_zeros(k.shape[0], 4, dtype=accumulation_dtype(q))
    occupied = torch.cat([offsets[:1], offsets[1:][offsets.diff() > 0]])
    return _run(info, q, k, v, nothing[:, 0], nothing[:, 1:], occupied, None, scale, False, 0.0, False)


def _attend(backend: str, *arguments: Any) -> Tensor:
    """Calls the operator of a kernel backend with the fields of ``AttentionInputs``."""
    operator = OPERATORS[backend].value
    if torch.compiler.is_compiling():
        return operator(*arguments)[0]
    try:
        return operator(*arguments)[0]
    except ValueError as error:  # of the C++
        raise ConfigError(first_line(error)) from error


def _run(info: BackendInfo, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Calls a backend that is one differentiable function; the last two arguments are those that not all have."""
    module = info.name if info.name in ("reference", "dense") else "library"
    function = getattr(importlib.import_module(f"escaip.ops.{module}"), f"{info.name}_attention")
    rest = arguments if info.dropout else arguments[:-2]
    with torch.autocast(q.device.type, enabled=False):  # dtypes are settled
        if info.name in ("reference", "dense") and q.dtype in HALF_TYPES:  # sums in float32, as every kernel does
            return function(q.float(), k.float(), v.float(), *rest).to(q.dtype)
        return function(q, k, v, *rest)


def _check_channels(angular_channels: tuple[int, ...] | None, head_size: int) -> None:
    if angular_channels is None:
        return
    if sum(angular_channels) != head_size or min(angular_channels) < 0 or angular_channels[0] == 0:
        raise ConfigError(
            f"angular_channels {tuple(angular_channels)} must be non-negative, start above 0 and sum to the "
            f"head dimension {head_size}"
        )
    if len(angular_channels) > MAX_L + 1:
        raise ConfigError(f"angular_channels has {len(angular_channels)} groups: l goes up to {MAX_L} at most")


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError(f"attention takes q, k and v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    return q, k, v


def _expected_derivatives(features: tuple[Tensor, ...], geometry: tuple[Tensor, ...]) -> int:
    if not torch.is_grad_enabled():
        return 0
    if any(x.requires_grad for x in geometry):
        return 2
    return int(any(x.requires_grad for x in features))
