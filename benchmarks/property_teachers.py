"""Crystals whose energies have a closed form, and small models trained on them: what ``properties.py`` compares."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import yaml
from ase import Atoms
from ase.build import bulk, surface
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from common import write_json

from escaip import Potential, load_potential


@dataclass(frozen=True)
class Teacher:
    """A crystal and what gives its energies.

    Attributes:
        symbol: of the element.
        lattice: Å, near the teacher's own.
        cutoff: Å, of the model: whole shells, and well apart from the next, which would otherwise come and go.
        temperature: K, of the dynamics.
        timestep: fs, of the dynamics: a thirtieth of the shortest period.
        rattle: Å, the largest standard deviation of the displacements.
        fmax: eV/Å, largest force on the band: small beside the forces of this crystal.
        make: returns the calculator.
        structure: of the crystal, as ``ase.build.bulk`` names it: fcc or diamond.
    """

    symbol: str
    lattice: float
    cutoff: float
    temperature: float
    timestep: float
    rattle: float
    fmax: float
    make: Callable[[], Any]
    structure: str = "fcc"

    def crystal(self, repeat: int, lattice: float | None = None) -> Atoms:
        """``repeat`` cubic cells along each axis, without a calculator."""
        return bulk(self.symbol, self.structure, a=lattice or self.lattice, cubic=True).repeat(repeat)

    def slab(self, face: tuple[int, int, int], thickness: float, lattice: float | None = None) -> Atoms:
        """A slab at least so many Å thick, ions as in the crystal; periodic across twice the cutoff of vacuum too."""
        cubic = self.crystal(1, lattice)
        cubic.positions += cubic.cell.lengths() / 8  # diamond is cut between its double layers
        spacing = cubic.cell.lengths()[0] / np.linalg.norm(face)
        return surface(cubic, face, math.ceil(thickness / spacing), vacuum=self.cutoff, periodic=True)


TEACHERS = {
    "copper": Teacher("Cu", 3.59, 4.0, 300.0, 4.0, 0.12, 0.05, EMT),
    "argon": Teacher(
        "Ar", 5.33, 6.0, 30.0, 16.0, 0.20, 0.005,
        lambda: LennardJones(sigma=3.4, epsilon=0.0104, rc=6.0, ro=5.0, smooth=True),
    ),
}  # fmt: skip


FACES = ((1, 0, 0), (1, 1, 0), (1, 1, 1))


def make_frames(teacher: Teacher, count: int, seed: int) -> list[Atoms]:
    """Two cubic cells along each axis, strained, rattled; labelled.

    A third has a vacancy, and in half of these a neighbor of it is on its way into the hole: a barrier that no frame
    comes near is not learnt. A sixth are slabs with the surfaces ``FACES`` in turn.
    """
    rng = np.random.default_rng(seed)
    frames = []
    for index in range(count):
        atoms = teacher.crystal(2)
        if index % 6 == 1:
            atoms = teacher.slab(FACES[index // 6 % len(FACES)], 2 * teacher.lattice).repeat((2, 1, 1))
        strain = rng.uniform(-0.03, 0.03, (3, 3))
        strain = (strain + strain.T) / 2 + np.eye(3) * rng.uniform(-0.04, 0.04)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        if index % 3 == 2:
            hole = int(rng.integers(len(atoms)))
            if index % 2:
                hop(atoms, hole, rng.uniform())
            del atoms[hole]
        # Down to almost none: curvatures at the minimum are what phonons and elastic constants are.
        atoms.positions += rng.normal(scale=teacher.rattle * rng.uniform(0.05, 1.0), size=atoms.positions.shape)
        atoms.calc = teacher.make()
        results = {
            "energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress(),
        }  # fmt: skip
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    return frames


def hop(atoms: Atoms, hole: int, share: float) -> None:
    """Moves a nearest neighbor of atom ``hole`` by ``share`` of the way to its place."""
    others = [index for index in range(len(atoms)) if index != hole]
    neighbor = others[int(atoms.get_distances(hole, others, mic=True).argmin())]
    atoms.positions[neighbor] += share * atoms.get_distance(neighbor, hole, mic=True, vector=True)


def cpu_seconds() -> float:
    """Of this process and of those it waited for: what else the machine does is not in it."""
    return sum(os.times()[:4])


def recipe(name: str, teacher: Teacher, folder: Path, steps: int) -> dict[str, Any]:
    """The configuration of ``escaip fit``."""
    return {
        "seed_everything": 0,
        "model": {
            "architecture": {
                "preset": "1m", "hidden_size": 48, "num_layers": 2, "num_heads": 2,
                "angular_channels": [8, 4, 2, 5, 5], "cutoff": teacher.cutoff, "num_neighbors": None,
            },
            "losses": {
                "energy": {"weight": 5.0, "kind": "mae", "final_weight": 50.0},
                "forces": {"weight": 10.0, "kind": "l2"},
                "stress": {"weight": 50.0, "kind": "mae"},
                "change_after": 0.6,
            },
            "learning_rate": 2.0e-3, "weight_decay": 1.0e-3, "warmup_fraction": 0.05, "level_of_theory": name,
            "datasets": [name],
        },
        "data": {
            "train": str(folder / "train.extxyz"), "val": str(folder / "val.extxyz"), "max_atoms": 64,
        },
        "ema": {"decay": 0.99},
        "trainer": {
            "max_steps": steps, "max_epochs": -1, "gradient_clip_val": 100.0, "accelerator": "cpu",
            "enable_progress_bar": False, "check_val_every_n_epoch": None, "val_check_interval": max(1, steps // 10),
        },
    }  # fmt: skip


def train(name: str, teacher: Teacher, folder: Path, frames: int, steps: int) -> tuple[Path, dict[str, Any]]:
    """Trains by ``escaip fit``; returns the model file, and what it took and is worth.

    What stands in the folder, trained on as many frames for as many steps, is not trained again.
    """
    record = folder / "training.json"
    if record.exists():
        kept = json.loads(record.read_text("utf-8"))
        if (kept["frames"], kept["steps"]) == (frames, steps):
            return newest_model(folder), kept
    folder.mkdir(parents=True, exist_ok=True)
    for part, count, seed in (("train", frames, 0), ("val", max(frames // 8, 4), 1)):
        ase.io.write(folder / f"{part}.extxyz", make_frames(teacher, count, seed))
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(recipe(name, teacher, folder, steps)), "utf-8")
    command = [sys.executable, "-m", "escaip", "fit", "--config", str(config), "--out", str(folder)]
    began = cpu_seconds()
    with (folder / "fit.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ), check=False)
    if done.returncode:
        raise SystemExit(f"properties: training of {name} failed: see {folder / 'fit.log'}")
    seconds = cpu_seconds() - began
    model = newest_model(folder)
    potential = load_potential(model)
    found = {
        "frames": frames,
        "steps": steps,
        "seconds": round(seconds, 1),
        "parameters": sum(weight.numel() for weight in potential.parameters()),
        "held_out_mae": errors_of(potential, make_frames(teacher, 24, seed=2)),
    }
    write_json(record, found)
    return model, found


def newest_model(folder: Path) -> Path:
    return max(folder.rglob("best.ckpt"), key=lambda path: path.stat().st_mtime)


def errors_of(potential: Potential, frames: list[Atoms]) -> dict[str, float]:
    """Mean absolute errors of energies and force components, and of forces predicted as zero."""
    found = potential.predict(frames)
    energies = [(f.energy - a.get_potential_energy()) / len(a) for f, a in zip(found, frames)]
    labels = np.concatenate([a.get_forces() for a in frames])
    forces = np.concatenate([f.forces.numpy() for f in found])
    return {
        "energy_meV/atom": 1e3 * float(np.abs(energies).mean()),
        "forces_meV/A": 1e3 * float(np.abs(forces - labels).mean()),
        "forces_of_zero_meV/A": 1e3 * float(np.abs(labels).mean()),
    }
