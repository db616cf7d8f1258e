"""How near the properties of a small trained model come to those of its teacher.

    python benchmarks/properties.py --out runs/properties

For each teacher (EMT copper, Lennard-Jones argon): strained, rattled frames with vacancies, labelled by the teacher; a
model of less than 0.3 M parameters trained on them by ``escaip fit``; the same properties of both by
``escaip.properties`` and ``escaip.simulate``. Needs phonopy (pip install 'escaip[sim]').
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from common import markdown_table, provenance, write_json

from escaip import EScAIPCalculator, load_potential
from escaip.properties import crystal_phonons, elastic_constants, fit_equation_of_state
from escaip.simulate import MDSettings, relax, run_md

X, L = (0.5, 0.0, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Teacher:
    """A crystal and what gives its energies.

    Attributes:
        symbol: of the element; the lattice is fcc.
        lattice: Å, near the teacher's own.
        cutoff: Å, of the model: two shells, and well apart from the third, which would otherwise come and go.
        temperature: K, of the dynamics.
        rattle: Å, the largest standard deviation of the displacements.
        make: returns the calculator.
    """

    symbol: str
    lattice: float
    cutoff: float
    temperature: float
    rattle: float
    make: Callable[[], Any]


TEACHERS = {
    "copper": Teacher("Cu", 3.59, 4.0, 300.0, 0.12, EMT),
    "argon": Teacher(
        "Ar", 5.33, 6.0, 30.0, 0.20, lambda: LennardJones(sigma=3.4, epsilon=0.0104, rc=6.0, ro=5.0, smooth=True)
    ),
}


def make_frames(teacher: Teacher, count: int, seed: int) -> list[Atoms]:
    """Cells of 31 or 32 atoms, strained, rattled, a third with a vacancy; labelled."""
    rng = np.random.default_rng(seed)
    frames = []
    for index in range(count):
        atoms = bulk(teacher.symbol, "fcc", a=teacher.lattice, cubic=True).repeat(2)
        strain = rng.uniform(-0.03, 0.03, (3, 3))
        strain = (strain + strain.T) / 2 + np.eye(3) * rng.uniform(-0.04, 0.04)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        if index % 3 == 2:
            del atoms[int(rng.integers(len(atoms)))]
        # Down to almost none: curvatures at the minimum are what phonons and elastic constants are.
        atoms.positions += rng.normal(scale=teacher.rattle * rng.uniform(0.05, 1.0), size=atoms.positions.shape)
        calculator = teacher.make()
        atoms.calc = calculator
        results = {
            "energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress(),
        }  # fmt: skip
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    return frames


def train(name: str, teacher: Teacher, folder: Path, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Trains by ``escaip fit``; returns the model file and what it took."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count, seed in (("train", options.frames, 0), ("val", max(options.frames // 8, 4), 1)):
        ase.io.write(folder / f"{part}.extxyz", make_frames(teacher, count, seed))
    config = {
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
            "max_steps": options.steps, "max_epochs": -1, "gradient_clip_val": 100.0, "accelerator": "cpu",
            "enable_progress_bar": False, "check_val_every_n_epoch": None,
            "val_check_interval": max(1, options.steps // 10),
        },
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    command = [sys.executable, "-m", "escaip", "fit", "--config", str(folder / "config.yaml"), "--out", str(folder)]
    began = time.perf_counter()
    with (folder / "fit.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ), check=False)
    if done.returncode:
        raise SystemExit(f"properties: training of {name} failed: see {folder / 'fit.log'}")
    seconds = time.perf_counter() - began
    model = max(folder.rglob("best.ckpt"), key=lambda path: path.stat().st_mtime)
    potential = load_potential(model)
    held_out = make_frames(teacher, 24, seed=2)
    found = potential.predict(held_out, compute_stress=True)
    errors = {
        "energy_meV/atom": 1e3
        * float(np.mean([abs(f.energy - a.get_potential_energy()) / len(a) for f, a in zip(found, held_out)])),
        "forces_meV/A": 1e3
        * float(
            np.mean(
                np.concatenate([np.abs(f.forces.numpy() - a.get_forces()).ravel() for f, a in zip(found, held_out)])
            )
        ),
        "forces_of_zero_meV/A": 1e3
        * float(np.mean(np.concatenate([np.abs(a.get_forces()).ravel() for a in held_out]))),
    }
    parameters = sum(weight.numel() for weight in potential.parameters())
    return model, {"seconds": seconds, "steps": options.steps, "parameters": parameters, "held_out_mae": errors}


def measure(
    teacher: Teacher, calculator: Any, folder: Path, md_steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Properties of a crystal, and the seconds that each took."""
    values: dict[str, float] = {}
    seconds: dict[str, float] = {}
    primitive = bulk(teacher.symbol, "fcc", a=teacher.lattice)
    primitive.calc = calculator

    def timed(name: str, compute: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = compute()
        seconds[name] = time.perf_counter() - began
        return result

    curve = timed("equation of state", lambda: fit_equation_of_state(primitive))
    values["lattice constant (Å)"] = float((4 * curve.volume) ** (1 / 3))
    values["B0 (GPa)"] = curve.bulk_modulus
    elastic = timed("elastic constants", lambda: elastic_constants(primitive)).stiffness
    values.update({"C11 (GPa)": elastic[0, 0], "C12 (GPa)": elastic[0, 1], "C44 (GPa)": elastic[3, 3]})
    phonons = timed("phonons", lambda: crystal_phonons(primitive, supercell=(4, 4, 4), mesh=30.0))
    for name, point in (("X", X), ("L", L)):
        found = phonons.frequencies(point)
        values[f"{name} transverse (THz)"], values[f"{name} longitudinal (THz)"] = float(found[0]), float(found[-1])
    values["lowest phonon (THz)"] = phonons.lowest
    values["vacancy (eV)"] = timed("vacancy", lambda: vacancy(teacher, calculator, values["lattice constant (Å)"]))
    distances, function = timed("dynamics", lambda: dynamics(teacher, calculator, folder, md_steps))
    values["first peak of g(r) (Å)"] = float(distances[function.argmax()])
    values["its height"] = float(function.max())
    return {name: float(value) for name, value in values.items()}, seconds


def vacancy(teacher: Teacher, calculator: Any, lattice: float) -> float:
    """``E(N − 1) − E(N) (N − 1)/N`` of 108 atoms, ions relaxed at the lattice constant, eV."""
    perfect = bulk(teacher.symbol, "fcc", a=lattice, cubic=True).repeat(3)
    perfect.calc = calculator
    energy = perfect.get_potential_energy()
    holed = perfect[1:]
    holed.calc = calculator
    return float(relax(holed, fmax=0.002).energy - energy * len(holed) / len(perfect))


def dynamics(teacher: Teacher, calculator: Any, folder: Path, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """g(r) of 32 atoms with a Langevin thermostat, up to half of the cell; the first third is left out."""
    atoms = bulk(teacher.symbol, "fcc", a=teacher.lattice, cubic=True).repeat(2)
    atoms.calc = calculator
    folder.mkdir(parents=True, exist_ok=True)
    settings = MDSettings(
        ensemble="nvt", temperature=teacher.temperature, timestep=4.0, steps=steps, trajectory_interval=5, seed=1
    )
    run_md(atoms, settings, out=folder / "md.extxyz", overwrite=True)
    frames = ase.io.read(folder / "md.extxyz", ":")
    frames = frames[len(frames) // 3 :]
    edges = np.linspace(0.0, atoms.cell.lengths()[0] / 2, 101)
    counts = sum(np.histogram(_pairs(frame), edges)[0] for frame in frames)
    shells = 4 / 3 * np.pi * np.diff(edges**3) * len(atoms) / atoms.get_volume()
    return (edges[:-1] + edges[1:]) / 2, counts / (shells * len(atoms) * len(frames))


def _pairs(atoms: Atoms) -> np.ndarray:
    distances = atoms.get_all_distances(mic=True)
    return distances[~np.eye(len(atoms), dtype=bool)]


def study(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains on one teacher and measures both."""
    teacher, folder = TEACHERS[name], options.out / name
    model, training = train(name, teacher, folder, options)
    truth, teacher_seconds = measure(teacher, teacher.make(), folder / "teacher", options.md_steps)
    learned, seconds = measure(teacher, EScAIPCalculator(model, dtype="float64"), folder / "model", options.md_steps)
    rows = [
        [
            key,
            f"{value:.4g}",
            f"{learned[key]:.4g}",
            f"{100 * (learned[key] / value - 1):+.2f} %" if abs(value) > 1e-2 else "",
        ]
        for key, value in truth.items()
    ]
    errors = training["held_out_mae"]
    print(f"\n{name}: {training['parameters']} parameters, {training['steps']} steps, {training['seconds']:.0f} s")
    print(", ".join(f"{key} {value:.2f}" for key, value in errors.items()))
    print(markdown_table(["property", "teacher", "learned", "off by"], rows))
    print("seconds: " + ", ".join(f"{key} {value:.1f}" for key, value in seconds.items()))
    return {
        "training": training, "teacher": truth, "learned": learned, "teacher_seconds": teacher_seconds,
        "learned_seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/properties"))
    parser.add_argument("--only", choices=tuple(TEACHERS), help="one teacher")
    parser.add_argument("--frames", type=int, default=240, help="to train on")
    parser.add_argument("--steps", type=int, default=3000, help="of training")
    parser.add_argument("--md-steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    found = {name: study(name, options) for name in TEACHERS if options.only in (None, name)}
    write_json(options.out / "properties.json", {"provenance": provenance(), "studies": found})


if __name__ == "__main__":
    main()
