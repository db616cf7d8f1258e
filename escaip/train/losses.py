"""Weighted losses over the table of targets, as sums and counts that add up over batches and processes.

A label that is NaN is missing. Labelled entries are selected before anything is computed on them, so that no NaN can
reach a gradient (``0 · NaN`` is NaN). Atoms flagged ``fixed`` carry no force loss; a data set clears the flags with
``fixed_atoms: all`` where constrained atoms should count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.types import TARGETS, Prediction, StructureBatch, Target

# A kind of loss turns errors (n, c) of n entries with c components and the width ``delta`` into n values.
KINDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mae": lambda error, delta: error.abs().mean(-1),
    "mse": lambda error, delta: error.square().mean(-1),
    "huber": lambda error, delta: (
        torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta) / delta
    ).mean(-1),
    # The gradient at an error of 0 is 0: vector_norm uses that subgradient.
    "l2": lambda error, delta: torch.linalg.vector_norm(error, dim=-1),
}
AVERAGES = ("structure", "atom")
# What the error of an extensive target is divided by, of the N atoms of a structure: N to the power given here.
SIZES = {"atom": 1.0, "root": 0.5, "structure": 0.0}


@dataclass(frozen=True)
class LossTerm:
    """Loss on one target, in the unit of its label; errors of extensive targets are divided as ``per`` says.

    Attributes:
        weight: factor in the total; 0 leaves the term out.
        kind: ``"mae"``, ``"mse"`` or ``"huber"``, the mean over the components, or ``"l2"``, the Euclidean norm
            (arXiv 2410.24169 uses it for forces).
        delta: where Huber turns from quadratic to linear, in the unit of the label. Huber is divided by ``delta``, so
            that it has the slope of the MAE for large errors.
        final_weight: value that ``weight`` reaches towards the end of a training, see ``LossSettings.at``; default
            the same.
        average: for a target with one value per atom, ``"structure"`` averages over the atoms of each structure, then
            over structures; ``"atom"`` averages over all atoms at once.
        per: for an extensive target of ``N`` atoms, the divisor of its error: ``"atom"`` is ``N``, ``"root"`` its root,
            ``"structure"`` 1.

    Raises:
        ConfigError: an unknown kind, average or ``per``, a negative weight, a ``delta`` not above 0, a final weight for
            a term left out.
    """

    weight: float = 0.0
    kind: str = "mae"
    delta: float = 0.01
    final_weight: float | None = None
    average: str = "structure"
    per: str = "atom"

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("average", AVERAGES), ("per", SIZES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"loss {name} {getattr(self, name)!r} does not exist: choose {' or '.join(choices)}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"loss weight {self.weight} is not usable: it must be a number of at least 0")
        if not self.delta > 0:
            raise ConfigError(f"loss delta {self.delta} is not usable: it must be above 0")
        if self.final_weight is None:
            return
        if not (math.isfinite(self.final_weight) and self.final_weight > 0):
            raise ConfigError(f"loss final_weight {self.final_weight} is not usable: it must be a number above 0")
        if self.weight == 0:
            raise ConfigError(
                f"loss final_weight is {self.final_weight}, but weight is 0: set a small weight to start from"
            )


@dataclass(frozen=True)
class ForceTerm(LossTerm):
    """Loss on the forces (eV/Å): a ``LossTerm`` with the published default, the norm of each atom's error."""

    weight: float = 10.0
    kind: str = "l2"


@dataclass(frozen=True)
class LossSettings:
    """Total loss ``Σ weight · term`` over the terms.

    Attributes:
        energy: term on the energy, by default per atom.
        forces: term on the forces of atoms that are free to move.
        stress: term on the stress of periodic structures.
        change_after: part of a training after which weights begin to move to the final ones.
        properties: terms on further registered targets by name (``escaip.types.register_target``).

    Raises:
        ConfigError: a property that is not registered, every weight is 0, an average over atoms of a target that has
            one value per structure, ``per`` of one that is not extensive, or ``change_after`` is outside [0, 1].
    """

    energy: LossTerm = field(default_factory=lambda: LossTerm(weight=1.0))
    forces: ForceTerm = field(default_factory=ForceTerm)
    stress: LossTerm = field(default_factory=LossTerm)
    change_after: float = 0.5
    properties: dict[str, LossTerm] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.change_after <= 1:
            raise ConfigError(f"losses.change_after is {self.change_after}: it must be in [0, 1]")
        for name in self.properties:
            if name in ("energy", "forces", "stress"):
                raise ConfigError(f"losses.properties.{name} is not used: write losses.{name}")
            if name not in TARGETS:
                raise ConfigError(f"losses.properties.{name} is no registered target: choose {', '.join(TARGETS)}")
        for name, term in self.terms.items():
            if term.average != "structure" and not TARGETS[name].per_atom:
                raise ConfigError(f"losses.{name}.average is {term.average!r}, but {name} has one value per structure")
            if term.per != "atom" and not TARGETS[name].extensive:
                raise ConfigError(f"losses.{name}.per is {term.per!r}, but {name} does not grow with the structure")
        if not any(weight > 0 for weight in self.weights.values()):
            raise ConfigError("every loss weight is 0: set losses.energy.weight, losses.forces.weight or both")

    @property
    def terms(self) -> dict[str, LossTerm]:
        """Every term by the name of its target."""
        return {"energy": self.energy, "forces": self.forces, "stress": self.stress, **self.properties}

    @property
    def weights(self) -> dict[str, float]:
        """Weights by the name of the target at the end of a training, which validations use."""
        return {
            name: term.weight if term.final_weight is None else term.final_weight for name, term in self.terms.items()
        }

    def at(self, progress: float) -> LossSettings:
        """Returns the settings with the weights of a moment of the training.

        After ``change_after`` each weight moves to its final one by equal factors in equal times, so that energies gain
        on forces while the learning rate falls (the idea is that of the prefactors of DeePMD, arXiv 1707.09571).

        Args:
            progress: part of the training that is done, in [0, 1].
        """
        late = min(1.0, max(0.0, progress - self.change_after) / max(1.0 - self.change_after, 1e-12))

        def moved(term: Any) -> Any:
            if term.final_weight is None:
                return term
            return replace(term, weight=term.weight * (term.final_weight / term.weight) ** late, final_weight=None)

        properties = {name: moved(term) for name, term in self.properties.items()}
        named = {name: moved(getattr(self, name)) for name in ("energy", "forces", "stress")}
        return replace(self, properties=properties, **named)


@dataclass(frozen=True)
class LossSums:
    """Sums of each term over labelled entries, and their counts; both add up over batches and processes.

    Attributes:
        sums: ``(K,)`` float64, in the order of ``LossSettings.terms``; differentiable.
        counts: ``(K,)`` float64.
    """

    sums: Tensor
    counts: Tensor

    def total(self, settings: LossSettings, counts: Tensor | None = None) -> Tensor:
        """Returns ``Σ weight · sum / count``; a term without a labelled entry is exactly 0.

        Args:
            settings: the weights.
            counts: ``(K,)`` counts to divide by instead of its own, those of all processes for example.
        """
        counts = self.counts if counts is None else counts
        means = self.sums / counts.clamp_min(1.0)
        # The weights stay numbers: copying a tensor of them to a GPU would wait for the device.
        return torch.stack([w * mean for w, mean in zip(settings.weights.values(), means, strict=True)]).sum()


def loss_sums(prediction: Prediction, batch: StructureBatch, settings: LossSettings) -> LossSums:
    """Evaluates the terms on the labelled entries of a batch.

    Every predicted quantity stays in the graph, with gradient zero where nothing is labelled, so that each parameter
    has a gradient on every process.

    Args:
        prediction: for the batch; a target that it lacks contributes nothing.
        batch: with labels, NaN where missing.
        settings: kinds and weights.
    """
    zero = torch.zeros((), dtype=torch.float64, device=batch.ptr.device)
    sums, counts = [], []
    for name, term in settings.terms.items():
        value = prediction.of_target(name)
        total, count = (zero, zero) if value is None else _term_sums(value, batch, TARGETS[name], term)
        sums.append(total)
        counts.append(count)
    return LossSums(torch.stack(sums), torch.stack(counts))


def labelled(batch: StructureBatch, target: Target) -> Tensor:
    """Returns a mask of the labelled entries, ``(N,)`` bool for a target per atom, else ``(B,)``.

    Fixed atoms have no force label. A batch made before the target was registered has no label at all.
    """
    labels: Tensor | None = getattr(batch, target.name, None)
    if labels is None:
        return torch.zeros_like(batch.batch if target.per_atom else batch.ptr[1:], dtype=torch.bool)
    missing = torch.isnan(labels).flatten(1).any(-1) if target.shape else torch.isnan(labels)
    return ~missing & ~batch.fixed if target.name == "forces" else ~missing


def errors_of(
    value: Tensor, batch: StructureBatch, target: Target, chosen: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compares predictions with labels in the ``n`` chosen entries, in the unit of the target.

    Returns:
        Errors ``(n, c)`` float64, prediction less label, of ``c`` components, per atom for extensive targets; and the
        predictions and labels themselves, ``(n, *shape)`` float64.
    """
    labels: Tensor = getattr(batch, target.name, value)
    pair = value[chosen].double(), labels[chosen].double()
    error = (pair[0] - pair[1]).unsqueeze(-1).flatten(1)
    if target.extensive:
        error = error / (batch.ptr[1:] - batch.ptr[:-1])[chosen].unsqueeze(-1)
    return error, pair


def size_factors(batch: StructureBatch, term: LossTerm) -> Tensor:
    """Returns what turns errors per atom into those that a term counts, ``(B,)`` float64."""
    return (batch.ptr[1:] - batch.ptr[:-1]).double() ** (1.0 - SIZES[term.per])


def _term_sums(value: Tensor, batch: StructureBatch, target: Target, term: LossTerm) -> tuple[Tensor, Tensor]:
    chosen = labelled(batch, target)
    errors = errors_of(value, batch, target, chosen)[0]
    if term.per != "atom":
        errors = errors * size_factors(batch, term)[chosen, None]
    values = KINDS[term.kind](errors, term.delta)
    if not target.per_atom or term.average == "atom":
        return values.sum(), chosen.sum().double()
    structure = batch.batch[chosen]
    atoms = values.new_zeros(batch.ptr.numel() - 1).index_add(0, structure, torch.ones_like(values).detach())
    return (values / atoms[structure]).sum(), (atoms > 0).sum().double()
