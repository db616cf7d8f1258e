"""Errors of predictions and of a trivial baseline, over labelled entries, as sums that add up over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from escaip.train.losses import (
    LossSettings,
    LossSums,
    labelled_atoms,
    labelled_energies,
    labelled_stresses,
    loss_sums,
)
from escaip.types import Prediction

MILLI = 1000.0
# Name -> (numerator, denominator, whether the root is taken, factor); positions in a row of the sums.
_FORMULAS: dict[str, tuple[int, int, bool, float]] = {
    "energy_mae_meV_per_atom": (1, 0, False, MILLI),
    "energy_rmse_meV_per_atom": (2, 0, True, MILLI),
    "force_mae_meV_per_A": (4, 3, False, MILLI),
    "force_rmse_meV_per_A": (5, 3, True, MILLI),
    "force_cosine": (7, 6, False, 1.0),
    "stress_mae_meV_per_A3": (9, 8, False, MILLI),
    "stress_rmse_meV_per_A3": (10, 8, True, MILLI),
}
NUM_SUMS = 11
ERROR_NAMES = tuple(_FORMULAS)


def error_sums(prediction: Prediction, batch: Any, only: Tensor | None = None) -> Tensor:
    """Returns ``(11,)`` float64 sums over labelled entries, detached: counts, absolute and squared errors, cosines.

    Energy errors are per atom, force and stress errors per component. A force of zero has no direction: atoms whose
    predicted or labelled force vanishes have cosine 0.

    Args:
        prediction: of the batch.
        batch: with labels.
        only: ``(B,)`` bool, the structures that count; default all.
    """
    counted = torch.ones_like(batch.energy, dtype=torch.bool) if only is None else only
    zero = torch.zeros((), dtype=torch.float64, device=batch.ptr.device)
    sums = [zero] * NUM_SUMS
    chosen = labelled_energies(batch) & counted
    natoms = (batch.ptr[1:] - batch.ptr[:-1])[chosen]
    error = (prediction.energy.detach()[chosen] - batch.energy[chosen]).double() / natoms
    sums[0:3] = [chosen.sum().double(), error.abs().sum(), error.square().sum()]
    if prediction.forces is not None:
        chosen = labelled_atoms(batch) & counted[batch.batch]
        forces, labels = prediction.forces.detach()[chosen].double(), batch.forces[chosen].double()
        error = forces - labels
        cosine = torch.nn.functional.cosine_similarity(forces, labels, dim=-1, eps=1e-12)
        sums[3:6] = [3.0 * chosen.sum().double(), error.abs().sum(), error.square().sum()]
        sums[6:8] = [chosen.sum().double(), cosine.sum()]
    if prediction.stress is not None:
        chosen = labelled_stresses(batch) & counted
        error = prediction.stress.detach()[chosen].double() - batch.stress[chosen].double()
        sums[8:11] = [9.0 * chosen.sum().double(), error.abs().sum(), error.square().sum()]
    return torch.stack([value.double() for value in sums])


def errors_from_sums(sums: Tensor) -> dict[str, float]:
    """Turns :func:`error_sums` into named errors in meV; a label that never occurred is left out."""
    values = sums.tolist()
    errors = {}
    for name, (numerator, denominator, root, factor) in _FORMULAS.items():
        if values[denominator] > 0:
            mean = values[numerator] / values[denominator]
            errors[name] = factor * (mean**0.5 if root else mean)
    return errors


def baseline_prediction(prediction: Prediction, batch: Any, atomic: Tensor) -> Prediction:
    """What needs no model: the sum of the ``(N,)`` element references, forces and stress of zero."""
    energy = atomic.new_zeros(batch.ptr.numel() - 1).index_add(0, batch.batch, atomic)
    forces = None if prediction.forces is None else torch.zeros_like(prediction.forces)
    stress = None if prediction.stress is None else torch.zeros_like(prediction.stress)
    return Prediction(energy, forces, stress, atomic)


class ErrorMetrics(Metric):
    """Errors and loss over a whole validation, of the model and of the baseline, on any number of processes.

    Args:
        settings: of the loss.
        datasets: names of the sets of a mixture, whose errors are kept apart as well.
    """

    full_state_update = False
    sums: Tensor
    loss: Tensor
    by_set: Tensor

    def __init__(self, settings: LossSettings, datasets: Sequence[str] = ()) -> None:
        super().__init__()
        self._settings, self.datasets = settings, tuple(datasets)
        shape = (max(len(datasets), 1), NUM_SUMS)
        self.add_state("by_set", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(2, NUM_SUMS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(2, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Prediction, batch: Any, atomic_references: Tensor) -> None:
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
    labels = {
        "energy_mae_meV_per_atom": "energy MAE (meV/atom)",
        "energy_rmse_meV_per_atom": "energy RMSE (meV/atom)",
        "force_mae_meV_per_A": "force MAE (meV/Å)",
        "force_rmse_meV_per_A": "force RMSE (meV/Å)",
        "force_cosine": "force cosine",
        "stress_mae_meV_per_A3": "stress MAE (meV/Å³)",
        "stress_rmse_meV_per_A3": "stress RMSE (meV/Å³)",
    }
    present = [name for name in ERROR_NAMES if any(name in errors for errors in columns.values())]
    rows = [[f"{part} error", *columns]]
    for name in present:
        digits = 3 if name == "force_cosine" else 2
        cells = [f"{errors[name]:.{digits}f}" if name in errors else "-" for errors in columns.values()]
        rows.append([labels[name], *cells])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
