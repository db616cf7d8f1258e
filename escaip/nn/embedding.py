"""From raw geometry and elements to token features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from escaip.errors import DataError
from escaip.graph import bond_orientational_order
from escaip.graph.features import harmonic_recursion
from escaip.nn.layers import make_activation, make_norm
from escaip.ops import spline, take_rows
from escaip.types import AtomInputs, Tokens

# A function of the distances, given their basis: (R, num_radial) to (R, H).
Curve: TypeAlias = Callable[[Tensor], Tensor]

# Smaller Gaussians count for nothing even in float64, but their products with gradients would be denormal numbers, for
# which processors take a hundred times as long: weight gradients of 600 Gaussians were five times slower.
_LEAST_EXPONENT = -45.0


class GaussianBasis(nn.Module):
    """Gaussians on ``[0, cutoff]``, of a width of ``width`` spacings (model of EScAIP, section 4)."""

    def __init__(self, num_radial: int, cutoff: float, width: float) -> None:
        super().__init__()
        self.spacing = cutoff / (num_radial - 1)
        self.sharpness = 1.0 / (2.0 * (width * self.spacing) ** 2)
        self.register_buffer("centers", torch.linspace(0.0, cutoff, num_radial), persistent=False)

    centers: Tensor

    def forward(self, distance: Tensor) -> Tensor:
        """``(T,)`` Å to ``(T, num_radial)``."""
        exponent = -self.sharpness * (distance.unsqueeze(-1) - self.centers).square()
        return torch.exp(exponent.clamp(min=_LEAST_EXPONENT))


class OrientationalOrder(nn.Module):
    """Bond-orientational order of atoms from their tokens (:func:`escaip.graph.bond_orientational_order`).

    Args:
        degrees: ``l = 0 .. degrees − 1``.
        uniform: as published: every neighbor counts alike, and the root is clamped; otherwise both are smooth.
        epsilon: floor of the root.

    Attributes:
        recursion: of the harmonics, on the model's device so that nothing waits for a copy; float64 whatever the
            model's precision.
    """

    recursion: Tensor

    def __init__(self, degrees: int, uniform: bool, epsilon: float) -> None:
        super().__init__()
        self.degrees, self.uniform, self.epsilon = degrees, uniform, epsilon
        self.register_buffer("recursion", harmonic_recursion(degrees - 1), persistent=False)

    def forward(self, part: Tokens) -> Tensor:
        """``(n, degrees)`` of the atoms of a part."""
        weight = torch.ones_like(part.distance) if self.uniform else part.log_envelope.exp()
        return bond_orientational_order(
            part.direction, weight, part.center - part.first, part.num_atoms, self.degrees - 1,
            floor="clamp" if self.uniform else "smooth", epsilon=self.epsilon, offsets=part.offsets,
            recursion=self.recursion,
        )  # fmt: skip

    def _apply(self, fn: Any, recurse: bool = True) -> OrientationalOrder:
        """Moves like any module, and keeps its precision."""
        kept = self.recursion
        super()._apply(fn, recurse)
        self.recursion = kept.to(self.recursion.device)
        return self


class AtomFeatures(nn.Module):
    """Element and bond-orientational order of one end of an edge, as features of the atom.

    One instance serves the neighbor's end, another the center's: what a concatenation followed by
    a linear layer would compute per token is computed here per atom, and gathered by the caller.
    """

    def __init__(
        self,
        num_elements: int,
        element_size: int,
        boo_degrees: int,
        boo_size: int,
        hidden_size: int,
        activation: str,
        bias: bool,
    ) -> None:
        super().__init__()
        self.element = nn.Embedding(num_elements, element_size)
        self.order = nn.Linear(boo_degrees, boo_size)
        self.activation = make_activation(activation)
        self.project = nn.Linear(boo_size + element_size, hidden_size, bias=bias)

    def forward(self, atomic_numbers: Tensor, orientational_order: Tensor) -> Tensor:
        """``(N,)`` and ``(N, boo_degrees)`` to ``(N, H)``."""
        order = self.activation(self.order(orientational_order))
        return self.project(torch.cat([order, take_rows(self.element.weight, atomic_numbers)], -1))


class EdgeAttributes(nn.Module):
    """Token features from distance, elements and orientational order of both ends, normed.

    ``norm(act(W [distance embedding, neighbor, center] + b))``, the product split into its parts
    so that only the distance part costs a row per token.
    """

    def __init__(
        self,
        num_elements: int,
        element_size: int,
        boo_degrees: int,
        boo_size: int,
        num_radial: int,
        distance_size: int,
        hidden_size: int,
        activation: str,
        norm: str,
        dropout: float,
    ) -> None:
        super().__init__()
        ends = (num_elements, element_size, boo_degrees, boo_size, hidden_size, activation)
        self.source = AtomFeatures(*ends, bias=False)
        self.target = AtomFeatures(*ends, bias=True)
        self.distance_embedding = nn.Linear(num_radial, distance_size)
        self.distance_project = nn.Linear(distance_size, hidden_size, bias=False)
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.norm = make_norm(norm, hidden_size)

    def curve(self, radial: Tensor) -> Tensor:
        """The distance's part of the product, a function of the distance alone: ``(R, num_radial)`` to ``(R, H)``."""
        return self.distance_project(self.activation(self.distance_embedding(radial)))

    @property
    def curve_weights(self) -> list[Tensor]:
        """What :meth:`curve` depends on."""
        return [*self.distance_embedding.parameters(), *self.distance_project.parameters()]

    def ends(self, atomic_numbers: Tensor, orientational_order: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of the neighbor's and the center's end, per atom: ``(N,)``, ``(N, boo_degrees)`` to ``(N, H)``."""
        return self.source(atomic_numbers, orientational_order), self.target(atomic_numbers, orientational_order)

    def forward(self, distance: Tensor, ends: tuple[Tensor, Tensor], tokens: Tokens) -> Tensor:
        """Computes the attributes of tokens.

        Args:
            distance: ``(t, H)``, :meth:`curve` at the tokens' distances.
            ends: of all atoms, from :meth:`ends`.
            tokens: whose attributes.

        Returns:
            ``(t, H)``.
        """
        mixed = distance + take_rows(ends[0], tokens.neighbor) + take_rows(ends[1], tokens.center)
        return self.norm(self.dropout(self.activation(mixed)))


class DistanceCurves(nn.Module):
    """Functions of the distance alone at many distances: exactly, or through a spline table (docs/performance.md).

    A table takes the ``K + 9`` rows of its knots through the layers instead of a row for every token, and what is left
    for a token is a sum of six rows. Energies stay conserved: forces are the exact derivative of the spline.

    Args:
        basis: of the distances.
        num_intervals: ``K``, intervals of a table on ``[0, cutoff]``.
        cutoff: in Å.
    """

    def __init__(self, basis: GaussianBasis, num_intervals: int, cutoff: float) -> None:
        super().__init__()
        self.basis = basis
        self.num_intervals = num_intervals
        self.cutoff = cutoff

    def table(self, curve: Curve) -> Tensor:
        """Coefficients of a curve given as a function of the basis, ``(K + 5, H)``."""
        centers = self.basis.centers
        # In float64, where a knot is where it should be: the table is the curve's, not that of rounded distances.
        knots = spline.knots(self.num_intervals, self.cutoff, dtype=torch.float64, device=centers.device)
        return spline.coefficients(curve(self.basis(knots).to(centers.dtype)))

    def encode(self, distance: Tensor, tabulated: bool) -> Tensor:
        """``(t,)`` Å to what :meth:`forward` takes: ``(t,)`` places in the table, or the ``(t, num_radial)`` basis."""
        if not tabulated:
            return self.basis(distance)
        # Tokens beyond the cutoff count for nothing, but a polynomial far from its interval is no finite nothing.
        return distance.clamp(max=self.cutoff) * (self.num_intervals / self.cutoff)

    def forward(self, encoded: Tensor, curve: Curve, table: Tensor | None) -> Tensor:
        """Encoded distances to ``(t, H)``: from the table, or by the curve itself where there is none."""
        return curve(encoded) if table is None else spline.interpolate(table, encoded)


class SystemEmbedding(nn.Module):
    """Total charge and spin multiplicity as features of the whole system; nothing when unused."""

    # Far beyond any molecule in the data sets; outside, an error rather than a clamp.
    MAX_CHARGE = 20
    MAX_SPIN = 40

    def __init__(self, hidden_size: int, charge: bool, spin: bool) -> None:
        super().__init__()
        self.charge = nn.Embedding(2 * self.MAX_CHARGE + 1, hidden_size) if charge else None
        self.spin = nn.Embedding(self.MAX_SPIN + 1, hidden_size) if spin else None

    def forward(self, token: Tensor, atoms: AtomInputs, center: Tensor) -> Tensor:
        """Adds the features of each token's system.

        Args:
            token: ``(t, H)``.
            atoms: all of them.
            center: ``(t,)`` int64, atom of each token.

        Returns:
            ``(t, H)``, the input itself for a model that is not conditioned.
        """
        if self.charge is not None:
            token = token + take_rows(self.charge.weight, atoms.charge[center] + self.MAX_CHARGE)
        if self.spin is not None:
            token = token + take_rows(self.spin.weight, atoms.spin_multiplicity[center])
        return token

    def check(self, charge: Tensor, spin_multiplicity: Tensor) -> None:
        """Checks the ``(B,)`` charges and multiplicities of a batch that the model is conditioned on.

        Raises:
            DataError: one is out of range.
        """
        if self.charge is not None:
            self._check("total charge", charge, -self.MAX_CHARGE, self.MAX_CHARGE)
        if self.spin is not None:
            self._check("spin multiplicity", spin_multiplicity, 0, self.MAX_SPIN)

    @staticmethod
    def _check(name: str, values: Tensor, low: int, high: int) -> None:
        if values.numel() and bool(((values < low) | (values > high)).any()):
            raise DataError(f"{name} outside [{low}, {high}]: found {int(values.min())} to {int(values.max())}")
