"""Tiny potentials with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from escaip.config import EScAIPConfig
from escaip.potential import Potential, PotentialMetadata

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 2, "angular_channels": (3, 2, 1, 1, 1), "num_radial": 24,
    "distance_size": 12, "element_size": 8, "boo_size": 6, "boo_degrees": 6, "cutoff": 4.0, "num_neighbors": 8,
}  # fmt: skip


@pytest.fixture
def make_potential() -> Callable[..., Potential]:
    def make(elements: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, **overrides: Any) -> Potential:
        torch.manual_seed(0)
        metadata = PotentialMetadata(elements=elements)
        potential = Potential(EScAIPConfig.from_dict({**SMALL, **overrides}), metadata=metadata).to(dtype).eval()
        potential.element_references.copy_(torch.linspace(-2.0, 2.0, 119, dtype=torch.float64))
        potential.scale.fill_(3.0)
        return potential

    return make
