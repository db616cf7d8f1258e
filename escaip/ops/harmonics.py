"""Densities of neighbors in spherical harmonics and what rotations leave alone of them: power spectra, and the
bond-orientational order of Steinhardt et al. (1983). In plain operations; on the CPU by one kernel in C++.

With channels ``c`` of weights and solid harmonics ``Y_lm`` of unit norm, ``Σ_m Y_lm(u) Y_lm(v) = P_l(u · v)``,

    A_clm = Σ_j w_jc Y_lm(n_j)        p_cc'l = Σ_m A_clm A_c'lm = Σ_jk w_jc w_kc' P_l(n_j · n_k)

With cotangents ``g_cc'l`` and ``B = ∂(Σ g p)/∂A``, linear in ``A``, the first derivative is

    ∂/∂w_jc = Σ_lm B_clm Y_lm(n_j)        ∂/∂n_j = Σ_clm w_jc B_clm ∇Y_lm(n_j)

and for cotangents ``a_jc`` and ``b_j`` of these two, with ``Y'_lm(n_j) = b_j · ∇Y_lm(n_j)``,
``A'_clm = Σ_j [a_jc Y_lm(n_j) + w_jc Y'_lm(n_j)]`` and ``B'`` made of ``A'`` as ``B`` is of ``A``, the second is

    ∂/∂g_cc'l = Σ_m (A_clm A'_c'lm + A'_clm A_c'lm)
    ∂/∂w_jc = Σ_lm [B'_clm Y_lm(n_j) + B_clm Y'_lm(n_j)]
    ∂/∂n_j = Σ_clm [(B'_clm w_jc + B_clm a_jc) ∇Y_lm(n_j) + B_clm w_jc ∇Y'_lm(n_j)]

Gradients of solid harmonics are sums of those of one degree less (Hobson 1931), and so are those of ``Y'`` of ``Y'``.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.cpp import has_kernels
from escaip.ops.outer import sum_outer
from escaip.ops.rows import sum_rows

PUBLISHED_FLOOR = 1e-6
MAX_DEGREE = 16


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
    recursion: Tensor | None = None,
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
        offsets: see ``power_spectrum``.
        recursion: see ``power_spectrum``.

    Returns:
        ``(N, l_max + 1)``, without unit, differentiable twice in ``direction`` and ``weight``.

    Raises:
        ConfigError: no such floor, or a degree outside of 0 .. 16.
    """
    if floor not in ("smooth", "clamp"):
        raise ConfigError(f"floor {floor!r} does not exist: choose smooth or clamp")
    if not 0 <= l_max <= MAX_DEGREE:
        raise ConfigError(f"l_max is {l_max}: it must be in 0 .. {MAX_DEGREE}")
    total = sum_rows(weight, center, num_atoms)
    power = power_spectrum(direction, weight[:, None], center, num_atoms, l_max, offsets=offsets, recursion=recursion)
    power = power.squeeze(1) / total.square()[:, None]
    if floor == "clamp":
        return power.clamp(min=epsilon).sqrt()
    return ((power + epsilon) / (1.0 + epsilon)).sqrt()


def power_spectrum(
    direction: Tensor,
    weight: Tensor,
    center: Tensor,
    num_atoms: int,
    l_max: int,
    pairs: tuple[Tensor, Tensor] | None = None,
    *,
    offsets: Tensor | None = None,
    recursion: Tensor | None = None,
) -> Tensor:
    """Computes ``p_cc'l(i) = Σ_m A_clm A_c'lm`` of the densities ``A_clm = Σ_j w_jc Y_lm(n_j)`` of every atom.

    Args:
        direction: ``(T, 3)`` unit vectors, zero for self tokens (which then count in ``l = 0`` only).
        weight: ``(T, C)``.
        center: ``(T,)`` int64, atom each token belongs to.
        num_atoms: ``N``.
        l_max: highest degree, at most 16.
        pairs: two of ``(P,)`` int64, the channels ``c`` and ``c'`` of each product; None for each channel with itself.
        offsets: ``(N + 1,)`` int64 where the tokens of an atom are consecutive: on the CPU one kernel then does it all,
            with two derivatives, and on a GPU one sums. None for plain operations, with any number of derivatives.
        recursion: result of ``harmonic_recursion`` for this degree; see ``spherical_harmonics``.

    Returns:
        ``(N, P, l_max + 1)``, differentiable twice in ``direction`` and ``weight``.
    """
    first, second = (None, None) if pairs is None else pairs
    if offsets is not None and direction.device.type == "cpu" and has_kernels():
        found: Tensor = torch.ops.escaip.power_spectrum(direction, weight, offsets, first, second, l_max)
        return found
    harmonics = spherical_harmonics(direction, l_max, recursion)  # (T, (l_max + 1)²)
    sums = sum_outer(weight, harmonics, center, num_atoms, offsets)  # (N, C, (l_max + 1)²)
    products = sums.square() if first is None or second is None else sums[:, first] * sums[:, second]
    parts = products.split([2 * degree + 1 for degree in range(l_max + 1)], -1)
    return torch.stack([part.sum(-1) for part in parts], -1)


def spherical_harmonics(vector: Tensor, l_max: int, recursion: Tensor | None = None) -> Tensor:
    """Computes the real solid harmonics of norm ``|v|^l``: ``Σ_m Ŷ_lm(u) Ŷ_lm(v) = |u|^l |v|^l P_l(cos)``.

    Polynomials in ``x, y, z``, so that nothing is singular at the poles or at the zero vector, where all but
    ``l = 0`` vanish. Per degree the order is ``m = 0 .. l`` (cosines), then ``m = 1 .. l`` (sines).

    Args:
        vector: ``(T, 3)``.
        l_max: highest degree.
        recursion: result of ``harmonic_recursion`` for this degree, on the device of ``vector``. None copies it
            there, which waits for a GPU and cannot be recorded in a CUDA graph.

    Returns:
        ``(T, (l_max + 1)²)``.
    """
    cosine, sine = _azimuthal(vector, l_max)  # (T, l_max + 1) each
    z, squared = vector[:, 2:3], vector.square().sum(dim=1, keepdim=True)
    if recursion is None:
        recursion = harmonic_recursion(l_max).to(vector.device)
    rise, fall, start = recursion.to(vector.dtype).unbind(0)
    before, polar = torch.zeros_like(cosine), start[0].expand_as(cosine)
    columns = [polar[:, :1]]
    for degree in range(1, l_max + 1):
        before, polar = polar, rise[degree] * (z * polar) - fall[degree] * (squared * before) + start[degree]
        columns.append(polar[:, : degree + 1] * cosine[:, : degree + 1])
        columns.append(polar[:, 1 : degree + 1] * sine[:, 1 : degree + 1])
    return torch.cat(columns, dim=1)


def harmonic_recursion(l_max: int) -> Tensor:
    """Returns the coefficients ``rise, fall, start`` of the harmonics, ``(3, l_max + 1, l_max + 1)`` float64."""
    size = l_max + 1
    return torch.tensor([[row[:size] for row in table[:size]] for table in _TABLES], dtype=torch.float64)


def _azimuthal(vector: Tensor, l_max: int) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts of ``(x + iy)^m`` for ``m = 0 .. l_max``, ``(T, l_max + 1)`` each, by doubling."""
    real, imaginary = torch.ones_like(vector[:, :1]), torch.zeros_like(vector[:, :1])
    step_real, step_imaginary = vector[:, 0:1], vector[:, 1:2]  # (x + iy)^(number of columns so far)
    while real.shape[1] <= l_max:
        more = (real * step_real - imaginary * step_imaginary, real * step_imaginary + imaginary * step_real)
        real, imaginary = torch.cat([real, more[0]], dim=1), torch.cat([imaginary, more[1]], dim=1)
        step_real, step_imaginary = step_real**2 - step_imaginary**2, 2.0 * step_real * step_imaginary
    return real[:, : l_max + 1], imaginary[:, : l_max + 1]


def _recursion(l_max: int) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Tables of ``Q_l^m = rise·z·Q_{l−1}^m − fall·r²·Q_{l−2}^m + start``, rows ``l``, columns ``m``.

    ``Q_l^m`` is the associated Legendre function over ``sin^m``, without the Condon–Shortley sign, scaled so
    that the harmonics have unit norm.
    """

    def norm(l: int, m: int) -> float:  # noqa: E741
        return math.sqrt((1 if m == 0 else 2) * math.factorial(l - m) / math.factorial(l + m))

    size = l_max + 1
    rise, fall, start = ([[0.0] * size for _ in range(size)] for _ in range(3))
    for m in range(size):
        start[m][m] = norm(m, m) * math.prod(range(1, 2 * m, 2))
        for l in range(m + 1, size):  # noqa: E741
            rise[l][m] = (2 * l - 1) / (l - m) * norm(l, m) / norm(l - 1, m)
            if l >= m + 2:
                fall[l][m] = (l + m - 1) / (l - m) * norm(l, m) / norm(l - 2, m)
    return rise, fall, start


# Rows and columns do not depend on the highest degree: computed once, sliced for each.
_TABLES = _recursion(MAX_DEGREE)


def _define(suffix: str, schema: str, fake: Any, backward: Any) -> None:
    """Defines an operator of ``cpp/binding.cpp``."""
    name = f"escaip::power_spectrum{suffix}"
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, backward, setup_context=_keep)


def _fake_value(
    direction: Tensor, weight: Tensor, offsets: Tensor, first: Tensor | None, second: Tensor | None, l_max: int
) -> Tensor:
    pairs = weight.shape[1] if first is None else first.shape[0]
    return direction.new_empty(offsets.shape[0] - 1, pairs, l_max + 1)


def _fake_gradients(grad: Tensor, direction: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(direction), torch.empty_like(weight)


def _fake_second(
    to_direction: Tensor, to_weight: Tensor, grad: Tensor, direction: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(direction), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor) or x is None))


def _differentiate_value(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.escaip.power_spectrum_backward(grad, *ctx.saved_tensors), None, None, None, None)


def _differentiate_gradients(ctx: Any, to_direction: Tensor, to_weight: Tensor) -> tuple[Any, ...]:
    second = torch.ops.escaip.power_spectrum_double_backward(to_direction, to_weight, *ctx.saved_tensors)
    return (*second, None, None, None)


def _refuse(ctx: Any, *_: Any) -> NoReturn:
    raise ConfigError(
        "power spectra and the bond-orientational order have two derivatives on the CPU, and a third was asked for: "
        "compute them in plain operations, with offsets=None"
    )


_INPUTS = "Tensor direction, Tensor weight, Tensor offsets, Tensor? first, Tensor? second"
_define("", f"({_INPUTS}, int l_max) -> Tensor", _fake_value, _differentiate_value)
_define("_backward", f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)", _fake_gradients, _differentiate_gradients)
_define(
    "_double_backward", f"(Tensor to_direction, Tensor to_weight, Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _fake_second, _refuse,
)  # fmt: skip
