"""What each precision does to energies, forces and the conservation of energy, beside float64 with the same weights.

python benchmarks/precision.py [--model runs/quickstart/latest/best.ckpt ...] [--device cuda] [--out FILE]

Molecules and crystals are rattled and of elements that the model knows. The runs at constant energy start from one
structure with the same velocities; their energy is taken once as the run itself saw it and once in float64, which tells
noise of the energies from heat that wrong forces bring in. Models with random weights are not run.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import torch
from ase import Atoms
from common import markdown_table, measure, provenance, write_json

from escaip import EScAIPCalculator, EScAIPConfig, Potential, load_potential
from escaip.data import AtomicData, collate
from escaip.simulate import MDSettings, read_structure, run_md
from escaip.simulate.analysis import energy_drift

START = Path(__file__).resolve().parents[1] / "md" / "structures" / "ethanol.xyz"
MOLECULES = ("CH3CH2OH", "CH3COOH", "C6H6", "CH3CONH2", "CH3CN", "C2H4", "H2O", "CO2", "isobutane", "trans-butane")
TEMPERATURE, TIMESTEP, LOG_INTERVAL = 300.0, 0.5, 10


@dataclass(frozen=True)
class Precision:
    """One row: the dtype of the model and how its products are taken."""

    dtype: torch.dtype
    products: str = "highest"

    def potential(self, source: Potential, device: str) -> Potential:
        """A copy in this precision."""
        made = copy.deepcopy(source).to(device, self.dtype).eval().requires_grad_(False)
        made.precision = self.products
        return made


def precisions(device: str) -> dict[str, Precision]:
    """Float64 first: the others are compared with it."""
    rows = {"float64": Precision(torch.float64), "float32": Precision(torch.float32)}
    if device == "cuda":
        rows["tf32"] = Precision(torch.float32, "tf32")
    return {**rows, **{name: Precision(torch.float32, name) for name in ("float16", "bfloat16")}}


def structures(potential: Potential) -> dict[str, list[Atoms]]:
    """Molecules and crystals, rattled by 0.05 Å."""
    known = set(potential.metadata.elements) or set(range(1, 119))
    molecules = [ase.build.molecule(name) for name in MOLECULES]
    crystals = [
        ase.build.bulk("C", "diamond", a=3.57, cubic=True).repeat((2, 2, 2)),
        ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True),
        ase.build.bulk("Cu", "fcc", a=3.6, cubic=True).repeat((3, 3, 3)),
    ]
    found = {}
    for kind, group in (("molecules", molecules), ("crystals", crystals)):
        found[kind] = [atoms for atoms in group if set(atoms.numbers) <= known]
        for seed, atoms in enumerate(found[kind]):
            atoms.rattle(0.05, seed=seed)
    return {kind: group for kind, group in found.items() if group}


def errors(found: list[Any], expected: list[Any]) -> dict[str, float]:
    """Of energies in meV/atom and forces in meV/Å."""
    energy = torch.stack([(f.energy - e.energy).sum() / len(e.forces) for f, e in zip(found, expected, strict=True)])
    force = torch.cat([f.forces.double() - e.forces for f, e in zip(found, expected, strict=True)])
    rms = {"energy_rms": energy, "force_rms": force}
    return {
        **{name: 1e3 * float(x.square().mean().sqrt()) for name, x in rms.items()},
        "energy_max": 1e3 * float(energy.abs().max()),
        "force_max": 1e3 * float(force.norm(dim=1).max()),
    }


def seconds_of(function: Callable[[], Any], device: str) -> float:
    """Median of five; on a CPU of the time that this process had, since others may share the core."""
    if device == "cuda":
        return measure(function, device=device)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def accuracy(name: str, source: Potential, device: str) -> list[dict[str, Any]]:
    """A row for each precision and kind of structure."""
    rows = []
    for kind, group in structures(source).items():
        batches = [collate([AtomicData.from_ase(atoms)]).to(device) for atoms in group]
        largest = max(batches, key=lambda batch: len(batch.positions))
        expected: list[Any] = []
        for label, precision in precisions(device).items():
            potential = precision.potential(source, device)
            found = [potential(batch) for batch in batches]
            seconds = seconds_of(partial(potential, largest), device)
            expected = expected or found
            forces = torch.cat([x.forces for x in expected])
            rows.append({
                "model": name, "structures": kind, "precision": label, "count": len(group),
                "forces_meV_per_A": 1e3 * float(forces.square().mean().sqrt()), **errors(found, expected),
                "atoms": len(largest.positions), "ms": 1e3 * seconds,
            })  # fmt: skip
    return rows


def dynamics(
    name: str, source: Potential, device: str, picoseconds: float, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Runs at constant energy, a row for each precision: what became of the energy, in meV/atom (and per ps)."""
    exact = EScAIPCalculator(precisions(device)["float64"].potential(source, device))
    rows = []
    for label, precision in precisions(device).items():
        row: dict[str, Any] = {"model": name, "precision": label, "runs": []}
        for seed in seeds:
            atoms = read_structure(START)
            atoms.calc = EScAIPCalculator(precision.potential(source, device))
            settings = MDSettings(
                steps=round(1e3 * picoseconds / TIMESTEP), timestep=TIMESTEP, temperature=TEMPERATURE, seed=seed,
                log_interval=LOG_INTERVAL, trajectory_interval=LOG_INTERVAL,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                result = run_md(atoms, settings, out=Path(folder) / "nve.traj")
                frames = ase.io.read(result.trajectory, ":")
            true = [exact.get_potential_energy(frame) + frame.get_kinetic_energy() for frame in frames]
            times = TIMESTEP * LOG_INTERVAL * np.arange(len(true), dtype=np.float64)
            found = energy_drift(times, np.array(true, dtype=np.float64), len(atoms))
            assert result.drift is not None
            assert found is not None
            row["runs"].append({
                "seed": seed, "drift": result.drift.slope, "fluctuation": result.drift.fluctuation,
                "drift_in_float64": found.slope, "fluctuation_in_float64": found.fluctuation,
            })  # fmt: skip
        rows.append(row)
    return rows


def summary(row: dict[str, Any]) -> list[str]:
    """Mean over the runs and its standard error."""

    def show(key: str) -> str:
        values = [run[key] for run in row["runs"]]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return f"{statistics.mean(values):+.3g} ± {error:.1g}"

    fluctuation = statistics.mean(run["fluctuation"] for run in row["runs"])
    return [row["model"], row["precision"], show("drift"), show("drift_in_float64"), f"{fluctuation:.3g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="a trained model; may be repeated")
    parser.add_argument("--presets", nargs="*", default=["1m", "5m"], help="models with random weights")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--picoseconds", type=float, default=1.0, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the velocities of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/precision.json"))
    args = parser.parse_args()

    torch.manual_seed(0)
    models = {path: load_potential(path, device="cpu") for path in args.model}
    fresh = {f"{name}, random weights": Potential(EScAIPConfig.preset(name)) for name in args.presets}
    rows = [row for name, potential in {**models, **fresh}.items() for row in accuracy(name, potential, args.device)]
    runs = [
        row
        for name, potential in models.items()
        for row in dynamics(name, potential, args.device, args.picoseconds, args.seeds)
    ]
    shown = ["model", "structures", "precision", "energy_rms", "energy_max", "force_rms", "force_max", "ms"]
    print(
        markdown_table(
            shown, [[f"{row[k]:.2g}" if isinstance(row[k], float) else row[k] for k in shown] for row in rows]
        )
    )
    header = ["model", "precision", "drift (meV/atom/ps)", "drift of the float64 energy", "fluctuation (meV/atom)"]
    print(markdown_table(header, [summary(row) for row in runs]))
    write_json(args.out, {"provenance": provenance(), "accuracy": rows, "dynamics": runs})


if __name__ == "__main__":
    main()
