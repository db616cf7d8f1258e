"""CHGNet with the weights that its package ships, through its ASE calculator."""

from __future__ import annotations

from typing import Any

from chgnet.model.dynamics import CHGNetCalculator
from tasks import CalculatorTask, Structure, Task, count_parameters


class CHGNetModel:
    """Options: none."""

    def __init__(self) -> None:
        self.calculator = CHGNetCalculator(use_device="cpu", on_isolated_atoms="ignore")
        self.parameters = count_parameters(self.calculator.model)
        self.notes = [f"shipped weights {self.calculator.version}", "also gives stress and magnetic moments"]

    def inference(self, structure: Structure) -> Task:
        if not all(structure["pbc"]):
            raise ValueError("CHGNet takes periodic crystals only, this structure is not periodic")
        return CalculatorTask(self.calculator, structure)

    def training(self, structures: list[Structure]) -> Task:
        raise NotImplementedError("training steps of CHGNet are not part of this comparison")


def build(options: dict[str, Any]) -> CHGNetModel:
    assert not options
    return CHGNetModel()
