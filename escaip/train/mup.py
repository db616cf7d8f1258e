"""Maximal-update parametrisation: hyperparameters of one width serve wider models.

Yang et al., Tensor Programs V (arXiv 2203.03466), table 3, for Adam. With ``r`` the number of inputs of a weight over
that of the same weight at the base width:

======================================= ======================= ============= ============
weight                                  initial variance        learning rate weight decay
======================================= ======================= ============= ============
inputs grow and outputs grow (hidden)   ``1/fan-in``, as always ``1/r``       ``r``
inputs grow, outputs do not (output)    ``1/(r fan-in)``        ``1/r``       ``r``
inputs do not grow, biases, norms, rest as always               as always     as always
======================================= ======================= ============= ============

Decay is multiplied so that a step removes the same fraction of a weight (arXiv 2405.13698). Attention products keep
``1/√d``: wider models have more heads, not larger ones.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from escaip.models import ModelConfig, kind_of


def fan_in_ratios(config: ModelConfig, base_width: int) -> dict[str, float]:
    """Returns the number of inputs of each linear weight over that at the base width, by name, where it is not 1.

    Raises:
        ConfigError: see ``escaip.models.ModelConfig.at_width``.
    """
    here, base = _linear_sizes(config), _linear_sizes(config.at_width(base_width))
    ratios = {name: here[name][0] / base[name][0] for name in here}
    return {f"{name}.weight": ratio for name, ratio in ratios.items() if ratio != 1.0}


@torch.no_grad()
def scale_outputs(model: nn.Module, config: ModelConfig, base_width: int) -> None:
    """Shrinks the fresh weights whose outputs do not grow with the width by ``√r``, in place.

    Weights that start constant at ``1/fan-in`` (the magnitude of direct forces) have the right size already.
    """
    here, base = _linear_sizes(config), _linear_sizes(config.at_width(base_width))
    for name, (inputs, outputs) in here.items():
        weight = model.get_parameter(f"{name}.weight")
        constant = bool((weight == weight.flatten()[0]).all())
        if inputs != base[name][0] and outputs == base[name][1] and not constant:
            weight.mul_(math.sqrt(base[name][0] / inputs))


def _linear_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        model = kind_of(config).model(config)
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
