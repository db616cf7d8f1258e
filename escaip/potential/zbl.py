"""Energies of pairs at distances that training did not show: screened nuclei, a softer guard, and one of bonds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from escaip.data import AtomicData
from escaip.data.dataset import evenly
from escaip.errors import ConfigError
from escaip.graph import neighbor_list
from escaip.models import MAX_ATOMIC_NUMBER
from escaip.nn.layers import PreciseTables
from escaip.ops import sum_rows
from escaip.types import Graph

# Ziegler, Biersack and Littmark, The Stopping and Range of Ions in Solids (1985): φ(x) = Σ c exp(−d x).
_SCREENING = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))
_SCREENING_LENGTH = 0.8854 * 0.529177  # Å, over Z₁^0.23 + Z₂^0.23
_COULOMB = 14.399645  # e²/4πε₀, eV Å
_GUARD_STIFFNESS, _GUARD_SOFTNESS, _GUARD_HILL = 150.0, 0.1, 25.0  # eV/Å³, Å, eV/Å²
_HOLD_STIFFNESS, _HOLD_SOFTNESS = 8.0, 0.05  # eV/Å², Å
_HOLD_FALL = 0.3  # of the gap, over which the hill falls
_HOLD_MARGIN, _SINGLE_BOND = 1.02, 1.1  # times the longest bond of training, times the sum of covalent radii
_COVALENT = (1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 32, 33, 34, 35, 51, 52, 53)
_CONTACT = 1.0  # Å beyond the sum of covalent radii: about where atoms that are not bonded touch (H–H 1.6, C–C 2.5)
# The shortest and longest bonds in units of the sum of covalent radii (N₂ 0.77, CH₄ 1.02).
_SHORTEST_BOND = 0.7
_LONGEST_BOND = 1.2
# The shortest distance of two elements is known when an eighth of a training set shows them together, at least eight
# structures, or all of a smaller set. It varies by what three quarters of eight parts of these structures allow for.
_PARTS, _SHARE, _KNOWN = 8, 8, 0.75
_BONDED = 1.3  # below: a bond, hot ones too (C–H 1.39 Å, C–C 1.98 Å)


class PairRepulsion(PreciseTables):
    """An energy between pairs of atoms that are closer than the onset of their elements.

    Attributes:
        onset: ``(119, 119)`` Å by atomic numbers, symmetric; ``(0, 0)`` for no repulsion. Always float32.
    """

    onset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("onset", torch.zeros(0, 0))

    def __bool__(self) -> bool:
        return self.onset.numel() > 0

    def forward(self, vectors: Tensor, graph: Graph, atomic_numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Returns half of each pair's energy for either atom, and the gradient of the sum.

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
        inside = (square < onset * onset) & (square > self.inner_square(first, second))
        # Pairs are rare, so skip the rest; on a GPU the test would make the host wait.
        if not vectors.is_cuda and not bool(inside.any()):
            return vectors.new_zeros(graph.num_atoms), torch.zeros_like(vectors)
        energy, slope = self.pair_energies(square, inside, first, second, onset)
        gradient = torch.cat([slope.unsqueeze(1) * tokens, torch.zeros_like(vectors[graph.num_tokens :])])
        return 0.5 * sum_rows(energy, graph.token_center, graph.num_atoms), 0.5 * gradient

    def inner_square(self, first: Tensor, second: Tensor) -> Tensor | float:
        """Returns Å² above which pairs have an energy; an atom is no neighbor of itself."""
        return 0.0

    def pair_energies(
        self, square: Tensor, inside: Tensor, first: Tensor, second: Tensor, onset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the energy of each pair, eV, and ``V′(r)/r``, eV/Å²; ``(T,)`` each, zero outside.

        Args:
            square: ``(T,)`` Å², squared distances.
            inside: ``(T,)`` whether a pair is closer than its onset.
            first: ``(T,)`` atomic number of one atom.
            second: ``(T,)`` atomic number of the other.
            onset: ``(T,)`` Å.
        """
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any, **__: Any) -> None:
        """Accepts tables of any shape; older files have none."""
        for name in self._buffers.keys() - self._non_persistent_buffers_set:
            stored = state_dict.get(f"{prefix}{name}", torch.zeros(0, 0))
            setattr(self, name, stored.detach().to(self.onset.device, torch.float32, copy=True))


class ZBL(PairRepulsion):
    """``V(r) = Z₁Z₂ e²/4πε₀r · φ(r/a) · exp(−x²/(1 − x²))``, ``x = r / onset``.

    A network is not trained at distances shorter than those in its training set, where it may predict a deep well. The
    universal potential of Ziegler, Biersack and Littmark (1985) repels atoms there. Onsets lie below all distances in
    the training set, so that no learned energy changes. All derivatives are continuous.
    """

    def pair_energies(
        self, square: Tensor, inside: Tensor, first: Tensor, second: Tensor, onset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``PairRepulsion``."""
        # Pairs outside get a harmless distance, so that no derivative is NaN.
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


class CoreGuard(PairRepulsion):
    """``V = k x⁴/(x + c)``, ``x = onset − r``; for elements that training showed unbonded only, a hill around a bond.

    Atoms that are not bonded meet in hot dynamics at distances far above the onset of ``ZBL`` and below all that the
    model was shown. Where the onset is longer than the longest bond ``b``, 1.2 times the sum of covalent radii,
    ``V = K m² S(x/m)`` with ``m = onset − b`` and ``S(u) = 35u⁴ − 84u⁵ + 70u⁶ − 20u⁷``, constant below ``b``: such a
    bond is hardly made, and one that is there feels no force. k = 150 eV/Å³, c = 0.1 Å, K = 25 eV/Å². Three
    derivatives vanish at the onset.
    """

    radii: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("radii", _covalent_radii(), persistent=False)

    def pair_energies(
        self, square: Tensor, inside: Tensor, first: Tensor, second: Tensor, onset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``PairRepulsion``."""
        distance = torch.where(inside, square, 1.0).sqrt()
        x = torch.where(inside, onset - distance, 0.0)
        near = x + _GUARD_SOFTNESS
        energy = _GUARD_STIFFNESS * x**4 / near
        slope = -_GUARD_STIFFNESS * x**3 * (3.0 * x + 4.0 * _GUARD_SOFTNESS) / near**2
        width = onset - _LONGEST_BOND * (self.radii[first] + self.radii[second]).double()
        apart = width > 0.0
        width = torch.where(apart, width, 1.0)
        hill, hill_slope = _step((x / width).clamp_max(1.0))
        hill, hill_slope = _GUARD_HILL * width**2 * hill, -_GUARD_HILL * width * hill_slope
        return torch.where(apart, hill, energy), torch.where(apart, hill_slope, slope) / distance


class BondGuard(PairRepulsion):
    """``V = k x⁴/(x + c)² S(y/w)``, ``x = r − start``, ``y = onset − r``: a hill beyond the bonds of training.

    A network lets go of a bond that is longer than any it was shown, for a fraction of the energy. Where training shows
    a gap between bonds of two elements and their next distance, the guard stiffens the bond there. The hill falls over
    the last ``w``, 0.3 of the gap; ``S`` as in ``CoreGuard``, at most 1. k = 8 eV/Å², c = 0.05 Å. Three derivatives
    vanish at either end.

    Attributes:
        start: ``(119, 119)`` Å, where the gap of two elements begins; ``(0, 0)`` for no guard. Always float32.
    """

    start: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start", torch.zeros(0, 0))

    def inner_square(self, first: Tensor, second: Tensor) -> Tensor | float:
        """See ``PairRepulsion``."""
        return self.start[first, second].double().square()

    def pair_energies(
        self, square: Tensor, inside: Tensor, first: Tensor, second: Tensor, onset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``PairRepulsion``."""
        distance = torch.where(inside, square, 1.0).sqrt()
        start = self.start[first, second].double()
        x = torch.where(inside, distance - start, 0.0)
        near = x + _HOLD_SOFTNESS
        rise = _HOLD_STIFFNESS * x**4 / near**2
        rise_slope = 2.0 * _HOLD_STIFFNESS * x**3 * (x + 2.0 * _HOLD_SOFTNESS) / near**3
        width = torch.where(inside, _HOLD_FALL * (onset - start), 1.0)
        fall, fall_slope = _step(((onset - distance) / width).clamp(0.0, 1.0))
        return rise * fall, (rise_slope * fall - rise * fall_slope / width) / distance


def _step(u: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``S(u) = 35u⁴ − 84u⁵ + 70u⁶ − 20u⁷``, which goes from 0 to 1 with u, and its slope."""
    return u**4 * (35.0 + u * (-84.0 + u * (70.0 - 20.0 * u))), 140.0 * (u * (1.0 - u)) ** 3


def repel(
    terms: Iterable[PairRepulsion], vectors: Tensor, graph: Graph, atomic_numbers: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Returns the sums of what the terms return, see ``PairRepulsion.forward``; None where none has onsets."""
    found = [term(vectors, graph, atomic_numbers) for term in terms if term]
    if not found:
        return None
    energies, gradients = zip(*found, strict=True)
    return sum(energies[1:], energies[0]), sum(gradients[1:], gradients[0])


class Distances(NamedTuple):
    """Distances between atoms of each two elements in a training set, ``(119, 119)`` Å, float64, symmetric.

    Attributes:
        closest: the shortest; infinite for elements that never come within the cutoff.
        varies: by how much the shortest distance varies in the structures that show both elements within the cutoff: it
            is within that of ``closest`` in three quarters of eight parts of them, one after the other. Infinite where
            these are fewer than an eighth of the set, or than eight and not the whole set.
        longest_bond: the longest within 1.3 times the sum of covalent radii; zero for none.
        closest_apart: the shortest beyond; infinite for none.
    """

    closest: Tensor
    varies: Tensor
    longest_bond: Tensor
    closest_apart: Tensor


def fit_onsets(
    terms: Mapping[PairRepulsion, float | None], sets: Sequence[Sequence[AtomicData]], cutoff: float
) -> None:
    """Sets the onsets of repulsions in place, so that no distance of the training sets has an energy.

    Args:
        terms: repulsions of a potential and the fraction of each, see ``zbl_onsets``, ``guard_onsets`` and
            ``bond_gaps``; None for no repulsion.
        sets: the training set, or those of a mixture, each judged by itself, so that a small one counts too.
        cutoff: Å, of the potential; onsets do not exceed it, so that no energy jumps there.

    Raises:
        ConfigError: a fraction out of range.
    """
    found = _joined([measure_distances(structures, cutoff) for structures in sets])
    for term, fraction in terms.items():
        if fraction is None:
            continue
        if isinstance(term, BondGuard):
            start, onsets = bond_gaps(found, fraction)
            term.start = start.to(term.onset.device, torch.float32)
        else:
            guards = isinstance(term, CoreGuard)
            onsets = guard_onsets(found, fraction) if guards else zbl_onsets(found.closest, fraction)
        term.onset = onsets.clamp_max(cutoff).to(term.onset.device, torch.float32)


def measure_distances(structures: Sequence[AtomicData], cutoff: float, max_structures: int = 10_000) -> Distances:
    """Looks up distances between atoms of each two elements.

    Args:
        structures: a training set.
        cutoff: Å; pairs farther apart are not looked at.
        max_structures: of a larger set so many are read, evenly spread.
    """
    size, count = MAX_ATOMIC_NUMBER + 1, min(len(structures), max_structures)
    closest, longest, apart = (
        torch.full((size * size,), start, dtype=torch.float64) for start in (torch.inf, 0.0, torch.inf)
    )
    reach = (_BONDED * _bonds()).view(-1)
    seen = []  # the shortest distances in each structure
    for data in evenly(structures, max_structures):
        numbers, positions, pairs = data.atomic_numbers, data.positions, neighbor_list(data, cutoff)
        shift = pairs.shift.double() @ data.cell[0]
        distance = (positions[pairs.neighbor] - positions[pairs.center] + shift).norm(dim=1)
        kinds, pair = (numbers[pairs.center] * size + numbers[pairs.neighbor]).unique(return_inverse=True)
        bonded = distance < reach[kinds][pair]
        shortest = torch.full((len(kinds),), torch.inf, dtype=torch.float64).scatter_reduce_(0, pair, distance, "amin")
        seen.append((kinds, shortest))
        longest.scatter_reduce_(0, kinds[pair[bonded]], distance[bonded], "amax")
        apart.scatter_reduce_(0, kinds[pair[~bonded]], distance[~bonded], "amin")
    kinds, shortest = (torch.cat(column) for column in zip(*seen, strict=True))
    closest.scatter_reduce_(0, kinds, shortest, "amin")
    varies = torch.full_like(closest, torch.inf)
    order = kinds.argsort(stable=True)
    own, counts = kinds[order].unique_consecutive(return_counts=True)
    for kind, shown in zip(own.tolist(), shortest[order].split(counts.tolist()), strict=True):
        if len(shown) >= min(count, max(_PARTS, count / _SHARE)):
            parts = torch.stack([part.amin() for part in shown.tensor_split(min(_PARTS, len(shown)))])
            varies[kind] = parts.kthvalue(math.ceil(_KNOWN * len(parts))).values - parts.amin()
    return Distances(*(one.view(size, size) for one in (closest, varies, longest, apart)))


def _joined(sets: Sequence[Distances]) -> Distances:
    """Returns the distances of several sets as of one; a shortest distance is known where one set knows it."""
    closest, varies, longest, apart = (torch.stack(column) for column in zip(*sets, strict=True))
    most = varies.where(varies.isfinite(), -torch.inf).amax(0)
    return Distances(closest.amin(0), most.where(most.isfinite(), torch.inf), longest.amax(0), apart.amin(0))


def zbl_onsets(closest: Tensor, fraction: float = 0.9) -> Tensor:
    """Returns the onsets of ``ZBL``, ``(119, 119)`` Å: a fraction of the shortest bonds in the training set.

    Elements without a bond in the training set, a distance within 1.2 times the sum of their covalent radii, have the
    fraction of 0.7 of that sum (Cordero et al., Dalton Trans. 2832, 2008, as in ASE), about the shortest bond that
    exists.

    Args:
        closest: of ``measure_distances``.
        fraction: above 0 and at most 1.

    Raises:
        ConfigError: a fraction out of range.
    """
    check_fraction(fraction)
    bonding = _bonds()
    return fraction * torch.where(closest < _LONGEST_BOND * bonding, closest, _SHORTEST_BOND * bonding)


def guard_onsets(distances: Distances, fraction: float = 0.98) -> Tensor:
    """Returns the onsets of ``CoreGuard``, ``(119, 119)`` Å: a fraction of the shortest distances, bonded or not.

    What one part of the training set shows another may not: from this comes off by how much the shortest distance
    varies. Elements that few structures show together have none: that these show no shorter distance says little.
    Onsets do not exceed the sum of covalent radii by more than 1 Å: elements that the training set shows far apart only
    may come nearer.

    Args:
        distances: of a training set.
        fraction: above 0 and at most 1.

    Raises:
        ConfigError: a fraction out of range.
    """
    check_fraction(fraction, "core_guard")
    onsets = (fraction * distances.closest - distances.varies).nan_to_num(0.0)  # ∞ − ∞: never within the cutoff
    return onsets.clamp_min(0.0).minimum(_bonds() + _CONTACT)


def bond_gaps(distances: Distances, fraction: float = 0.9) -> tuple[Tensor, Tensor]:
    """Returns where the gaps of ``BondGuard`` begin and end, ``(119, 119)`` Å each; zero for elements without a gap.

    A gap begins 2 % beyond the longest bond, at least 1.1 times the sum of covalent radii, so that single bonds are
    free where training shows double ones only. It ends at a fraction of the next distance, at most 1 Å beyond that sum.
    Metals have none, nor have elements whose distances in training leave no gap, as in reactions.

    Args:
        distances: of a training set.
        fraction: above 0 and at most 1.

    Raises:
        ConfigError: a fraction out of range.
    """
    check_fraction(fraction, "bond_guard")
    start = (_HOLD_MARGIN * distances.longest_bond).maximum(_SINGLE_BOND * _bonds())
    end = (fraction * distances.closest_apart).minimum(_bonds() + _CONTACT)
    covalent = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.bool)
    covalent[list(_COVALENT)] = True
    gap = (distances.longest_bond > 0.0) & (end > start) & covalent & covalent[:, None]
    return torch.where(gap, start, 0.0), torch.where(gap, end, 0.0)


def check_fraction(fraction: float | None, name: str = "repulsion") -> None:
    """Raises ConfigError unless the value is a fraction or None."""
    if fraction is not None and not 0.0 < fraction <= 1.0:
        raise ConfigError(f"{name} is {fraction}: it must be above 0 and at most 1, or null for none")


def _bonds() -> Tensor:
    """Returns the sums of covalent radii, ``(119, 119)`` Å."""
    radii = _covalent_radii()
    return radii[:, None] + radii[None, :]


def _covalent_radii() -> Tensor:
    from ase.data import covalent_radii

    return torch.from_numpy(covalent_radii[: MAX_ATOMIC_NUMBER + 1].copy())
