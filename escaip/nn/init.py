"""Initial weights: every layer starts with a signal of unit variance, and energies and forces near zero.

The default of ``nn.Linear`` shrinks a signal to a third of its variance in every layer, and Gaussians of a distance
are sparse: the distances would make up 0.2 % of the variance of a fresh token, and training would start on a plateau of
zero forces.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from escaip.nn.embedding import AtomFeatures, EdgeAttributes, SystemEmbedding
from escaip.nn.heads import DirectForceHead, EnergyHead

# Compensates the activation between the two maps of the distance.
_DISTANCE_GAIN = 1.3
# Of the standard deviation of a fresh element embedding, what is the element's own.
_OWN = 0.3
# First predictions, and what a charge adds, are small, but not zero, so that gradients reach all features.
_OUTPUT_GAIN = 0.1


@torch.no_grad()
def initialize(model: nn.Module, radial_width: float) -> None:
    """Draws the weights of a fresh model in place, from the global generator.

    Linear layers: normal of variance ``1 / fan-in`` (LeCun et al. 1998), biases 0. Distance embedding: variance
    ``1 / Σ_k g_k²``, where the squares of Gaussians of width ``w`` spacings sum to ``√π w`` at any distance. Outputs:
    a tenth of that; the magnitude that multiplies direct forces starts near 1, since a product of two factors near
    zero has no gradient to leave it. Elements: random maps of ``valence_electrons`` and a smaller part of their own,
    of unit variance together, so that elements of few frames begin as their neighbors in the periodic table. Charges
    and spins: a tenth of that, so that ions begin almost as the neutral molecule. Norms keep their values.

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
        elif isinstance(module, AtomFeatures):
            weight = module.element.weight
            electrons = valence_electrons(len(weight)).to(weight)
            number = electrons.shape[1]
            common = electrons @ weight[-number:] / math.sqrt(number)  # maps: what elements drew that no data has
            weight.copy_(math.sqrt(1.0 - _OWN**2) * common + _OWN * weight)
        elif isinstance(module, SystemEmbedding):
            for embedding in (module.charge, module.spin):
                if embedding is not None:
                    embedding.weight.mul_(_OUTPUT_GAIN)
        elif isinstance(module, EnergyHead):
            module.mlp.output.weight.mul_(_OUTPUT_GAIN)
        elif isinstance(module, DirectForceHead):
            module.vector.output.weight.mul_(_OUTPUT_GAIN)
            module.magnitude.ffn.contract.bias.fill_(1.0)
            module.magnitude.output.weight.fill_(1.0 / module.magnitude.output.in_features)


def valence_electrons(num_elements: int) -> torch.Tensor:
    """Returns the period and how far the s, p, d and f shells of the valence are filled, by the Madelung rule.

    Args:
        num_elements: rows; the first, of no element, is that of hydrogen.

    Returns:
        ``(num_elements, 5)``, of mean 0 and variance 1 over the elements.
    """
    shells = sorted(((n, degree) for n in range(1, 9) for degree in range(min(n, 4))), key=lambda x: (sum(x), x[0]))
    rows = []
    for electrons in (max(number, 1) for number in range(num_elements)):
        row = [0.0] * 5
        for n, degree in shells:
            if electrons <= 0:
                break
            if degree == 0:  # a new period: what was filled before is the core
                row = [float(n), 0.0, 0.0, 0.0, 0.0]
            room = 4 * degree + 2
            row[1 + degree] = min(electrons, room) / room
            electrons -= room
        rows.append(row)
    table = torch.tensor(rows)
    return (table - table.mean(0)) / table.std(0)
