"""Averaged weights are validated and saved as the model; the raw ones continue the training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from escaip.errors import ConfigError

SOLVED = ("element_shifts", "coefficients")
"""Buffers that are solved for while the weights change (``escaip.train.atomic_energy_refit``, ``linear_fit``)."""


class WeightEMA(WeightAveraging):
    """Exponential moving average of the weights after every optimizer step.

    Lightning's callback swaps the averaged weights in for validation, stores them in ``state_dict`` and the raw ones
    in ``current_model_state``. This class changes five things: buffers (element references, scale) follow the model
    from the first validation on, where Lightning copies them before they are set; those that make up for what the
    weights leave of the energies (``SOLVED``) are averaged as these are, since the present ones go with the present
    weights; what is left is fitted before each validation (``PotentialModule.settle_energies``); the decay is at most
    ``(1 + n) / (10 + n)`` after ``n`` updates, so that short runs forget their random first weights; and there is no
    warning outside of training.

    Args:
        decay: weight of the old average in each update; 0 turns averaging off.

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
        torch._foreach_lerp_(averaged, current, 1.0 - self._decay_after(int(num_updates)))

    def _decay_after(self, count: int) -> float:
        return min(self.decay, (1 + count) / (10 + count))

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Updates the average."""
        assert self._average_model is not None
        before = [value.clone() for value in _solved(self._average_model.module)]
        count = int(self._average_model.n_averaged)
        super().on_train_batch_end(trainer, pl_module, *args)
        if 0 < count < int(self._average_model.n_averaged):  # the first update copies
            for value, was in zip(_solved(self._average_model.module), before, strict=True):
                value.lerp_(was, self._decay_after(count))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copies the module, in the precision that it trains in."""
        trainer.precision_plugin.convert_module(pl_module)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the average to the device of the module and takes what was set after the copy was made."""
        assert self._average_model is not None
        self._average_model.module.to(pl_module.device)
        self._take_buffers(pl_module)
        if not int(self._average_model.n_averaged):
            for average, given in zip(self._average_model.module.parameters(), pl_module.parameters(), strict=True):
                average.data.copy_(given.data)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Swaps the averaged weights in, and fits their energies."""
        super().on_validation_epoch_start(trainer, pl_module)
        if self._average_model is not None and not trainer.sanity_checking:
            pl_module.settle_energies()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Drops what the module has dropped in this step."""
        self._follow(pl_module)

    def _follow(self, pl_module: Any) -> None:
        assert self._average_model is not None
        stages: Any = self._average_model.module.stages
        if stages.is_first and not pl_module.stages.is_first:
            stages.end()

    def _take_buffers(self, pl_module: LightningModule) -> None:
        """Copies the buffers of the module; their shapes depend on the number of data sets."""
        assert self._average_model is not None
        for name, given in pl_module.named_buffers():
            if int(self._average_model.n_averaged) and name.rpartition(".")[2] in SOLVED:
                continue
            owner, _, attribute = name.rpartition(".")
            setattr(self._average_model.module.get_submodule(owner), attribute, given.detach().clone())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stores the averaged weights in ``state_dict``; after training the model holds them already."""
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores both sets of weights to continue training; other commands need ``state_dict`` alone."""
        if self._average_model is not None:
            self._follow(pl_module)
            self._take_buffers(pl_module)
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _solved(module: Any) -> list[Tensor]:
    return [value for name, value in module.named_buffers() if name.rpartition(".")[2] in SOLVED]
