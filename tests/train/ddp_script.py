"""Trains two steps' worth of batches on one or two processes; run by test_ddp.py, once per number of processes.

Two processes take one batch each per step; one process takes both as a single batch.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from training_stand_ins import TINY, labelled_molecules

from escaip.data import AtomicData, collate, fit_statistics
from escaip.train import LossSettings, LossTerm, PotentialModule, WeightEMA


class Pairs(LightningDataModule):
    """Three steps of two batches, of different sizes and with missing labels."""

    def __init__(self) -> None:
        super().__init__()
        structures = [AtomicData.from_ase(atoms) for atoms in labelled_molecules(15)]
        for index in (0, 4, 5):
            structures[index].energy[:] = float("nan")
        structures[9].forces[:] = float("nan")
        self.datasets, self.statistics = {"train": structures}, fit_statistics(structures)
        edges = (0, 2, 6, 9, 10, 12, 15)
        self.batches = [structures[start:stop] for start, stop in itertools.pairwise(edges)]

    def _loader(self) -> Any:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        pairs = [(self.batches[2 * step], self.batches[2 * step + 1]) for step in range(3)]
        mine = [pair[rank] if world == 2 else [*pair[0], *pair[1]] for pair in pairs]
        return torch.utils.data.DataLoader(mine, batch_size=None, collate_fn=collate)

    def train_dataloader(self) -> Any:
        return self._loader()

    def val_dataloader(self) -> Any:
        return self._loader()


class Record(Callback):
    def __init__(self) -> None:
        self.figures: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        names = ("train/loss", "train/grad_norm", "train/energy_mae_meV_per_atom", "train/force_mae_meV_per_A")
        self.figures.append([float(trainer.callback_metrics[name]) for name in names])

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        names = ("val/loss", "val/force_rmse_meV_per_A", "val_baseline/energy_mae_meV_per_atom")
        self.figures.append([float(trainer.callback_metrics[name]) for name in names])


def main(processes: int, target: str) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0)
    torch.set_num_threads(1)
    # The first bases of SOAP are those of rounding errors wherever gradients have no rank yet.
    module = PotentialModule(TINY, LossSettings(energy=LossTerm(3.0)), optimizer="adamw", learning_rate=1e-2)
    module.potential.double()
    record = Record()
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_epochs=2,
        callbacks=[WeightEMA(0.9), record], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, gradient_clip_val=5.0,
    )  # fmt: skip
    trainer.fit(module, datamodule=Pairs())
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    if trainer.is_global_zero:
        Path(target).write_text(json.dumps({"figures": record.figures, "weights": weights.tolist()}), encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
