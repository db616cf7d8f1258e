"""The little that training needs to know about other processes and mixed precision."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor


def sum_over_processes(values: Tensor) -> Tensor:
    """Returns the sum over all processes, which every process gets; ``values`` itself where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total


def trained_with_scaler(trainer: Trainer) -> bool:
    """Whether float16 gradients are scaled, where a step with Inf is skipped and the scale lowered."""
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None
