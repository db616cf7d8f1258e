"""Initial weights: every layer starts with a signal of unit variance, and energies and forces near zero.

The default of ``nn.Linear`` shrinks a signal to a third of its variance in every layer, and Gaussians of a distance
are sparse: the distances would make up 0.2 % of the variance of a fresh token, and training would start on a plateau of
zero forces.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from escaip.nn.embedding import EdgeAttributes
from escaip.nn.heads import DirectForceHead, EnergyHead

# Compensates the activation between the two maps of the distance.
_DISTANCE_GAIN = 1.3
# First predictions are small, but not zero, so that gradients reach all features.
_OUTPUT_GAIN = 0.1


@torch.no_grad()
def initialize(model: nn.Module, radial_width: float) -> None:
    """Draws the weights of a fresh model in place, from the global generator.

    Linear layers: normal of variance ``1 / fan-in`` (LeCun et al. 1998), biases 0. Distance embedding: variance
    ``1 / Σ_k g_k²``, where the squares of Gaussians of width ``w`` spacings sum to ``√π w`` at any distance. Outputs:
    a tenth of that; the magnitude that multiplies direct forces starts near 1, since a product of two factors near
    zero has no gradient to leave it. Embeddings and norms keep the values that their modules drew.

    Args:
        model: with ``EdgeAttributes``, ``EnergyHead`` and ``DirectForceHead`` somewhere in it.
        radial_width: ``w``, of a Gaussian in spacings.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, 1.0 / math.sqrt(module.in_features))
            if module.bias is not None:
                module.bias.zero_()
    for module in model.modules():
        if isinstance(module, EdgeAttributes):
            module.distance_embedding.weight.normal_(0.0, (math.sqrt(math.pi) * radial_width) ** -0.5)
            module.distance_project.weight.mul_(_DISTANCE_GAIN)
        elif isinstance(module, EnergyHead):
            module.mlp.output.weight.mul_(_OUTPUT_GAIN)
        elif isinstance(module, DirectForceHead):
            module.vector.output.weight.mul_(_OUTPUT_GAIN)
            module.magnitude.ffn.contract.bias.fill_(1.0)
            module.magnitude.output.weight.fill_(1.0 / module.magnitude.output.in_features)
