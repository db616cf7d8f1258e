"""Small data and models for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from escaip.data import AtomicDataModule
from escaip.train.callbacks import PlainCheckpointIO

TINY = {
    "preset": "1m", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "angular_channels": [4, 2, 2],
    "num_radial": 16, "distance_size": 16, "element_size": 8, "boo_size": 8, "boo_degrees": 3, "cutoff": 4.0,
    "num_neighbors": 6,
}  # fmt: skip


def labelled_molecules(count: int, seed: int = 0, names: tuple[str, ...] = ("H2O", "NH3", "CH4")) -> list[Atoms]:
    """Rattled molecules with Lennard-Jones labels and an energy per element."""
    rng = np.random.default_rng(seed)
    structures = []
    for index in range(count):
        atoms = molecule(names[index % len(names)])
        atoms.positions += rng.normal(0.0, 0.05, atoms.positions.shape)
        atoms.calc = LennardJones(sigma=0.9, epsilon=0.2, rc=4.0)
        energy = atoms.get_potential_energy() - 13.0 * float((atoms.numbers == 1).sum()) - 5.0
        forces = atoms.get_forces()
        labelled = Atoms(atoms.numbers, atoms.positions)
        labelled.calc = SinglePointCalculator(labelled, energy=energy, forces=forces)
        structures.append(labelled)
    return structures


def write_molecules(path: Path, count: int, seed: int = 0) -> Path:
    """Writes them as extended XYZ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ase.io.write(path, labelled_molecules(count, seed))
    return path


RECIPE = """
model:
  architecture: {architecture}
  learning_rate: 1.0e-2
data:
  train: {data}
  split: {{by: structure, val: 4}}
  batch_size: 4
ema: {{decay: 0.9}}
evaluation: {{max_structures: 0}}
trainer: {{max_epochs: 2, accelerator: cpu, log_every_n_steps: 1}}
"""


def write_recipe(folder: Path, count: int = 16, **architecture: object) -> Path:
    """Writes data and a small training configuration beside them."""
    data = write_molecules(folder / "molecules.extxyz", count)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(architecture=json.dumps({**TINY, **architecture}), data=data), encoding="utf-8")
    return path


def make_trainer(folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    """A trainer without anything that is not asked for."""
    settings = {
        "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False,
        "default_root_dir": str(folder), "plugins": [PlainCheckpointIO()], "callbacks": callbacks,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
    }  # fmt: skip
    return Trainer(**{**settings, **options})


def make_data(folder: Path, count: int = 16, **options: Any) -> AtomicDataModule:
    """Molecules, four of them for validation."""
    path = write_molecules(folder / "molecules.extxyz", count)
    return AtomicDataModule(train=str(path), **{"batch_size": 4, "split": {"by": "structure", "val": 4}, **options})
