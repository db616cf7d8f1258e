"""Trains on real data for some minutes each and reports errors on what was held out.

    python benchmarks/real_data.py --data ../shared/data --out runs/real_data --minutes 15
    python benchmarks/real_data.py --data ../shared/data --out runs/dry --steps 5 --only inp

Every set is divided once (stores in ``OUT/data``), its step time is measured, the number of steps that fits the time is
fixed, and ``escaip fit`` runs. Run it again after an interruption: finished sets are kept, a started one resumes from
its last checkpoint with the steps it was planned for. Results: ``OUT/real_data.json``, ``OUT/real_data.md``,
``OUT/NAME/curve.png`` and ``OUT/NAME/parity.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from common import provenance, write_json
from real_data_report import draw_curves, held_out_errors, read_log, results_table
from real_data_sets import SETS, SPLIT, RealSet, baselines, prepare

from escaip.files import write_file

ROOT = Path(__file__).resolve().parents[1]
NUM_VALIDATIONS = 8
CALIBRATION_STEPS = (4, 24)
# Part of the time left for optimizer steps that is planned for: the schedule should end before the time does.
SAFETY = 0.93


def fit_arguments(
    chosen: RealSet, stores: Mapping[str, Path], folder: Path, steps: int, changes: Mapping[str, Any] | None = None
) -> list[str]:
    """Arguments of ``escaip`` for a run; validation and checkpoints count steps, not epochs.

    Args:
        chosen: whose recipe.
        stores: of the parts.
        folder: the runs are in ``runs`` there.
        steps: of the optimizer.
        changes: further options by name, and others instead of those here; ``out`` and ``name`` too.
    """
    every = max(1, steps // NUM_VALIDATIONS)
    options = {
        "config": chosen.config,
        "out": folder,
        "name": "runs",
        **{f"data.{part}": path for part, path in stores.items()},
        "trainer.max_steps": steps,
        "trainer.max_epochs": -1,
        "trainer.val_check_interval": every,
        "trainer.check_val_every_n_epoch": "null",
        "trainer.log_every_n_steps": max(1, min(10, every)),
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "checkpoint.every_n_steps": every,
        **(changes or {}),
    }
    return ["fit", *(text for key, value in options.items() for text in (f"--{key}", str(value)))]


def fit_command(chosen: RealSet, stores: Mapping[str, Path], folder: Path, steps: int) -> list[str]:
    """The same as a command line."""
    return [sys.executable, "-m", "escaip", *fit_arguments(chosen, stores, folder, steps)]


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, of one validation and of the start-up."""

    step: float
    validation: float
    start: float


def measure(chosen: RealSet, stores: dict[str, Path], folder: Path, threads: int) -> Timing:
    """Three short runs: few steps, more steps, few steps with one validation."""
    few, more = CALIBRATION_STEPS
    taken = []
    for steps, validations in ((few, 0), (more, 0), (few, 1)):
        command = fit_command(chosen, stores, folder / "calibration", steps)
        command += ["--trainer.enable_checkpointing", "false", "--trainer.val_check_interval", str(steps)]
        if not validations:
            command += ["--trainer.limit_val_batches", "0"]
        began = time.perf_counter()
        call(command, folder / "calibration.log", threads)
        taken.append(time.perf_counter() - began)
    shutil.rmtree(folder / "calibration", ignore_errors=True)
    step = max((taken[1] - taken[0]) / (more - few), 1e-3)
    return Timing(step, max(taken[2] - taken[0], 0.0), max(taken[0] - few * step, 0.0))


def call(command: list[str], log: Path, threads: int) -> None:
    """Runs a command with its output in a file.

    Raises:
        SystemExit: it failed; the end of its output is shown.
    """

    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        done = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-8:])
        raise SystemExit(f"real_data: {log} ended with status {done.returncode}:\n{tail}")


def train(chosen: RealSet, stores: dict[str, Path], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a set, or finishes what was begun; returns its plan with the time it took."""
    plan_file = folder / "plan.json"
    if plan_file.is_file():
        plan = json.loads(plan_file.read_text(encoding="utf-8"))
    else:
        plan = make_plan(chosen, stores, folder, options)
        write_json(plan_file, plan)
    if plan["finished"]:
        return plan
    command = fit_command(chosen, stores, folder, plan["steps"])
    if plan["minutes_allowed"] is not None:
        command += ["--trainer.max_time", wall_clock(plan["minutes_allowed"])]
    saved = [path.stat().st_mtime for path in (folder / "runs").glob("version_*/last.ckpt")]
    if saved:
        command += ["--ckpt_path", "last"]
    if plan["began"] is not None:  # an earlier session was killed: it counts up to its last checkpoint
        plan["seconds"] += max(max(saved, default=0.0) - plan["began"], 0.0)
    print(f"{chosen.name}: {'resuming' if saved else 'training'}, {plan['steps']} steps", flush=True)
    plan["began"] = time.time()
    write_json(plan_file, plan)
    try:
        call(command, folder / "fit.log", options.threads)
        plan["finished"] = True
    finally:
        plan["seconds"] += time.time() - plan["began"]
        plan["began"] = None
        plan["command"] = shlex.join(command[1:]).replace(f"{ROOT}/", "")
        write_json(plan_file, plan)
    return plan


def make_plan(chosen: RealSet, stores: dict[str, Path], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Number of steps that fits the time, or the number asked for."""
    plan = {"finished": False, "seconds": 0.0, "began": None, "minutes_allowed": None, "steps": options.steps}
    if options.steps is None:
        print(f"{chosen.name}: measuring the time of a step", flush=True)
        timing = measure(chosen, stores, folder, options.threads)
        plan.update(timing=asdict(timing), minutes_allowed=options.minutes)
        plan["steps"] = steps_within(60.0 * options.minutes, timing)
    return plan


def steps_within(seconds: float, timing: Timing) -> int:
    """Steps that fit with start-up and validations, a multiple of the number of validations."""
    available = SAFETY * (seconds - timing.start - NUM_VALIDATIONS * timing.validation)
    return NUM_VALIDATIONS * max(1, math.floor(available / timing.step / NUM_VALIDATIONS))


def wall_clock(minutes: float) -> str:
    """``DD:HH:MM:SS``, as Lightning reads it."""
    total = int(timedelta(minutes=minutes).total_seconds())
    return f"{total // 86400:02d}:{total // 3600 % 24:02d}:{total // 60 % 60:02d}:{total % 60:02d}"


def best_checkpoint(runs: Path) -> Path:
    """The newest ``best.ckpt``, which is the best of all since a resumed run continues the search."""
    return max(runs.glob("version_*/best.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def report(
    chosen: RealSet, stores: dict[str, Path], folder: Path, plan: dict[str, Any], max_atoms: int
) -> dict[str, Any]:
    """Everything about one finished run, as plain values; plots go to its folder."""
    log = read_log(folder / "runs")
    write_file(folder / "curve.png", draw_curves(log, chosen.what))
    split = json.loads((stores["test"].parent / SPLIT).read_text(encoding="utf-8"))
    return {
        "what": chosen.what,
        "command": plan["command"],
        "minutes": plan["seconds"] / 60,
        "steps": max(log["train/loss"], default=-1) + 1,
        "steps_planned": plan["steps"],
        "timing": plan.get("timing"),
        "split": split,
        "baselines": baselines(stores, chosen.free_atoms_only),
        "test": held_out_errors(
            best_checkpoint(folder / "runs"),
            stores["test"],
            folder,
            free_atoms_only=chosen.free_atoms_only,
            max_atoms=max_atoms,
        ),
        "validation": {name: sorted(curve.items()) for name, curve in log.items() if name.startswith("val/")},
    }


def main() -> None:
    """Trains and reports the sets asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("runs/real_data"), help="default: runs/real_data")
    parser.add_argument("--only", choices=sorted(SETS), action="append", help="may be repeated; default: all")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training, each (default: 15)")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of minutes, for a dry run")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--max-atoms", type=int, default=500, help="per batch in the evaluation (default: 500)")
    options = parser.parse_args()
    out = options.out.resolve()
    # One file for each set, so that the sets can be run one by one.
    for name in options.only or SETS:
        chosen, folder = SETS[name], out / name
        stores = prepare(chosen, options.data.resolve(), out / "data")
        plan = train(chosen, stores, folder, options)
        entry = report(chosen, stores, folder, plan, options.max_atoms)
        write_json(folder / "result.json", {"provenance": provenance(), **entry})
        mae, trivial = entry["test"]["mae"], entry["baselines"]["linear"]
        print(f"{name}: force MAE {mae['forces']:.1f} meV/Å, of zero forces {trivial['forces']:.1f}", flush=True)
    files = {name: out / name / "result.json" for name in SETS}
    results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}
    write_json(out / "real_data.json", {"provenance": provenance(), "results": results})
    write_file(out / "real_data.md", f"{results_table(results)}\n".encode())
    print(results_table(results))


if __name__ == "__main__":
    main()
