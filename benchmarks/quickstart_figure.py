"""Draws docs/images/quickstart.png from what ``make quickstart`` leaves: force parity and the energy of the NVE run.

python benchmarks/quickstart_figure.py [--run runs/quickstart/latest] [--out docs/images/quickstart.png]
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from escaip import load_potential
from escaip.evaluate import evaluate
from escaip.train.cli import build


def draw_parity(axes: Axes, run: Path) -> None:
    """Force components of the held-out structures, colored by density."""
    cli = build(["fit", "--config", str(run / "config.yaml")])
    cli.datamodule.setup("fit")
    held_out = cli.datamodule.datasets["val"]
    potential = load_potential(run / "best.ckpt", device="cpu")
    report, records = evaluate(potential, [held_out[index] for index in range(len(held_out))])
    assert report.forces is not None
    label, predicted = records.labels["forces"].ravel(), records.predictions["forces"].ravel()
    limit = 1.05 * float(np.abs(label).max())
    axes.plot([-limit, limit], [-limit, limit], color="0.6", linewidth=0.8, zorder=0)
    image = axes.hexbin(label, predicted, gridsize=70, bins="log", mincnt=1, linewidths=0.1, cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="force components", fraction=0.046, pad=0.03)
    zero = report.forces.baselines["zero"].mae
    text = f"MAE {1e3 * report.forces.errors.mae:.0f} meV/Å\npredicting zero {1e3 * zero:.0f} meV/Å"
    axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top")
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axes.set(xlabel="GFN2-xTB force (eV/Å)", ylabel="predicted force (eV/Å)", title="held-out conformations")


def draw_energy(axes: Axes, log: Path, num_atoms: int) -> None:
    """Total and potential energy per atom along the run, from their first values."""
    with log.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    time = np.array([float(row["time_fs"]) for row in rows]) / 1e3
    for column, label in (("potential_energy_eV", "potential"), ("total_energy_eV", "total")):
        energy = np.array([float(row[column]) for row in rows])
        axes.plot(time, 1e3 * (energy - energy[0]) / num_atoms, label=label, linewidth=1.0)
    axes.set(xlabel="time (ps)", ylabel="energy change (meV/atom)", title="ethanol, NVE")
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.22))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart/latest"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/quickstart.png"))
    args = parser.parse_args()

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), constrained_layout=True)
    draw_parity(left, args.run)
    draw_energy(right, args.run / "nve.csv", 9)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    aside = args.out.with_name(f".{args.out.name}.part")
    figure.savefig(aside, format="png", dpi=130)
    os.replace(aside, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
