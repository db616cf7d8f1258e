"""One function for neighborhood attention, and the table of what each backend can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.dense import dense_attention
from escaip.ops.legendre import MAX_L
from escaip.ops.reference import reference_attention


@dataclass(frozen=True)
class BackendInfo:
    """What a backend supports.

    Attributes:
        name: what to pass as ``backend``.
        derivatives: how often it can be differentiated; None for any number of times.
        devices: device types it runs on; empty for every device.
        angular: whether it takes ``angular_channels``.
        description: one line for tables.
    """

    name: str
    derivatives: int | None
    devices: tuple[str, ...]
    angular: bool
    description: str


_BACKENDS: dict[str, tuple[BackendInfo, Callable[..., Tensor]]] = {
    "reference": (
        BackendInfo("reference", None, (), True, "plain PyTorch over pairs of tokens: the specification"),
        reference_attention,
    ),
    "dense": (
        BackendInfo("dense", None, (), True, "plain PyTorch on padded matrices: fast on CPU"),
        dense_attention,
    ),
}


def available_backends() -> tuple[BackendInfo, ...]:
    """Returns the backends usable on this machine, each with what it supports."""
    return tuple(info for info, _ in _BACKENDS.values())


def check_backend(name: str) -> None:
    """Raises ConfigError when ``name`` is neither ``"auto"`` nor an available backend."""
    if name != "auto" and name not in _BACKENDS:
        raise ConfigError(f"attention backend {name!r} does not exist: choose auto, {', '.join(_BACKENDS)}")


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
) -> Tensor:
    """Attention of each token over the tokens of the same atom, with bond-angle logits.

    ``out_j = Σ_k softmax_k(scale · Σ_l P_l(n_j·n_k) (q_j^l·k_k^l) + b_k) v_k`` over the tokens
    ``k`` of the atom of ``j``, where the head dimension is split into groups ``l`` of
    ``angular_channels[l]`` channels and ``P_l`` is the Legendre polynomial, ``δ_l0`` where either
    token is a self token (zero direction). By the addition theorem this equals multiplying each
    channel by the ``2l + 1`` spherical harmonics of its bond (EScAIP, arXiv 2410.24169, section 4).

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
        backend: ``"auto"`` or a name from :func:`available_backends`.
        self_queries_only: compute the ``N`` self tokens' rows alone (their logits involve the
            group ``l = 0`` only).
        dropout: probability of dropping an attention weight.

    Returns:
        ``(T, h, d)``, or ``(N, h, d)`` with ``self_queries_only``.

    Raises:
        ConfigError: the backend does not exist, or ``angular_channels`` does not fit ``d``.
    """
    check_backend(backend)
    if angular_channels is not None:
        if sum(angular_channels) != q.shape[-1] or min(angular_channels) < 0 or angular_channels[0] == 0:
            raise ConfigError(
                f"angular_channels {tuple(angular_channels)} must be non-negative, start above 0 and sum to the "
                f"head dimension {q.shape[-1]}"
            )
        if len(angular_channels) > MAX_L + 1:
            raise ConfigError(f"angular_channels has {len(angular_channels)} groups: l goes up to {MAX_L} at most")
    if k.shape[0] == 0:
        return q.new_zeros(q.shape)
    _, function = _BACKENDS["dense" if backend == "auto" else backend]
    return function(q, k, v, log_envelope, direction, offsets, angular_channels, scale, self_queries_only, dropout)
