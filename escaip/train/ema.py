"""Averaged weights: validated, saved as the model, served; the raw ones continue the training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from escaip.errors import ConfigError


class WeightEMA(WeightAveraging):
    """Exponential moving average of the weights after every optimizer step.

    Lightning's callback swaps the averaged weights in for validation, stores them in ``state_dict`` and the raw ones
    in ``current_model_state``. This adds what it lacks here: buffers (element references, scale) are those of the
    model from the first validation on, not copies from before they were set; a decay of at most ``(1 + n) / (10 + n)``
    after ``n`` updates, so that short runs forget their first, random weights; and no warning outside of training.

    Args:
        decay: of the average; 0 turns averaging off.

    Raises:
        ConfigError: ``decay`` is outside [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"ema.decay is {decay}: it must be in [0, 1), 0 for none")
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], num_updates: Tensor | int) -> None:
        count = int(num_updates)
        decay = min(self.decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(averaged, current, 1.0 - decay)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follows the module to its device, and takes the buffers: both were set after the copy was made."""
        assert self._average_model is not None
        self._average_model.module.to(pl_module.device)
        self._take_buffers(pl_module)

    def _take_buffers(self, pl_module: LightningModule) -> None:
        """Buffers of the module, whose shapes depend on how many sets there are."""
        assert self._average_model is not None
        for name, given in pl_module.named_buffers():
            owner, _, attribute = name.rpartition(".")
            setattr(self._average_model.module.get_submodule(owner), attribute, given.detach().clone())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the averaged weights in ``state_dict``; after training they are in the model already."""
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores both sets of weights to go on training; otherwise ``state_dict`` is what is wanted."""
        if self._average_model is not None:
            self._take_buffers(pl_module)
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
