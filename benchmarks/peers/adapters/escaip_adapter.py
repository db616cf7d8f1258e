"""This package: presets, and the published size with the very weights of fairchem-core's model where it has run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from tasks import CalculatorTask, Structure, Task, TrainingTask, count_parameters
from torch import Tensor

from escaip import EScAIPCalculator, EScAIPConfig, Potential
from escaip.data import AtomicData, collate
from escaip.graph import neighbor_list
from escaip.interop import from_fairchem


class EScAIPModel:
    """Options: ``preset``, or ``weights``, the folder that fairchem's adapter wrote; ``compiled``; any of the config.

    The neighbor list is searched anew at every evaluation (skin 0), as the other calculators do.
    """

    def __init__(
        self,
        preset: str | None = None,
        weights: str | None = None,
        compiled: bool = False,
        distance_table: str = "never",
        **overrides: Any,
    ) -> None:
        if weights is None:
            self.potential = Potential(EScAIPConfig.preset(str(preset), **overrides)).eval()
        else:
            folder = Path(weights)
            state = torch.load(folder / "weights.pt", weights_only=True)
            options = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self.potential = from_fairchem(state, options, distance_table=distance_table)
        config = self.potential.config
        self.parameters = count_parameters(self.potential)
        self.notes = [
            f"cutoff {config.cutoff:g} Å, {config.num_neighbors} neighbors",
            f"distance table: {config.distance_table}",
        ]
        self.compiled = compiled
        self._calculator: EScAIPCalculator | None = None

    def inference(self, structure: Structure) -> Task:
        if self._calculator is None:  # kept for the next case: it holds the compiled code
            self._calculator = EScAIPCalculator(self.potential, device="cpu", compile=self.compiled, skin=0.0)
        return CalculatorTask(self._calculator, structure)

    def training(self, structures: list[Structure]) -> Task:
        self.potential.train().requires_grad_(True)
        if self.compiled:
            self.potential.compile()
        return TrainingTask(self.potential.parameters(), structures, self._batch, self._forward)

    def _batch(self, group: list[Atoms]) -> Any:
        """With the candidate pairs that a loader worker attaches."""
        batch = collate([AtomicData.from_ase(atoms) for atoms in group])
        return batch, neighbor_list(batch, self.potential.search_cutoff)

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        prediction = self.potential(batch[0], neighbors=batch[1], create_graph=True)
        assert prediction.forces is not None
        return prediction.energy, prediction.forces


def build(options: dict[str, Any]) -> EScAIPModel:
    return EScAIPModel(**options)
