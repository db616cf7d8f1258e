"""ORB v3 conservative with random weights, through its ASE calculator."""

from __future__ import annotations

from typing import Any

import torch
from orb_models.forcefield.atomic_system import SystemConfig
from orb_models.forcefield.calculator import ORBCalculator
from orb_models.forcefield.pretrained import orb_v3_conservative_architecture
from tasks import CalculatorTask, Structure, Task, count_parameters


class ORBModel:
    """Options: ``neighbors``, at most, of an atom; ``compiled``, as its loader does by default."""

    def __init__(self, neighbors: int, compiled: bool = False) -> None:
        torch.set_default_dtype(torch.float32)
        settings = SystemConfig(radius=6.0, max_num_neighbors=neighbors)
        self.model = orb_v3_conservative_architecture(device="cpu", system_config=settings).eval().requires_grad_(False)
        self.parameters = count_parameters(self.model)
        self.notes = [f"cutoff 6 Å, at most {neighbors} neighbors"]
        if compiled:
            self.model.compile(mode="default", dynamic=True)

    def inference(self, structure: Structure) -> Task:
        return CalculatorTask(ORBCalculator(self.model, device="cpu"), structure)

    def training(self, structures: list[Structure]) -> Task:
        raise NotImplementedError("training steps of ORB are not part of this comparison")


def build(options: dict[str, Any]) -> ORBModel:
    return ORBModel(**options)
