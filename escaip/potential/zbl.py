"""Repulsion of screened nuclei at distances shorter than any that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from escaip.errors import ConfigError
from escaip.graph import neighbor_list
from escaip.models import MAX_ATOMIC_NUMBER
from escaip.ops import sum_rows

if TYPE_CHECKING:
    from escaip.data import AtomicData
    from escaip.potential import Potential
    from escaip.types import Graph

# Ziegler, Biersack and Littmark, The Stopping and Range of Ions in Solids (1985): φ(x) = Σ c exp(−d x).
_SCREENING = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))
_SCREENING_LENGTH = 0.8854 * 0.529177  # Å, over Z₁^0.23 + Z₂^0.23
_COULOMB = 14.399645  # e²/4πε₀, eV Å
# Of the sum of covalent radii: about as short and as long as bonds are (N₂ 0.77, CH₄ 1.02).
_SHORTEST_BOND = 0.7
_LONGEST_BOND = 1.2


class Repulsion(nn.Module):
    """``V(r) = Z₁Z₂ e²/4πε₀r · φ(r/a) · exp(−x²/(1 − x²))``, ``x = r / onset``, between pairs closer than their onset.

    What a network says about atoms closer than in any of its training structures is chance, and may be a deep well.
    There the universal potential of Ziegler, Biersack and Littmark (1985) keeps atoms apart. Onsets are shorter than
    all distances in the training set, so that nothing learned changes; all derivatives are continuous.

    Attributes:
        onset: ``(119, 119)`` Å by atomic numbers, symmetric; ``(0, 0)`` for none. Kept in float32 whatever the model's
            precision: it is a choice, not a result.
    """

    onset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("onset", torch.zeros(0, 0))

    def __bool__(self) -> bool:
        return self.onset.numel() > 0

    def forward(self, vectors: Tensor, graph: Graph, atomic_numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Half of each pair's energy on either atom, and the gradient of the sum.

        Args:
            vectors: ``(T + X, 3)`` Å, float64, displacements of the rows of the graph.
            graph: whose tokens hold every pair in both directions.
            atomic_numbers: ``(N,)``.

        Returns:
            ``(N,)`` eV and ``(T + X, 3)`` eV/Å, float64; both can be differentiated by the displacements.
        """
        tokens = vectors[: graph.num_tokens]
        first, second = atomic_numbers[graph.token_center], atomic_numbers[graph.token_neighbor]
        onset = self.onset[first, second].double()
        square = (tokens * tokens).sum(dim=1)
        inside = (square < onset * onset) & (square > 0.0)  # an atom is no neighbor of itself
        # There is hardly ever a pair, and a step of a molecule takes milliseconds. A GPU would have to be waited for.
        if not vectors.is_cuda and not bool(inside.any()):
            return vectors.new_zeros(graph.num_atoms), torch.zeros_like(vectors)
        energy, slope = _pairs(square, inside, first, second, onset)
        gradient = torch.cat([slope.unsqueeze(1) * tokens, torch.zeros_like(vectors[graph.num_tokens :])])
        return 0.5 * sum_rows(energy, graph.token_center, graph.num_atoms), 0.5 * gradient

    def _apply(self, fn: Any, recurse: bool = True) -> Repulsion:
        """Moves like any module, and keeps its precision."""
        kept = self.onset
        super()._apply(fn, recurse)
        self.onset = kept.to(self.onset.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any, **__: Any) -> None:
        """Takes a table of any shape; files of before there were any have none."""
        stored = state_dict.get(f"{prefix}onset", torch.zeros(0, 0))
        self.onset = stored.detach().to(self.onset.device, torch.float32, copy=True)


def _pairs(square: Tensor, inside: Tensor, first: Tensor, second: Tensor, onset: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of each pair, eV, and its derivative by the distance over the distance, eV/Å²; ``(T,)`` each."""
    # What lies outside is computed for a harmless distance, so that no derivative of it is NaN.
    distance = torch.where(inside, square, 1.0).sqrt()
    x = torch.where(inside, distance / onset.clamp_min(1e-6), 0.5)
    charges = _COULOMB * first.double() * second.double()
    length = _SCREENING_LENGTH / (first.double() ** 0.23 + second.double() ** 0.23)
    terms = [(d, c * torch.exp(-d * distance / length)) for c, d in _SCREENING]
    screening = sum((term for _, term in terms), torch.zeros_like(distance))
    screening_slope = sum((-d / length * term for d, term in terms), torch.zeros_like(distance))
    rest = (1.0 - x * x).clamp_min(1e-3)  # exp(−999) is zero
    envelope = torch.exp(-x * x / rest)
    energy = charges * screening / distance * envelope
    fall = -1.0 / distance - 2.0 * x * x / (distance * rest * rest)  # of the logarithms of 1/r and of the envelope
    slope = energy * fall + charges * screening_slope / distance * envelope
    return torch.where(inside, energy, 0.0), torch.where(inside, slope / distance, 0.0)


def keep_apart(potential: Potential, structures: Sequence[AtomicData], fraction: float = 0.9) -> None:
    """Gives a potential the repulsion that fits its training set.

    Args:
        potential: is changed; beyond its cutoff nothing repels, so that no energy jumps there.
        structures: see :func:`closest_distances`.
        fraction: see :func:`repulsion_onsets`.

    Raises:
        ConfigError: a fraction out of range.
    """
    onsets = repulsion_onsets(closest_distances(structures), fraction).clamp_max(potential.cutoff)
    potential.repulsion.onset = onsets.to(potential.device, torch.float32)


def closest_distances(structures: Sequence[AtomicData], max_structures: int = 10_000) -> Tensor:
    """``(119, 119)`` Å, the shortest distance between atoms of two elements, of those within bonding distance.

    Args:
        structures: a training set, or any part of it that may be indexed.
        max_structures: of a larger set so many are looked at, evenly spread.

    Returns:
        float64, symmetric; infinite for pairs that never come within 1.2 times the sum of their covalent radii.
    """
    radii = _covalent_radii()
    closest = torch.full((MAX_ATOMIC_NUMBER + 1, MAX_ATOMIC_NUMBER + 1), torch.inf, dtype=torch.float64)
    count = len(structures)
    for index in torch.linspace(0, count - 1, min(count, max_structures), dtype=torch.float64).round().long().tolist():
        data = structures[index]
        numbers, positions, cell = data.atomic_numbers, data.positions.double(), data.cell.double().reshape(3, 3)
        place = SimpleNamespace(positions=positions, cell=cell[None], pbc=data.pbc.reshape(1, 3))
        pairs = neighbor_list(place, 2.0 * _LONGEST_BOND * float(radii[numbers].max()))
        shift = pairs.shift.double() @ cell
        distance = (positions[pairs.neighbor] - positions[pairs.center] + shift).norm(dim=1)
        place_of = numbers[pairs.center] * closest.shape[1] + numbers[pairs.neighbor]
        closest.view(-1).scatter_reduce_(0, place_of, distance, "amin")
    bonding = radii[:, None] + radii[None, :]
    return torch.where(closest < _LONGEST_BOND * bonding, closest, torch.inf)


def repulsion_onsets(closest: Tensor, fraction: float = 0.9) -> Tensor:
    """``(119, 119)`` Å, where repulsion begins: a fraction of the shortest distance in the training set.

    Pairs that it does not hold within bonding distance have the fraction of 0.7 of the sum of their covalent radii
    (Cordero et al., Dalton Trans. 2832, 2008, as in ASE), which is about as short as bonds are.

    Args:
        closest: of :func:`closest_distances`.
        fraction: above 0 and at most 1.

    Raises:
        ConfigError: a fraction out of range.
    """
    check_fraction(fraction)
    radii = _covalent_radii()
    unseen = _SHORTEST_BOND * (radii[:, None] + radii[None, :])
    return fraction * torch.where(torch.isinf(closest), unseen, closest)


def check_fraction(fraction: float | None) -> None:
    """Raises ConfigError for what is neither a fraction nor None."""
    if fraction is not None and not 0.0 < fraction <= 1.0:
        raise ConfigError(f"repulsion is {fraction}: it must be above 0 and at most 1, or null for none")


def _covalent_radii() -> Tensor:
    from ase.data import covalent_radii

    return torch.from_numpy(covalent_radii[: MAX_ATOMIC_NUMBER + 1].copy())
