"""Weighted losses on energy, forces and stress, as sums and counts that add up over batches and processes.

A label that is NaN is missing. Labelled entries are chosen before anything is computed on them, so that no NaN can
reach a gradient (``0 · NaN`` is NaN). Atoms flagged ``fixed`` carry no force loss; a data set clears the flags with
``fixed_atoms: all`` where constrained atoms should count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.types import Prediction

TERMS = ("energy", "forces", "stress")
SCALAR_KINDS = ("mae", "mse", "huber")
FORCE_KINDS = ("l2", "mae", "mse", "huber")
AVERAGES = ("structure", "atom")


@dataclass(frozen=True)
class LossTerm:
    """Loss on the energy per atom (eV/atom) or on the stress (eV/Å³, mean over its nine components).

    Attributes:
        weight: factor in the total; 0 leaves the term out.
        kind: ``"mae"``, ``"mse"`` or ``"huber"``.
        delta: where Huber turns from quadratic to linear, in the unit of the label. Huber is divided by ``delta``, so
            that it has the slope of the MAE for large errors.
        final_weight: what ``weight`` becomes towards the end of a training, see :meth:`LossSettings.at`; default the
            same.

    Raises:
        ConfigError: an unknown kind, a negative weight, a ``delta`` not above 0, a final weight for a term left out.
    """

    weight: float = 0.0
    kind: str = "mae"
    delta: float = 0.01
    final_weight: float | None = None

    def __post_init__(self) -> None:
        _check_term(self, SCALAR_KINDS)


@dataclass(frozen=True)
class ForceTerm:
    """Loss on the forces (eV/Å).

    Attributes:
        weight: factor in the total; 0 leaves the term out.
        kind: ``"l2"`` (Euclidean norm of each atom's error, arXiv 2410.24169), or ``"mae"``, ``"mse"``, ``"huber"``,
            the mean over the three components.
        delta: as in :class:`LossTerm`.
        average: ``"structure"`` averages over the atoms of each structure, then over structures; ``"atom"`` over all
            atoms at once.
        final_weight: as in :class:`LossTerm`.

    Raises:
        ConfigError: as :class:`LossTerm`, or an unknown average.
    """

    weight: float = 10.0
    kind: str = "l2"
    delta: float = 0.01
    average: str = "structure"
    final_weight: float | None = None

    def __post_init__(self) -> None:
        _check_term(self, FORCE_KINDS)
        if self.average not in AVERAGES:
            raise ConfigError(f"force loss average {self.average!r} does not exist: choose {' or '.join(AVERAGES)}")


@dataclass(frozen=True)
class LossSettings:
    """Total loss ``Σ weight · term`` over the terms ``energy``, ``forces`` and ``stress``.

    Attributes:
        energy: per atom.
        forces: of atoms that are free to move.
        stress: of periodic structures.
        change_after: part of a training after which weights begin to move to the final ones.

    Raises:
        ConfigError: every weight is 0, or ``change_after`` is outside [0, 1].
    """

    energy: LossTerm = field(default_factory=lambda: LossTerm(weight=1.0))
    forces: ForceTerm = field(default_factory=ForceTerm)
    stress: LossTerm = field(default_factory=LossTerm)
    change_after: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.change_after <= 1:
            raise ConfigError(f"losses.change_after is {self.change_after}: it must be in [0, 1]")
        if not any(weight > 0 for weight in self.weights):
            raise ConfigError("every loss weight is 0: set losses.energy.weight, losses.forces.weight or both")

    @property
    def weights(self) -> tuple[float, float, float]:
        """Weights at the end of a training, those of a validation, in the order of ``TERMS``."""
        energy, forces, stress = (
            term.weight if term.final_weight is None else term.final_weight
            for term in (self.energy, self.forces, self.stress)
        )
        return energy, forces, stress

    def at(self, progress: float) -> LossSettings:
        """Returns the settings with the weights of a moment of the training.

        After ``change_after`` each weight moves to its final one by equal factors in equal times, so that energies gain
        on forces while the learning rate falls (the idea is that of the prefactors of DeePMD, arXiv 1707.09571).

        Args:
            progress: part of the training that is done, in [0, 1].
        """
        late = max(0.0, progress - self.change_after) / max(1.0 - self.change_after, 1e-12)

        def moved(term: Any) -> Any:
            if term.final_weight is None:
                return term
            return replace(
                term, weight=term.weight * (term.final_weight / term.weight) ** min(1.0, late), final_weight=None
            )

        return replace(self, energy=moved(self.energy), forces=moved(self.forces), stress=moved(self.stress))


@dataclass(frozen=True)
class LossSums:
    """Sums of each term over labelled entries, and how many there were; both add up over batches and processes.

    Attributes:
        sums: ``(3,)`` float64, in the order of ``TERMS``; differentiable.
        counts: ``(3,)`` float64.
    """

    sums: Tensor
    counts: Tensor

    def total(self, settings: LossSettings, counts: Tensor | None = None) -> Tensor:
        """Returns ``Σ weight · sum / count``; a term without a labelled entry is exactly 0.

        Args:
            settings: the weights.
            counts: ``(3,)`` counts to divide by instead of its own, those of all processes for example.
        """
        counts = self.counts if counts is None else counts
        means = self.sums / counts.clamp_min(1.0)
        # Numbers, not a tensor of them, which a GPU would have to be waited for.
        return torch.stack([weight * mean for weight, mean in zip(settings.weights, means, strict=True)]).sum()


def loss_sums(prediction: Prediction, batch: Any, settings: LossSettings) -> LossSums:
    """Evaluates the terms on the labelled entries of a batch.

    Every predicted quantity stays in the graph, with gradient zero where nothing is labelled, so that each parameter
    has a gradient on every process.

    Args:
        prediction: of the batch; forces and stress may be None where their weight is 0.
        batch: with labels, NaN where missing, ``fixed (N,)``, ``batch (N,)``, ``ptr (B + 1,)``.
        settings: kinds and weights.
    """
    energy, forces, stress = prediction.energy, prediction.forces, prediction.stress
    sums, counts = [], []
    for term in (
        _energy_term(energy, batch, settings.energy),
        _nothing(energy) if forces is None else _force_term(forces, batch, settings.forces),
        _nothing(energy) if stress is None else _stress_term(stress, batch, settings.stress),
    ):
        sums.append(term[0])
        counts.append(term[1])
    return LossSums(torch.stack(sums), torch.stack(counts))


def labelled_energies(batch: Any) -> Tensor:
    """``(B,)`` bool: structures with an energy."""
    return ~torch.isnan(batch.energy)


def labelled_atoms(batch: Any) -> Tensor:
    """``(N,)`` bool: atoms that have a force label and are free to move."""
    return ~torch.isnan(batch.forces).any(-1) & ~batch.fixed


def labelled_stresses(batch: Any) -> Tensor:
    """``(B,)`` bool: structures with a stress."""
    return ~torch.isnan(batch.stress).flatten(1).any(-1)


def _energy_term(energy: Tensor, batch: Any, term: LossTerm) -> tuple[Tensor, Tensor]:
    chosen = labelled_energies(batch)
    error = (energy[chosen] - batch.energy[chosen]) / (batch.ptr[1:] - batch.ptr[:-1])[chosen]
    values = _penalty(error.double(), term.kind, term.delta)
    return values.sum(), chosen.sum().double()


def _force_term(forces: Tensor, batch: Any, term: ForceTerm) -> tuple[Tensor, Tensor]:
    chosen = labelled_atoms(batch)
    error = forces[chosen].double() - batch.forces[chosen].double()
    per_atom = _norm(error) if term.kind == "l2" else _penalty(error, term.kind, term.delta).mean(-1)
    if term.average == "atom":
        return per_atom.sum(), chosen.sum().double()
    structure = batch.batch[chosen]
    atoms = per_atom.new_zeros(batch.ptr.numel() - 1).index_add(0, structure, torch.ones_like(per_atom).detach())
    return (per_atom / atoms[structure]).sum(), (atoms > 0).sum().double()


def _stress_term(stress: Tensor, batch: Any, term: LossTerm) -> tuple[Tensor, Tensor]:
    chosen = labelled_stresses(batch)
    error = stress[chosen].double() - batch.stress[chosen].double()
    values = _penalty(error, term.kind, term.delta).flatten(1).mean(-1)
    return values.sum(), chosen.sum().double()


def _nothing(like: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros((), dtype=torch.float64, device=like.device)
    return zero, zero


def _norm(error: Tensor) -> Tensor:
    """Euclidean norm with gradient 0 at 0 (``torch.linalg.vector_norm`` uses that subgradient)."""
    return torch.linalg.vector_norm(error, dim=-1)


def _penalty(error: Tensor, kind: str, delta: float) -> Tensor:
    if kind == "mae":
        return error.abs()
    if kind == "mse":
        return error.square()
    return torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta) / delta


def _check_term(term: LossTerm | ForceTerm, kinds: tuple[str, ...]) -> None:
    if term.kind not in kinds:
        raise ConfigError(f"loss kind {term.kind!r} does not exist: choose {' or '.join(kinds)}")
    if not (math.isfinite(term.weight) and term.weight >= 0):
        raise ConfigError(f"loss weight {term.weight} is not usable: it must be a number of at least 0")
    if not term.delta > 0:
        raise ConfigError(f"loss delta {term.delta} is not usable: it must be above 0")
    if term.final_weight is None:
        return
    if not (math.isfinite(term.final_weight) and term.final_weight > 0):
        raise ConfigError(f"loss final_weight {term.final_weight} is not usable: it must be a number above 0")
    if term.weight == 0:
        raise ConfigError(
            f"loss final_weight is {term.final_weight}, but weight is 0: set a small weight to start from"
        )
