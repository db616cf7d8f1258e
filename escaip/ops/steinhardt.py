"""Bond-orientational order of atoms (Steinhardt et al. 1983): in plain operations, and on the CPU by pairs of bonds in
C++.

By the addition theorem the norm over ``m`` of ``Σ_j w_j Ŷ_lm(n_j)`` needs no harmonics:

    N_l = Σ_jk w_j w_k P_l(n_j · n_k)

with the Legendre polynomials ``P_l``; a token without a direction counts in ``l = 0`` only. With cotangents ``g_l`` and
``f(c) = Σ_l g_l P_l(c)`` the first derivative is

    ∂/∂w_j = 2 Σ_k w_k f(c_jk)        ∂/∂n_j = 2 w_j Σ_k w_k f'(c_jk) n_k

and for cotangents ``a_j`` and ``b_j`` of these two, with ``s_jk = b_j · n_k + b_k · n_j``, the second is

    ∂/∂g_l = 2 Σ_jk [a_j w_k P_l(c_jk) + w_j w_k P_l'(c_jk) b_j · n_k]
    ∂/∂w_j = 2 Σ_k [a_k f(c_jk) + w_k f'(c_jk) s_jk]
    ∂/∂n_j = 2 Σ_k {[(a_j w_k + a_k w_j) f'(c_jk) + w_j w_k f''(c_jk) s_jk] n_k + w_j w_k f'(c_jk) b_k}

Off the unit sphere the Legendre polynomials differ from the solid harmonics of the plain operations. Positions do not
see that: a direction is a displacement over its length, whose derivative has no part along it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.cpp import has_kernels
from escaip.ops.rows import sum_rows

PUBLISHED_FLOOR = 1e-6
MAX_DEGREE = 11  # of e3nn's harmonics


def bond_orientational_order(
    direction: Tensor,
    weight: Tensor,
    center: Tensor,
    num_atoms: int,
    l_max: int,
    *,
    floor: str = "smooth",
    epsilon: float = PUBLISHED_FLOOR,
    offsets: Tensor | None = None,
) -> Tensor:
    """Computes ``BOO_l(i) = |Σ_j w_j Ŷ_l(n_j) / Σ_j w_j|`` of every atom, the norm over ``m``, for ``l = 0 .. l_max``.

    The root needs a floor ``ε`` to keep its derivatives finite where symmetry makes the sum vanish.
    ``"smooth"`` takes ``√((s + ε) / (1 + ε))`` of the squared norm ``s``: all derivatives are continuous, it is
    ``√ε`` at 0 and 1 at 1, so that ``BOO_0 = 1`` stays exact, and it differs from ``√s`` by at most ``√ε``. In a
    perfect crystal it is a parabola for displacements below some ``√ε`` of a bond, and a cone beyond.
    ``"clamp"`` takes ``√max(s, ε)`` as published, for weights trained that way: its slope jumps at ``s = ε``, and so
    do forces.

    Args:
        direction: ``(T, 3)`` unit vectors, zero for self tokens (which then count in ``l = 0`` only).
        weight: ``(T,)``, non-negative: ``exp(log_envelope)``, or ones for the published, discontinuous feature.
        center: ``(T,)`` int64, atom each token belongs to.
        num_atoms: ``N``.
        l_max: highest degree.
        floor: ``"smooth"`` or ``"clamp"``.
        epsilon: ``ε``.
        offsets: ``(N + 1,)`` int64 where the tokens of an atom are consecutive: on the CPU the sums are then made by
            one kernel, with two derivatives. None for plain operations, with any number of them.

    Returns:
        ``(N, l_max + 1)``, without unit, differentiable twice in ``direction`` and ``weight``.

    Raises:
        ConfigError: no such floor, or a degree outside of 0 .. 11.
    """
    if floor not in ("smooth", "clamp"):
        raise ConfigError(f"floor {floor!r} does not exist: choose smooth or clamp")
    if not 0 <= l_max <= MAX_DEGREE:
        raise ConfigError(f"l_max is {l_max}: it must be in 0 .. {MAX_DEGREE}")
    total = sum_rows(weight, center, num_atoms)
    if offsets is not None and direction.device.type == "cpu" and has_kernels():
        power = power_spectrum(direction, weight, offsets, l_max) / total.square()[:, None]
    else:
        harmonics = spherical_harmonics(direction, l_max)
        sums = sum_rows(harmonics * weight[:, None], center, num_atoms)
        squares = (sums / total[:, None]).square()
        sizes = [2 * degree + 1 for degree in range(l_max + 1)]
        power = torch.stack([part.sum(dim=1) for part in squares.split(sizes, dim=1)], dim=1)
    if floor == "clamp":
        return power.clamp(min=epsilon).sqrt()
    return ((power + epsilon) / (1.0 + epsilon)).sqrt()


def spherical_harmonics(direction: Tensor, l_max: int) -> Tensor:
    """Computes real harmonics of unit norm, which vanish at the zero vector except that of ``l = 0``.

    Args:
        direction: ``(T, 3)`` unit vectors, or zero.
        l_max: highest degree, at most 11.

    Returns:
        ``(T, (l_max + 1)²)``, degree by degree; ``Σ_m Ŷ_lm(n) Ŷ_lm(n') = P_l(n·n')``.
    """
    from e3nn import o3  # takes a second to import

    degrees = list(range(l_max + 1))
    return o3.spherical_harmonics(degrees, direction, normalize=False, normalization="norm")


def power_spectrum(direction: Tensor, weight: Tensor, offsets: Tensor, l_max: int) -> Tensor:
    """Computes ``N_l`` of every atom by the C++ kernels.

    Args:
        direction: ``(T, 3)`` unit vectors, or zero, on the CPU.
        weight: ``(T,)``.
        offsets: ``(N + 1,)`` int64; tokens of an atom are consecutive.
        l_max: highest degree, at most 16.

    Returns:
        ``(N, l_max + 1)``, differentiable twice in ``direction`` and ``weight``.
    """
    return torch.ops.escaip.steinhardt(direction, weight, offsets, l_max)


def _define(suffix: str, schema: str, fake: Any, backward: Any, keep: Any) -> None:
    """Defines an operator of ``cpp/binding.cpp``."""
    name = f"escaip::steinhardt{suffix}"
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, backward, setup_context=keep)


def _fake_value(direction: Tensor, weight: Tensor, offsets: Tensor, l_max: int) -> Tensor:
    return direction.new_empty(offsets.shape[0] - 1, l_max + 1)


def _fake_gradients(grad: Tensor, direction: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(direction), torch.empty_like(weight)


def _fake_second(
    to_direction: Tensor, to_weight: Tensor, grad: Tensor, direction: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(direction), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))


def _differentiate_value(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.escaip.steinhardt_backward(grad, *ctx.saved_tensors), None, None)


def _differentiate_gradients(ctx: Any, to_direction: Tensor, to_weight: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.escaip.steinhardt_double_backward(to_direction, to_weight, *ctx.saved_tensors), None)


def _refuse(ctx: Any, *_: Any) -> NoReturn:
    raise ConfigError(
        "the bond-orientational order has two derivatives on the CPU, and a third was asked for: compute it in plain "
        "operations, with bond_orientational_order(..., offsets=None)"
    )


_INPUTS = "Tensor direction, Tensor weight, Tensor offsets"
_define("", f"({_INPUTS}, int l_max) -> Tensor", _fake_value, _differentiate_value, _keep)
_define("_backward", f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)", _fake_gradients, _differentiate_gradients, _keep)
_define(
    "_double_backward", f"(Tensor to_direction, Tensor to_weight, Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _fake_second, _refuse, _keep,
)  # fmt: skip
