"""Errors of predictions and of a trivial baseline, over labelled entries, as sums that add up over processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from escaip.files import aligned
from escaip.train.losses import LossSettings, LossSums, errors_of, labelled, loss_sums
from escaip.types import TARGETS, Prediction, StructureBatch, Target

_SPELLED = str.maketrans({"/": "_per_", "Å": "A", "³": "3", "²": "2", "·": "_", " ": "_"})


@dataclasses.dataclass(frozen=True)
class ErrorFigure:
    """One logged figure, computed from a row of ``error_sums``.

    Attributes:
        name: in logs: ``energy_mae_meV_per_atom``.
        label: in tables: ``energy MAE (meV/atom)``.
        numerator: position of the sum.
        denominator: position of the count.
        factor: multiplies the figure.
        root: whether the square root of the mean is taken.
        digits: after the point, in tables.
    """

    name: str
    label: str
    numerator: int
    denominator: int
    factor: float = 1.0
    root: bool = False
    digits: int = 2


def figure_name(target: Target, kind: str) -> str:
    """Returns the name under which an error is logged: ``energy_mae_meV_per_atom``, ``force_rmse_meV_per_A``."""
    return f"{_singular(target)}_{kind}_{target.reported_unit.translate(_SPELLED)}"


def _singular(target: Target) -> str:
    return "force" if target.name == "forces" else target.name


def error_figures() -> list[ErrorFigure]:
    """Returns MAE and RMSE of every registered target in its reported unit, and the cosine of the forces."""
    figures = []
    for index, target in enumerate(TARGETS.values()):
        factor, count = target.reported_factor, 3 * index
        for place, kind in enumerate(("mae", "rmse"), start=count + 1):
            name, label = figure_name(target, kind), f"{_singular(target)} {kind.upper()} ({target.reported_unit})"
            figures.append(ErrorFigure(name, label, place, count, factor, root=kind == "rmse"))
        if target.name == "forces":
            last = 3 * len(TARGETS)
            figures.append(ErrorFigure("force_cosine", "force cosine", last + 1, last, digits=3))
    return figures


def error_sums(prediction: Prediction, batch: StructureBatch, only: Tensor | None = None) -> Tensor:
    """Returns ``(3 K + 2,)`` float64 sums over labelled entries, detached.

    For each of the ``K`` registered targets: the number of components, absolute and squared errors in its unit (per
    atom where it is extensive). Then the number of forces and their cosines with the labels. A force of zero has no
    direction: atoms whose predicted or labelled force vanishes have cosine 0.

    Args:
        prediction: for the batch.
        batch: with labels.
        only: ``(B,)`` bool, the structures that count; default all.
    """
    zero = torch.zeros((), dtype=torch.float64, device=batch.ptr.device)
    sums, cosines = [], [zero, zero]
    for target in TARGETS.values():
        value = prediction.of_target(target.name)
        if value is None:
            sums += [zero] * 3
            continue
        chosen = labelled(batch, target)
        if only is not None:
            chosen = chosen & (only[batch.batch] if target.per_atom else only)
        error, pair = errors_of(value.detach(), batch, target, chosen)
        count = chosen.sum().double()
        sums += [error.shape[1] * count, error.abs().sum(), error.square().sum()]
        if target.name == "forces":
            cosines = [count, torch.nn.functional.cosine_similarity(*pair, dim=-1, eps=1e-12).sum()]
    return torch.stack([*sums, *cosines])


def errors_from_sums(sums: Tensor) -> dict[str, float]:
    """Turns ``error_sums`` into named errors in reported units; a label that never occurred is left out."""
    values = sums.tolist()
    errors = {}
    for figure in error_figures():
        if values[figure.denominator] > 0:
            mean = values[figure.numerator] / values[figure.denominator]
            errors[figure.name] = figure.factor * (mean**0.5 if figure.root else mean)
    return errors


def baseline_prediction(prediction: Prediction, batch: StructureBatch, atomic: Tensor) -> Prediction:
    """Returns a prediction without a model: energies that sum the ``(N,)`` atomic ones, zero for everything else."""
    energy = atomic.new_zeros(batch.ptr.numel() - 1).index_add(0, batch.batch, atomic)
    forces = None if prediction.forces is None else torch.zeros_like(prediction.forces)
    stress = None if prediction.stress is None else torch.zeros_like(prediction.stress)
    properties = {name: torch.zeros_like(value) for name, value in prediction.properties.items()}
    return Prediction(energy, forces, stress, atomic, properties=properties)


class ErrorMetrics(Metric):
    """Errors and loss over a whole validation, of the model and of the baseline, on any number of processes.

    Args:
        settings: kinds and weights of the loss.
        datasets: names of the sets of a mixture, whose errors are also kept apart.
    """

    full_state_update = False
    sums: Tensor
    loss: Tensor
    by_set: Tensor

    def __init__(self, settings: LossSettings, datasets: Sequence[str] = ()) -> None:
        super().__init__()
        self._settings, self.datasets = settings, tuple(datasets)
        shapes = {
            "by_set": (max(len(datasets), 1), 3 * len(TARGETS) + 2),
            "sums": (2, 3 * len(TARGETS) + 2),
            "loss": (2, len(settings.terms)),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Prediction, batch: StructureBatch, atomic_references: Tensor) -> None:
        """Adds a batch, with the ``(N,)`` eV element reference of each atom."""
        baseline = baseline_prediction(prediction, batch, atomic_references)
        self.sums += torch.stack([error_sums(prediction, batch), error_sums(baseline, batch)])
        for code in range(len(self.datasets)):
            self.by_set[code] += error_sums(prediction, batch, batch.dataset == code)
        terms = loss_sums(prediction, batch, self._settings)
        self.loss += torch.stack([terms.sums.detach(), terms.counts])

    def compute(self) -> dict[str, dict[str, float]]:
        """Returns ``{"model": {..., "loss": ...}, "baseline": {...}}`` and, of a mixture, each set by name."""
        model, baseline = errors_from_sums(self.sums[0]), errors_from_sums(self.sums[1])
        model["loss"] = float(LossSums(self.loss[0], self.loss[1]).total(self._settings))
        by_set = {name: errors_from_sums(sums) for name, sums in zip(self.datasets, self.by_set, strict=False)}
        return {**by_set, "model": model, "baseline": baseline}


def format_table(columns: Mapping[str, Mapping[str, float]], part: str = "validation") -> str:
    """Returns a table of errors of a part of the data as text, one column for each name given."""
    rows = [[f"{part} error", *columns]]
    for figure in error_figures():
        cells = [f"{e[figure.name]:.{figure.digits}f}" if figure.name in e else "-" for e in columns.values()]
        if any(cell != "-" for cell in cells):
            rows.append([figure.label, *cells])
    rows.insert(1, ["-" * max(map(len, column)) for column in zip(*rows, strict=True)])
    return "\n".join(aligned(rows, numbers=True))
