"""MACE with the published sizes and random weights, through its ASE calculator."""

from __future__ import annotations

from typing import Any

import mace.calculators  # first: it lets its own e3nn load its constants
import numpy as np
import torch
from ase import Atoms
from mace.data import AtomicData, config_from_atoms
from mace.modules import ScaleShiftMACE, interaction_classes
from mace.tools import AtomicNumberTable, torch_geometric
from tasks import CalculatorTask, Structure, Task, TrainingTask, count_parameters
from torch import Tensor

RESIDUAL, PLAIN = "RealAgnosticResidualInteractionBlock", "RealAgnosticInteractionBlock"
ORGANIC = (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)
FEW = (1, 6, 7, 8, 11, 14, 17, 29)  # of the structures here: every element costs parameters
EVERY = (*range(1, 84), *range(89, 95))
# As published for MACE-MP-0 (arXiv 2401.00096) and MACE-OFF23 (arXiv 2312.15211); the numbers of parameters are theirs.
SIZES: dict[str, dict[str, Any]] = {
    "mp-small": {"irreps": "128x0e", "cutoff": 6.0, "bessel": 10, "first": RESIDUAL, "elements": EVERY},
    "mp-medium": {"irreps": "128x0e + 128x1o", "cutoff": 6.0, "bessel": 10, "first": RESIDUAL, "elements": EVERY},
    "off-small": {"irreps": "96x0e", "cutoff": 4.5, "bessel": 8, "first": PLAIN, "elements": ORGANIC},
    "off-medium": {"irreps": "128x0e + 128x1o", "cutoff": 5.0, "bessel": 8, "first": PLAIN, "elements": ORGANIC},
    "medium-few": {"irreps": "128x0e + 128x1o", "cutoff": 6.0, "bessel": 10, "first": RESIDUAL, "elements": FEW},
}


class MACEModel:
    """Options: ``size``, one of SIZES; ``compiled``."""

    def __init__(self, size: str, compiled: bool = False) -> None:
        torch.set_default_dtype(torch.float32)
        self.model = make(**SIZES[size])
        self.parameters = count_parameters(self.model)
        self.numbers = AtomicNumberTable(list(SIZES[size]["elements"]))
        self.cutoff = SIZES[size]["cutoff"]
        self.notes = [f"cutoff {self.cutoff:g} Å"]
        self.compiled = compiled

    def inference(self, structure: Structure) -> Task:
        self._check(structure)
        mode = {"compile_mode": "default"} if self.compiled else {}
        calculator = mace.calculators.MACECalculator(models=[self.model], device="cpu", default_dtype="float32", **mode)
        return CalculatorTask(calculator, structure)

    def training(self, structures: list[Structure]) -> Task:
        self._check(structures[0])
        self.model.train().requires_grad_(True)
        return TrainingTask(self.model.parameters(), structures, self._batch, self._forward)

    def _check(self, structure: Structure) -> None:
        missing = sorted(set(structure["numbers"]) - set(self.numbers.zs))
        if missing:
            raise ValueError(f"the published model has no element {missing[0]}")

    def _batch(self, group: list[Atoms]) -> Any:
        data = [AtomicData.from_config(config_from_atoms(x), z_table=self.numbers, cutoff=self.cutoff) for x in group]
        loader = torch_geometric.dataloader.DataLoader(dataset=data, batch_size=len(data), shuffle=False)
        return next(iter(loader)).to_dict()

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        out = self.model(batch, training=True, compute_force=True)
        return out["energy"], out["forces"]


def make(irreps: str, cutoff: float, bessel: int, first: str, elements: tuple[int, ...]) -> torch.nn.Module:
    from e3nn import o3

    return ScaleShiftMACE(
        r_max=cutoff,
        num_bessel=bessel,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=interaction_classes[RESIDUAL],
        interaction_cls_first=interaction_classes[first],
        num_interactions=2,
        num_elements=len(elements),
        hidden_irreps=o3.Irreps(irreps),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(len(elements)),
        avg_num_neighbors=60.0,
        atomic_numbers=list(elements),
        correlation=3,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    ).float()


def build(options: dict[str, Any]) -> MACEModel:
    return MACEModel(**options)
