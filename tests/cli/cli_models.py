"""A tiny potential with random weights."""

from __future__ import annotations

from typing import Any

import torch

from escaip.models import EScAIPConfig
from escaip.potential import Potential, PotentialMetadata

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 2, "angular_channels": (3, 2, 1, 1, 1), "num_radial": 24,
    "distance_size": 12, "element_size": 8, "boo_size": 6, "boo_degrees": 4, "cutoff": 4.0, "num_neighbors": 8,
}  # fmt: skip


def make_potential(**overrides: Any) -> Potential:
    torch.manual_seed(0)
    metadata = PotentialMetadata(elements=(1, 6, 7, 8, 29), level_of_theory="random numbers", datasets=("none",))
    potential = Potential(EScAIPConfig.from_dict({**SMALL, **overrides}), metadata=metadata).double().eval()
    potential.element_references.copy_(torch.linspace(-2.0, 2.0, 119, dtype=torch.float64))
    return potential
