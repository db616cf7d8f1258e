"""Hyperparameters that stay right when a model gets wider: maximal-update parametrisation.

Yang et al., Tensor Programs V (arXiv 2203.03466), table 3, for Adam. With ``r`` the number of inputs of a weight over
that of the same weight at the base width:

======================================= ======================= ============= ============
weight                                  initial variance        learning rate weight decay
======================================= ======================= ============= ============
inputs grow and outputs grow (hidden)   ``1/fan-in``, as always ``1/r``       ``r``
inputs grow, outputs do not (output)    ``1/(r fan-in)``        ``1/r``       ``r``
inputs do not grow, biases, norms, rest as always               as always     as always
======================================= ======================= ============= ============

Decay is multiplied so that what a step takes off stays the same (arXiv 2405.13698). Attention products keep ``1/√d``:
heads become more with the width, not larger.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from escaip.errors import ConfigError
from escaip.models.config import EScAIPConfig


def at_width(config: EScAIPConfig, hidden_size: int) -> EScAIPConfig:
    """The same model at another width: heads of the same size, as many as fit.

    Raises:
        ConfigError: the width is not a multiple of the size of a head.
    """
    head = config.hidden_size // config.num_heads
    if hidden_size < 1 or hidden_size % head:
        raise ConfigError(
            f"a width of {hidden_size} is not a multiple of the size of a head, {head} (hidden_size "
            f"{config.hidden_size} / num_heads {config.num_heads}): change one of them"
        )
    return dataclasses.replace(config, hidden_size=hidden_size, num_heads=hidden_size // head)


def fan_in_ratios(config: EScAIPConfig, base_width: int) -> dict[str, float]:
    """Inputs of each linear weight over those at the base width, by name in :class:`~escaip.models.escaip.EScAIP`.

    Only weights whose ratio is not 1.

    Raises:
        ConfigError: see :func:`at_width`.
    """
    here, base = _linear_sizes(config), _linear_sizes(at_width(config, base_width))
    ratios = {name: here[name][0] / base[name][0] for name in here}
    return {f"{name}.weight": ratio for name, ratio in ratios.items() if ratio != 1.0}


@torch.no_grad()
def scale_outputs(model: nn.Module, config: EScAIPConfig, base_width: int) -> None:
    """Shrinks the fresh weights whose outputs do not grow with the width by ``√r``, in place.

    Those that start constant at ``1/fan-in`` (the magnitude of direct forces) are as they should be.
    """
    here, base = _linear_sizes(config), _linear_sizes(at_width(config, base_width))
    for name, (inputs, outputs) in here.items():
        weight = model.get_parameter(f"{name}.weight")
        constant = bool((weight == weight.flatten()[0]).all())
        if inputs != base[name][0] and outputs == base[name][1] and not constant:
            weight.mul_(math.sqrt(base[name][0] / inputs))


def _linear_sizes(config: EScAIPConfig) -> dict[str, tuple[int, int]]:
    from escaip.models.escaip import EScAIP

    with torch.device("meta"):
        model = EScAIP(config)
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
