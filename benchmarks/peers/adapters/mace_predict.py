"""Predictions of a trained MACE model in its own environment: requests and replies as in ``worker.py``.

python benchmarks/peers/adapters/mace_predict.py MODEL
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from ase import Atoms
from worker import serve


class Predictor:
    """Answers the request ``predict``."""

    def __init__(self, file: str) -> None:
        import mace.calculators  # here, because it prints

        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        calculator = mace.calculators.MACECalculator(model_paths=[file], device="cpu", default_dtype="float32")
        self.model, self.numbers, self.cutoff = calculator.models[0], calculator.z_table, calculator.r_max

    def predict(self, structures: list[dict[str, Any]]) -> dict[str, Any]:
        """Energies and forces of structures, each the arguments of ``ase.Atoms``, in one batch."""
        from mace.data import AtomicData, config_from_atoms
        from mace.tools import torch_geometric

        data = [
            AtomicData.from_config(config_from_atoms(Atoms(**one)), z_table=self.numbers, cutoff=self.cutoff)
            for one in structures
        ]
        batch = next(iter(torch_geometric.dataloader.DataLoader(dataset=data, batch_size=len(data), shuffle=False)))
        found = self.model(batch.to_dict(), compute_force=True)
        forces = found["forces"].detach().split([len(one["numbers"]) for one in structures])
        parameters = sum(weight.numel() for weight in self.model.parameters())
        return {
            "energies": found["energy"].tolist(), "forces": [one.tolist() for one in forces], "parameters": parameters,
        }  # fmt: skip


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(Predictor(sys.argv[1]), sys.stdin, replies)


if __name__ == "__main__":
    main()
