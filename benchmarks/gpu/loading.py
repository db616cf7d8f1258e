"""Do data arrive in time? Batches of a prepared store into pinned memory, beside the training steps that take them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from gpu.models import make_potential, training_step
from gpu.runner import Row, Setting, reason
from gpu.structures import copper

from escaip.data import AtomicData, AtomicDataset, BudgetBatchSampler, Store, StoreWriter
from escaip.data.loader import BatchLoader


def loading(setting: Setting) -> Iterator[Row]:
    """Atoms per second: out of the store alone, and with a training step of the ``1m`` preset on each batch."""
    structures, atoms, budget = (8, 32, 64) if setting.small else (600, 108, 4_000)
    potential = make_potential("300k" if setting.small else "1m", "conservative", setting.device).train()
    with tempfile.TemporaryDirectory(prefix="escaip-loading-") as folder:
        dataset = AtomicDataset(write_store(Path(folder) / "store", structures, atoms))
        for workers in (0,) if setting.small else (0, 2, 4, 8):
            row: Row = {"workers": workers, "loaded_atoms_per_s": None, "trained_atoms_per_s": None, "failed": None}
            try:
                for name, step in (("loaded", None), ("trained", potential)):
                    cutoff = potential.search_cutoff if workers else None  # neighbors are searched by the workers
                    row[f"{name}_atoms_per_s"] = speed(dataset, budget, workers, cutoff, step, setting.device)
            except Exception as error:
                row["failed"] = reason(error)
            yield row


def write_store(path: Path, structures: int, atoms: int) -> Store:
    rng = np.random.default_rng(0)
    with StoreWriter(path) as writer:
        for index in range(structures):
            crystal = copper(atoms, rattle=0.0)
            crystal.rattle(0.1, seed=index)
            crystal.calc = SinglePointCalculator(crystal, energy=0.0, forces=rng.normal(size=crystal.positions.shape))
            writer.write(AtomicData.from_ase(crystal, structure_id=str(index)))
    return Store(path)


def speed(
    dataset: AtomicDataset, budget: int, workers: int, cutoff: float | None, potential: Any, device: str
) -> float:
    """Of the second half of an epoch: workers start in the first."""
    sampler = BudgetBatchSampler(dataset.natoms, max_atoms=budget, seed=0)
    loader = BatchLoader(dataset, sampler, num_workers=workers, neighbor_cutoff=cutoff)
    seen, total, start = 0, len(sampler), 0.0
    for index, loaded in enumerate(loader):
        if index == total // 2:
            start, seen = time.perf_counter(), 0
        batch = loaded.to(device, non_blocking=True)
        if potential is not None:
            training_step(potential, batch, "highest", device)
        seen += len(batch.positions)
    if device == "cuda":
        torch.cuda.synchronize()
    return seen / (time.perf_counter() - start)
