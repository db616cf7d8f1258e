"""``make quickstart``, also ``python -m escaip.quickstart``: the way from sample data to molecular dynamics.

Runs the commands that a user would type, and prints each before it runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from escaip.cli import main as escaip
from escaip.errors import DataError, EscaipError
from escaip.resources import resource_dir

RECIPE = "quickstart"
MD_STEPS = 1000
MD_TIMESTEP = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, evaluates on molecules held out, relaxes a molecule and runs it at constant energy.

    Args:
        argv: ``--out DIR`` and overrides for ``escaip fit``; by default those of the process.

    Returns:
        Exit status of the first command that fails, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m escaip.quickstart", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="runs", help="where runs are kept (default: runs)")
    parser.add_argument("--md-steps", type=int, default=MD_STEPS, help=f"of {MD_TIMESTEP} fs (default: {MD_STEPS})")
    args, overrides = parser.parse_known_args(argv)
    started = time.perf_counter()
    run = Path(args.out) / RECIPE / "latest"
    status = _command("fit", "--config", RECIPE, "--out", args.out, *overrides)
    if status == 0:
        try:
            held_out = write_held_out(run)
        except EscaipError as error:
            print(f"escaip: error: {error}", file=sys.stderr)
            return 1
        status = _simulate(run, held_out, args.md_steps)
    if status == 0:
        draw_picture(run)
        print(f"\nquickstart done in {time.perf_counter() - started:.0f} s; what it made is in {run}")
    return status


def write_held_out(run: Path) -> Path:
    """Writes the structures of a run's validation set to ``validation.extxyz`` in its folder.

    Raises:
        DataError: the file cannot be written.
        EscaipError: the run's configuration or data cannot be read.
    """
    from ase.io import write

    from escaip.train.cli import build

    training = build(["validate", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/best.ckpt"])
    training.datamodule.setup("validate")
    dataset = training.datamodule.datasets["val"]
    path = run / "validation.extxyz"
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(aside, [dataset[index].to_ase() for index in range(len(dataset))], format="extxyz")
        os.replace(aside, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}: choose another --out") from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def draw_picture(run: Path) -> Path:
    """Puts the parity plot and the energies of the constant-energy run side by side in ``quickstart.png``."""
    import numpy as np
    from ase.io import read
    from matplotlib.figure import Figure
    from matplotlib.image import imread, imsave

    log = np.genfromtxt(run / "nve.csv", delimiter=",", names=True)
    per_atom = 1e3 / len(read(run / "ethanol.extxyz"))
    figure = Figure(figsize=(4.6, 4.4), dpi=150, layout="constrained")
    axis = figure.subplots()
    for column, name in (("potential_energy_eV", "potential"), ("conserved_energy_eV", "total")):
        axis.plot(log["time_fs"], per_atom * (log[column] - log[column][0]), label=name)
    axis.set(xlabel="time (fs)", ylabel="energy − start (meV/atom)", title="Ethanol at constant energy")
    axis.legend(frameon=False)
    trace, path = run / ".trace.png", run / "quickstart.png"
    figure.savefig(trace)
    left, right = imread(run / "evaluation" / "parity.png"), imread(trace)
    trace.unlink()
    aside = run / f".quickstart.{os.getpid()}.png"
    imsave(aside, np.concatenate([left[..., :3], right[..., :3]], axis=1))
    os.replace(aside, path)
    return path


def _simulate(run: Path, held_out: Path, steps: int) -> int:
    model, relaxed = f"{run}/best.ckpt", f"{run}/ethanol.extxyz"
    ethanol = str(resource_dir("md") / "structures" / "ethanol.xyz")
    # Half of the kinetic energy of a relaxed molecule becomes potential energy: 600 K drawn are 300 K on average.
    # Double precision, so that the drift is the potential's and not rounding's.
    dynamics = ["--ensemble", "nve", "--temperature", "600", "--timestep", str(MD_TIMESTEP), "--steps", str(steps)]
    return (
        _command("evaluate", model, str(held_out), "--out", f"{run}/evaluation")
        or _command("relax", model, ethanol, "--dtype", "float64", "--out", relaxed)
        or _command("md", model, relaxed, *dynamics, "--dtype", "float64", "--out", f"{run}/nve.extxyz", "--overwrite")
    )


def _command(*arguments: str) -> int:
    print(f"\n$ escaip {shlex.join(arguments)}", flush=True)
    return escaip(list(arguments))


if __name__ == "__main__":
    sys.exit(main())
