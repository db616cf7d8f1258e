"""Stops with a clear line when training leaves the numbers that mean anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from escaip.errors import TrainingError
from escaip.train.losses import TERMS
from escaip.types import Prediction

_NAMES_SHOWN = 8


def loss_failure(trainer: Trainer, loss: float, sums: Tensor, batch: Any) -> TrainingError:
    """What to raise for a loss that is not finite.

    Args:
        trainer: of the run.
        loss: over all processes.
        sums: ``(3,)`` of this process's terms, in the order of ``TERMS``.
        batch: of this process.
    """
    bad = [name for name, value in zip(TERMS, sums.tolist(), strict=True) if not math.isfinite(value)]
    if not bad:
        return TrainingError(f"loss is {loss} in another process at step {trainer.global_step}: see its message")
    return TrainingError(
        f"loss is {loss} at step {trainer.global_step} (from {', '.join(bad)}) in the batch of "
        f"{_names(batch.structure_id)}; {_last_good(trainer)}: inspect these structures, or lower model.learning_rate"
    )


def gradient_failure(trainer: Trainer, norm: float, names: Sequence[str]) -> TrainingError:
    """What to raise for a gradient that is not finite, after batches with these structures."""
    return TrainingError(
        f"gradient norm is {norm} at step {trainer.global_step} after the batch of {_names(names)}; "
        f"{_last_good(trainer)}: inspect these structures, or lower model.learning_rate"
    )


def check_prediction(trainer: Trainer, prediction: Prediction, batch: Any) -> None:
    """Refuses energies or forces that are not finite.

    Raises:
        TrainingError: names the structures.
    """
    bad = ~torch.isfinite(prediction.energy)
    if prediction.forces is not None:
        atoms = (~torch.isfinite(prediction.forces).all(-1)).to(torch.int64)
        bad = bad | (torch.zeros_like(bad, dtype=torch.int64).index_add(0, batch.batch, atoms) > 0)
    if bool(bad.any()):
        names = [name for name, wrong in zip(batch.structure_id, bad.tolist(), strict=True) if wrong]
        raise TrainingError(
            f"prediction is NaN or Inf in validation for {_names(names)}; {_last_good(trainer)}: "
            "inspect these structures, or lower model.learning_rate"
        )


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(str(name) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _last_good(trainer: Trainer) -> str:
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
        if path:
            return f"the last good checkpoint is {path}"
    return "no checkpoint had been written yet"
