"""Invariants of the density of neighbors around an atom, and an energy linear in them.

Softmax attention takes means: it learns the energy of a missing neighbor slowly and spreads it over the cell. Sums over
neighbors show it at once. They enter the atoms' features, and an energy linear in them, linear ACE up to three bodies
(Drautz, Phys. Rev. B 99, 014104, 2019), is solved for in closed form, before training begins and
while the network learns (``escaip.train.linear_fit``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from escaip.nn.embedding import GaussianBasis
from escaip.nn.layers import PreciseTables
from escaip.ops import sum_rows
from escaip.ops.harmonics import harmonic_recursion, power_spectrum
from escaip.types import AtomInputs, Tokens

_CLIP = 4.0  # standard deviations beyond which a feature saturates


class DensityUpdate(PreciseTables):
    """What the density of neighbors around an atom adds to its features, learned channels and all.

    ``A_clm = s Σ_j w_j (W x_j)_c Y_lm(n_j)`` over the neighbors, with features ``x_j`` of their tokens and the envelope
    ``w_j``, is not divided by the number of neighbors. The update is linear in ``A_c00`` and in ``√(1 + p_cl) − 1``,
    which is smooth where the power ``p_cl = Σ_m A_clm²`` vanishes and grows as ``A`` does.

    Args:
        hidden_size: ``H``.
        channels: ``C``.
        degree: highest ``l``, at least 1.
        num_neighbors: at which the sum of independent terms is of the size of one; ``s`` is one over its root.
    """

    recursion: Tensor

    def __init__(self, hidden_size: int, channels: int, degree: int, num_neighbors: int) -> None:
        super().__init__()
        self.weight = nn.Linear(hidden_size, channels, bias=False)
        self.project = nn.Linear(channels * (degree + 1), hidden_size)
        self.degree, self.scale = degree, num_neighbors**-0.5
        self.register_buffer("recursion", harmonic_recursion(degree), persistent=False)

    def forward(self, features: Tensor, tokens: Tokens) -> Tensor:
        """``(t, H)`` to ``(n, H)``."""
        envelope = tokens.log_envelope.exp().index_fill(0, tokens.self_token, 0.0)
        weight = self.weight(features) * (self.scale * envelope).unsqueeze(-1)
        center = tokens.center - tokens.first
        power = power_spectrum(
            tokens.direction, weight, center, tokens.num_atoms, self.degree, offsets=tokens.offsets,
            recursion=self.recursion,
        )  # fmt: skip
        rooted = torch.sqrt(1.0 + power[..., 1:]) - 1.0
        return self.project(torch.cat([sum_rows(weight, center, tokens.num_atoms), rooted.flatten(1)], 1))


class DensityInvariants(PreciseTables):
    """Products of two densities of neighbors that rotations leave alone.

    ``A_ncm = Σ_j w_j g_n(d_j) [Z_j = c] Ŷ_lm(n_j)`` over the neighbors of an atom, with Gaussians ``g_n`` and a
    channel ``c`` for each element. Features are ``A_nc`` of ``l = 0`` and ``Σ_m A_ncm A_nc'm`` for ``c ≤ c'`` and
    ``l = 0 .. degree``. They are not divided by the number of neighbors.

    Args:
        num_radial: Gaussians on ``[0, cutoff]``, of a width of one spacing.
        degree: highest ``l``.
        channels: ``C``, of the elements.
        cutoff: Å.
        num_elements: atomic numbers are below it.

    Attributes:
        channel: ``(num_elements, C)``, what an element counts in each channel, as a neighbor and as a center.
        mean, spread: ``(num_elements, F)`` of the features around atoms of an element in training.
        coefficients: ``(C, F)`` for each channel of the center, energies in units of the potential's scale.
    """

    channel: Tensor
    mean: Tensor
    spread: Tensor
    coefficients: Tensor
    first: Tensor
    second: Tensor
    recursion: Tensor

    def __init__(self, num_radial: int, degree: int, channels: int, cutoff: float, num_elements: int) -> None:
        super().__init__()
        self.basis = GaussianBasis(num_radial, cutoff, 1.0)
        self.degree = degree
        pairs = torch.triu_indices(channels, channels).unsqueeze(-1) * num_radial + torch.arange(num_radial)
        first, second = pairs.flatten(1)  # the same Gaussian of both elements
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        self.num_features = num_radial * channels + len(first) * (degree + 1)
        self.register_buffer("channel", torch.ones(num_elements, channels).double())
        self.register_buffer("mean", torch.zeros(num_elements, self.num_features).double())
        self.register_buffer("spread", torch.ones_like(self.mean))
        self.register_buffer("coefficients", torch.zeros(channels, self.num_features).double())
        self.register_buffer("recursion", harmonic_recursion(degree), persistent=False)

    def forward(self, tokens: Tokens, atoms: AtomInputs) -> Tensor:
        """Returns the features ``(n, F)`` of the atoms of a chunk, not standardized."""
        weight = tokens.log_envelope.exp().index_fill(0, tokens.self_token, 0.0)
        radial = self.basis(tokens.distance) * weight.unsqueeze(-1)  # (t, R)
        channel = self.channel.to(radial.dtype)[atoms.atomic_numbers[tokens.neighbor]]  # (t, C)
        density = (channel.unsqueeze(-1) * radial.unsqueeze(1)).flatten(1)  # (t, C R)
        center = tokens.center - tokens.first
        power = power_spectrum(
            tokens.direction, density, center, tokens.num_atoms, self.degree, (self.first, self.second),
            offsets=tokens.offsets, recursion=self.recursion,
        )  # fmt: skip
        return torch.cat([sum_rows(density, center, tokens.num_atoms), power.flatten(1)], 1)

    def standardized(self, features: Tensor, atomic_numbers: Tensor) -> Tensor:
        """Returns features of atoms less their mean, in units of their spread, bounded smoothly; ``(N, F)``."""
        mean, spread = self.mean.to(features.dtype)[atomic_numbers], self.spread.to(features.dtype)[atomic_numbers]
        return _CLIP * torch.tanh((features - mean) / (_CLIP * spread))

    def energies(self, features: Tensor, atomic_numbers: Tensor) -> Tensor:
        """Returns the linear energy of atoms, ``(N,)`` in units of the potential's scale."""
        of_channels = features @ self.coefficients.to(features.dtype).T  # (N, C)
        return (of_channels * self.channel.to(features.dtype)[atomic_numbers]).sum(-1)
