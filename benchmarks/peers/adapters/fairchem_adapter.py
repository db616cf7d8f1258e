"""EScAIP and AllScAIP as fairchem-core publishes them, with random weights.

Their own calculator cannot run EScAIP, so the model is called as it is: a fresh batch for every call, since forward
writes into it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.models.allscaip import AllScAIP
from fairchem.core.models.base import HydraModelV2
from fairchem.core.models.escaip import EScAIP
from tasks import Answer, Structure, Task, TrainingTask, count_parameters, to_atoms
from torch import Tensor

SHARED: dict[str, Any] = {
    "regress_forces": True, "regress_stress": False, "use_padding": False, "max_num_elements": 110,
    "max_atoms": 20000, "max_batch_size": 64, "max_radius": 6.0, "knn_k": 20, "knn_pad_size": 30, "knn_soft": True,
    "knn_sigmoid_scale": 0.2, "knn_lse_scale": 0.1, "knn_use_low_mem": True, "atten_name": "memory_efficient",
    "hidden_size": 128, "num_layers": 4, "atten_num_heads": 8, "freequency_list": [5, 3, 2, 3, 3],
}  # fmt: skip


class FairchemModel:
    """Options: ``architecture`` (escaip or allscaip), ``direct``, ``compiled``, ``pad``, ``export``.

    ``export`` names a folder for weights and configuration, from which escaip makes the same model.
    """

    def __init__(
        self, architecture: str, direct: bool, compiled: bool = False, pad: int = 30, export: str | None = None
    ) -> None:
        self.direct, self.architecture = direct, architecture
        self.options = {**SHARED, "direct_forces": direct, "use_compile": compiled, "knn_pad_size": pad}
        if architecture == "escaip":
            self.options["use_pbc"] = True
            self.model = make_escaip(self.options)
        else:
            self.model = make_allscaip(self.options)
        self.parameters = count_parameters(self.model)
        self.notes = [f"knn_k 20, knn_pad_size {pad}"]
        if export:
            self._write(Path(export))

    def inference(self, structure: Structure) -> Task:
        self._choose_periodicity(structure)
        self.model.eval()
        return FairchemTask(self, structure)

    def training(self, structures: list[Structure]) -> Task:
        self._choose_periodicity(structures[0])
        self.model.train()
        return TrainingTask(self.model.parameters(), structures, self.batch, self.evaluate)

    def batch(self, group: list[Atoms]) -> Any:
        return atomicdata_list_to_batch([AtomicData.from_ase(atoms, task_name="omol") for atoms in group])

    def evaluate(self, batch: Any) -> tuple[Tensor, Tensor]:
        out = self.model(batch)
        if self.direct:
            return out["energy"]["energy"], out["forces"]["forces"]
        return out["efs"]["energy"], out["efs"]["forces"]

    def _choose_periodicity(self, structure: Structure) -> None:
        """As their configurations for molecules do: EScAIP takes what has no cell for a crystal with one of 1 Å."""
        if self.architecture == "escaip":
            backbone: Any = self.model.backbone
            backbone.molecular_graph_cfg.use_pbc = any(structure["pbc"])

    def _write(self, folder: Path) -> None:
        """Aside and renamed: the reader is another process."""
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():  # weights that answer with something: as initialized, heads are all but zero
            for weight in self.model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        torch.save(self.model.state_dict(), folder / ".weights.part")
        os.replace(folder / ".weights.part", folder / "weights.pt")
        (folder / "config.json").write_text(json.dumps(self.options), encoding="utf-8")


class FairchemTask:
    """From new positions to energy and forces, conversion and batch included."""

    def __init__(self, model: FairchemModel, structure: Structure) -> None:
        self.model, self.structure = model, structure

    def prepare(self, positions: list[np.ndarray]) -> Atoms:
        return to_atoms(self.structure, positions[0])

    def run(self, prepared: Atoms) -> Answer:
        batch = self.model.batch([prepared])
        if self.model.direct:
            with torch.no_grad():
                energy, forces = self.model.evaluate(batch)
        else:
            energy, forces = self.model.evaluate(batch)
        return {"energy": float(energy.detach()), "largest_force": float(forces.detach().abs().max())}


def make_escaip(options: dict[str, Any]) -> torch.nn.Module:
    backbone = EScAIP.EScAIPBackbone(**options)
    if options["direct_forces"]:
        heads = {"energy": EScAIP.EScAIPEnergyHead(backbone), "forces": EScAIP.EScAIPDirectForceHead(backbone)}
    else:
        heads = {"efs": EScAIP.EScAIPGradientEnergyForceStressHead(backbone, wrap_property=False)}
    return HydraModelV2(backbone, heads)


def make_allscaip(options: dict[str, Any]) -> torch.nn.Module:
    backbone = AllScAIP.AllScAIPBackbone(**options)
    if options["direct_forces"]:
        heads = {"energy": AllScAIP.AllScAIPEnergyHead(backbone), "forces": AllScAIP.AllScAIPDirectForceHead(backbone)}
    else:
        heads = {"efs": AllScAIP.AllScAIPGradientEnergyForceStressHead(backbone, wrap_property=False)}
    return HydraModelV2(backbone, heads)


def build(options: dict[str, Any]) -> FairchemModel:
    return FairchemModel(**options)
