"""From raw geometry and elements to token features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from escaip.errors import DataError
from escaip.nn.layers import make_activation, make_norm
from escaip.ops import take_rows


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
        return torch.exp(-self.sharpness * (distance.unsqueeze(-1) - self.centers).square())


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

    def forward(
        self,
        radial: Tensor,
        atomic_numbers: Tensor,
        orientational_order: Tensor,
        neighbor: Tensor,
        center: Tensor,
    ) -> Tensor:
        """Computes the attributes of every token.

        Args:
            radial: ``(T, num_radial)`` basis of the distances.
            atomic_numbers: ``(N,)``.
            orientational_order: ``(N, boo_degrees)``.
            neighbor: ``(T,)`` atom at the far end.
            center: ``(T,)`` atom whose neighborhood it is.

        Returns:
            ``(T, H)``.
        """
        source = self.source(atomic_numbers, orientational_order)  # (N, H)
        target = self.target(atomic_numbers, orientational_order)  # (N, H)
        distance = self.distance_project(self.activation(self.distance_embedding(radial)))  # (T, H)
        mixed = distance + take_rows(source, neighbor) + take_rows(target, center)
        return self.norm(self.dropout(self.activation(mixed)))


class SystemEmbedding(nn.Module):
    """Total charge and spin multiplicity as features of the whole system; nothing when unused."""

    # Far beyond any molecule in the data sets; outside, an error rather than a clamp.
    MAX_CHARGE = 20
    MAX_SPIN = 40

    def __init__(self, hidden_size: int, charge: bool, spin: bool) -> None:
        super().__init__()
        self.charge = nn.Embedding(2 * self.MAX_CHARGE + 1, hidden_size) if charge else None
        self.spin = nn.Embedding(self.MAX_SPIN + 1, hidden_size) if spin else None

    def forward(self, token: Tensor, charge: Tensor, spin_multiplicity: Tensor, system: Tensor) -> Tensor:
        """Adds the features of each token's system.

        Args:
            token: ``(T, H)``.
            charge: ``(B,)`` int64.
            spin_multiplicity: ``(B,)`` int64.
            system: ``(T,)`` int64, system of each token.

        Returns:
            ``(T, H)``, the input itself for a model that is not conditioned.

        Raises:
            DataError: a charge or multiplicity is out of range.
        """
        if self.charge is not None:
            self._check("total charge", charge, -self.MAX_CHARGE, self.MAX_CHARGE)
            token = token + take_rows(take_rows(self.charge.weight, charge + self.MAX_CHARGE), system)
        if self.spin is not None:
            self._check("spin multiplicity", spin_multiplicity, 0, self.MAX_SPIN)
            token = token + take_rows(take_rows(self.spin.weight, spin_multiplicity), system)
        return token

    @staticmethod
    def _check(name: str, values: Tensor, low: int, high: int) -> None:
        if values.numel() and bool(((values < low) | (values > high)).any()):
            raise DataError(f"{name} outside [{low}, {high}]: found {int(values.min())} to {int(values.max())}")
