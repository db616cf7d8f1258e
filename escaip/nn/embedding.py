"""From raw geometry and elements to token features."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from escaip.errors import DataError
from escaip.nn.layers import PreciseTables, activate_ends, make_activation, make_norm
from escaip.ops import bond_orientational_order, spline, take_rows
from escaip.ops.harmonics import harmonic_recursion
from escaip.types import MAX_CHARGE, AtomInputs, Tokens

# A function of encoded distances, (R,) or (R, num_radial), with values (R, H).
Curve: TypeAlias = Callable[[Tensor], Tensor]

# Smaller Gaussians count for nothing even in float64, but their products with gradients would be denormal numbers, for
# which processors take a hundred times as long: weight gradients of 600 Gaussians were five times slower.
_LEAST_EXPONENT = -45.0


class GaussianBasis(nn.Module):
    """Gaussians on ``[0, cutoff]``, of a width of ``width`` spacings (model of EScAIP, section 4)."""

    def __init__(self, num_radial: int, cutoff: float, width: float) -> None:
        super().__init__()
        self.num_radial, self.cutoff = num_radial, cutoff
        self.spacing = cutoff / (num_radial - 1)
        self.sharpness = 1.0 / (2.0 * (width * self.spacing) ** 2)
        self.register_buffer("centers", torch.linspace(0.0, cutoff, num_radial), persistent=False)

    centers: Tensor

    def forward(self, distance: Tensor) -> Tensor:
        """``(T,)`` Å to ``(T, num_radial)``."""
        exponent = -self.sharpness * (distance.unsqueeze(-1) - self.centers).square()
        return torch.exp(exponent.clamp(min=_LEAST_EXPONENT))


class OrientationalOrder(PreciseTables):
    """Bond-orientational order of atoms from their tokens (``escaip.ops.bond_orientational_order``).

    Args:
        degrees: ``l = 0 .. degrees − 1``.
        uniform: as published: every neighbor counts alike, and the root is clamped; otherwise both are smooth.
        epsilon: floor of the root.

    Attributes:
        recursion: coefficients of the harmonics, on the model's device so that nothing waits for a copy; float64
            whatever the model's precision.
    """

    recursion: Tensor

    def __init__(self, degrees: int, uniform: bool, epsilon: float) -> None:
        super().__init__()
        self.degrees, self.uniform, self.epsilon = degrees, uniform, epsilon
        self.register_buffer("recursion", harmonic_recursion(degrees - 1), persistent=False)

    def forward(self, tokens: Tokens) -> Tensor:
        """Returns ``(n, degrees)`` for the atoms of a chunk."""
        weight = torch.ones_like(tokens.distance) if self.uniform else tokens.log_envelope.exp()
        return bond_orientational_order(
            tokens.direction, weight, tokens.center - tokens.first, tokens.num_atoms, self.degrees - 1,
            floor="clamp" if self.uniform else "smooth", epsilon=self.epsilon, offsets=tokens.offsets,
            recursion=self.recursion,
        )  # fmt: skip


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


class DistanceEmbedding(nn.Module):
    """A learned function ``[0, r_c] → R^H`` of the distance: exact, or read from a spline table that it owns.

    A table takes the ``K + 9`` rows of its knots through the layers instead of a row for every token, which then costs
    a sum of six rows (docs/howto/speed.md). Energies stay conserved, because forces are the exact derivative of the
    spline. The table is kept until a weight changes, and made anew, with gradients, where the weights need gradients.

    Args:
        basis: of the distances; several embeddings may share one.
        layers: applied to the basis in turn. They stay modules of the caller, whose names their weights have in files.
        table: ``"always"``, ``"inference"`` (in evaluation mode) or ``"never"``.
        num_intervals: ``K``, intervals of the table on ``[0, r_c]``.
    """

    def __init__(self, basis: GaussianBasis, layers: Sequence[nn.Module], table: str, num_intervals: int) -> None:
        super().__init__()
        self.basis = basis
        self.num_intervals = num_intervals
        self._layers = tuple(layers)
        self._table = table
        self._kept: tuple[list[tuple[int, int]], list[Tensor], Tensor] | None = None
        self._given: Tensor | None = None

    @property
    def is_tabulated(self) -> bool:
        """Whether the table stands for the function at present."""
        return self._table == "always" or (self._table == "inference" and not self.training)

    @property
    def weights(self) -> list[nn.Parameter]:
        """Everything that the function depends on."""
        return [weight for layer in self._layers for weight in layer.parameters()]

    def encode(self, tokens: Tokens) -> Tensor:
        """Returns what ``function`` takes: ``(t,)`` places in the table, or the ``(t, num_radial)`` basis.

        Embeddings of one basis, table and number of intervals take the same encoding.
        """
        if not self.is_tabulated:
            return self.basis(tokens.distance)
        # Masked tokens have zero weight, but an extrapolated spline can overflow and 0 · inf is NaN, so clamp.
        return tokens.distance.clamp(max=self.basis.cutoff) * (self.num_intervals / self.basis.cutoff)

    def function(self) -> Curve:
        """Returns the function of encoded distances, with values ``(t, H)``; asked for once, applied to each chunk."""
        if not self.is_tabulated:
            return self.exact
        if self._given is not None:
            return partial(spline.interpolate, self._given)
        is_learning = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.weights)
        return partial(spline.interpolate, self.make_table() if is_learning else self.kept_table())

    def exact(self, radial: Tensor) -> Tensor:
        """Applies the layers to the basis: ``(R, num_radial)`` to ``(R, H)``."""
        for layer in self._layers:
            radial = layer(radial)
        return radial

    def make_table(self) -> Tensor:
        """Returns the spline coefficients of the present weights, ``(K + 5, H)``."""
        centers = self.basis.centers
        # Knots in float64: the table is that of the function, not of rounded distances.
        knots = spline.knots(self.num_intervals, self.basis.cutoff, dtype=torch.float64, device=centers.device)
        return spline.coefficients(self.exact(self.basis(knots).to(centers.dtype)))

    def kept_table(self) -> Tensor:
        """Returns the same table until a weight changes, without gradient."""
        # Assignment changes the address of a weight, and any operation in place its version. Weights that a table was
        # made of are held, so that no other can take their address.
        weights = [weight.detach() for weight in self.weights]
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        if self._kept is None or self._kept[0] != state:
            with torch.no_grad():
                self._kept = (state, weights, self.make_table())
        return self._kept[2]

    def train(self, mode: bool = True) -> DistanceEmbedding:
        """Sets the mode and forgets the table."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def kept_tables(model: nn.Module, learning: bool = False) -> list[Tensor]:
    """Returns the tables of a model's distance embeddings, in the order of its modules; none where none is in use.

    Args:
        model: any module.
        learning: only those of frozen weights; the others are made of weights that learn, with gradients.
    """
    return [embedding.kept_table() for embedding in _tabulated(model, learning)]


@contextlib.contextmanager
def given_tables(model: nn.Module, tables: Sequence[Tensor], learning: bool = False) -> Iterator[None]:
    """Lets the model's distance embeddings read these tables within: compiled code receives them as inputs.

    Args:
        model: any module.
        tables: of ``kept_tables``; an empty sequence changes nothing.
        learning: see ``kept_tables``.
    """
    embeddings = _tabulated(model, learning) if tables else []
    for embedding, table in zip(embeddings, tables, strict=True):
        embedding._given = table
    try:
        yield
    finally:
        for embedding in embeddings:
            embedding._given = None


def _tabulated(model: nn.Module, learning: bool) -> list[DistanceEmbedding]:
    found = [module for module in model.modules() if isinstance(module, DistanceEmbedding) and module.is_tabulated]
    return [one for one in found if not (learning and any(weight.requires_grad for weight in one.weights))]


class EdgeAttributes(nn.Module):
    """Token features from distance, elements and orientational order of both ends, normed.

    ``norm(act(W [distance embedding, neighbor, center] + b))``, the product split into its parts so that only the
    distance part costs a row per token.

    Args:
        basis: of the distances.
        table, num_intervals: see ``DistanceEmbedding``.
        num_elements, element_size, boo_degrees, boo_size: see ``AtomFeatures``.
        distance_size: width between the two layers of the distance embedding.
        hidden_size: ``H``.
        activation, norm, dropout: see ``escaip.nn.layers``.
    """

    def __init__(
        self,
        basis: GaussianBasis,
        table: str,
        num_intervals: int,
        num_elements: int,
        element_size: int,
        boo_degrees: int,
        boo_size: int,
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
        self.distance_embedding = nn.Linear(basis.num_radial, distance_size)
        self.distance_project = nn.Linear(distance_size, hidden_size, bias=False)
        self.activation = make_activation(activation)
        layers = (self.distance_embedding, self.activation, self.distance_project)
        self.distance = DistanceEmbedding(basis, layers, table, num_intervals)
        self.dropout = nn.Dropout(dropout)
        self.norm = make_norm(norm, hidden_size)

    def ends(self, atomic_numbers: Tensor, orientational_order: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of the neighbor's and the center's end, per atom: ``(N,)``, ``(N, boo_degrees)`` to ``(N, H)``."""
        return self.source(atomic_numbers, orientational_order), self.target(atomic_numbers, orientational_order)

    def forward(self, distance: Tensor, ends: tuple[Tensor, Tensor], tokens: Tokens) -> Tensor:
        """Computes the attributes of tokens.

        Args:
            distance: ``(t, H)``, the distance embedding of the tokens.
            ends: of all atoms, from ``ends``.
            tokens: whose attributes.

        Returns:
            ``(t, H)``.
        """
        return self.norm(self.dropout(activate_ends(self.activation, distance, ends, tokens)))


class SystemEmbedding(nn.Module):
    """Total charge and spin multiplicity as features of the whole system; nothing when unused."""

    MAX_SPIN = 40  # far beyond any molecule in the data sets; outside, an error rather than a clamp

    def __init__(self, hidden_size: int, charge: bool, spin: bool) -> None:
        super().__init__()
        self.charge = nn.Embedding(2 * MAX_CHARGE + 1, hidden_size) if charge else None
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
            token = token + take_rows(self.charge.weight, atoms.charge[center] + MAX_CHARGE)
        if self.spin is not None:
            token = token + take_rows(self.spin.weight, atoms.spin_multiplicity[center])
        return token

    def check(self, charge: Tensor, spin_multiplicity: Tensor) -> None:
        """Checks the ``(B,)`` charges and multiplicities of a batch that the model is conditioned on.

        Raises:
            DataError: one is out of range.
        """
        if self.charge is not None:
            self._check("total charge", charge, -MAX_CHARGE, MAX_CHARGE)
        if self.spin is not None:
            self._check("spin multiplicity", spin_multiplicity, 0, self.MAX_SPIN)

    @staticmethod
    def _check(name: str, values: Tensor, low: int, high: int) -> None:
        if values.numel() and bool(((values < low) | (values > high)).any()):
            raise DataError(f"{name} outside [{low}, {high}]: found {int(values.min())} to {int(values.max())}")
