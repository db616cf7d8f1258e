"""One training of gpu/training.py, in a process of its own: times its steps, plans, trains, evaluates.

    python benchmarks/gpu/fitting.py JOB.json [--evaluate]

What ``escaip fit`` does, in this process, so that the memory of the GPU can be asked for and its start-up is paid once.
Everything goes to the folder of the job: ``trained.json`` before and after the training, ``errors.json``,
``NAME.escaip.xz``. ``--evaluate`` leaves the training out: of a run that was cut, what it has is evaluated.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from common import write_json
from gpu.pack import compress
from gpu.runner import reason
from lightning.pytorch import Callback, LightningModule, Trainer
from real_data import Timing, best_checkpoint, fit_arguments, steps_within, wall_clock
from real_data_report import held_out_errors
from real_data_sets import SETS, RealSet, divided

from escaip.graph import search_cutoff
from escaip.models import EScAIPConfig
from escaip.train.callbacks import BestAndLast
from escaip.train.cli import build

BASE = "1m"  # the size of the recipes
# A GPU takes some hundred atoms in the time of a few. The learning rate of Adam rises with the square root of the batch
# where the noise of the gradient limits it (arXiv 2205.10287); those of the recipes are not far from the largest that
# are stable, so that it rises with the fourth root.
BATCH = 4.0
RATE = BATCH**0.25
TRAINED, ERRORS, REPORT = "trained.json", "errors.json", "evaluation.json"
HORIZON = 100_000  # steps of the schedule while steps are timed: the rate stays at the beginning of its rise
SMALL_STEPS, SMALL_STRUCTURES = 6, 12


@dataclass(frozen=True)
class Job:
    """What a process is told.

    Attributes:
        name: of the run.
        set: in ``real_data_sets.SETS``.
        size: preset of the model.
        data: folder of the divided data.
        folder: of the run.
        device: ``cuda`` or ``cpu``.
        deadline: when it has to have ended, as :func:`time.time` has it.
        together: folders of the runs that start with it; steps are timed once all are ready.
        compiled: the model.
        small: few steps, few test structures.
    """

    name: str
    set: str
    size: str
    data: str
    folder: str
    device: str
    deadline: float
    together: tuple[str, ...] = ()
    compiled: bool = False
    small: bool = False

    @property
    def chosen(self) -> RealSet:
        """The set itself."""
        return SETS[self.set]

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    @property
    def stores(self) -> dict[str, Path]:
        """Of each part."""
        stores = divided(self.chosen, Path(self.data))
        if stores is None:
            raise FileNotFoundError(f"{self.data} has no divided {self.chosen.folder}: run benchmarks/gpu/pack.py")
        return stores

    @property
    def checkpoint(self) -> Path:
        """The model as it travels."""
        return self.path / f"{self.name}.escaip.xz"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()


def changes(job: Job) -> dict[str, Any]:
    """What a run changes in the recipe of its set, by option of ``escaip fit``."""
    recipe = yaml.safe_load(job.chosen.config.read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "model.architecture.preset": job.size,
        "model.compile": str(job.compiled).lower(),
        "evaluation.max_structures": 0,  # of the validation part: the test part is evaluated here
        "trainer.enable_checkpointing": "false",  # see BestOnly
    }
    if job.small:
        found |= {"trainer.limit_val_batches": 1, "trainer.val_check_interval": SMALL_STEPS // 2}
    if job.size != BASE:  # its wider layers learn slower, as its rate was found at the width of the base
        found["model.base_width"] = EScAIPConfig.PRESETS[BASE]["hidden_size"]
    if job.device == "cuda":
        config = EScAIPConfig.from_dict({**recipe["model"]["architecture"], "preset": job.size})
        found |= {
            "trainer.accelerator": "gpu",
            "trainer.devices": 1,
            "data.max_atoms": round(BATCH * recipe["data"]["max_atoms"]),
            "model.learning_rate": float(f"{RATE * recipe['model']['learning_rate']:.3g}"),
            # Neighbors are searched on a CPU: in a process beside the one that launches kernels, and a little farther
            # than the cutoff, since those just beyond it count in the soft ranks.
            "data.num_workers": 1,
            "data.neighbor_cutoff": search_cutoff(config.graph),
        }
    return found


class Clock(Callback):
    """Times steps and validations, counts atoms, and ends a run once enough steps were timed.

    Args:
        warm_up: first steps, which do not count: kernels are compiled, memory is taken.
        enough: steps and seconds after which to end; None to go on.
    """

    def __init__(self, warm_up: int = 0, enough: tuple[int, float] | None = None) -> None:
        self._warm_up, self._enough = warm_up, enough
        self._last: float | None = None
        self._validation_began = 0.0
        self.intervals: list[float] = []
        self.atoms, self.validation_seconds = 0, 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The loss was logged, so the device has finished the step."""
        now = time.perf_counter()
        if self._last is not None and trainer.global_step > self._warm_up:
            self.intervals.append(now - self._last)
            self.atoms += int(batch.positions.shape[0])
        self._last = now
        if self._enough is not None and len(self.intervals) >= self._enough[0]:
            trainer.should_stop |= sum(self.intervals) >= self._enough[1]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends; the next interval would hold it, and is left out."""
        self.validation_seconds += time.perf_counter() - self._validation_began
        self._last = None


class BestOnly(BestAndLast):
    """Writes the best checkpoint alone: runs are not resumed, and an epoch of some seconds would write 70 MB (5m)."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Nothing."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing."""


def measure(job: Job, options: Mapping[str, Any]) -> Timing:
    """Times steps, beside those of the runs that started at the same time, and one validation with its checkpoint."""
    began = time.perf_counter()
    folder = job.path / "calibration"
    quiet = {"trainer.val_check_interval": HORIZON, "trainer.log_every_n_steps": 100}
    cli = build(fit_arguments(job.chosen, job.stores, folder, HORIZON, {**options, **quiet}))
    start = time.perf_counter() - began
    gpu = job.device == "cuda"
    clock = Clock(warm_up=10 if gpu else 2, enough=(1, 0.0) if job.small else (20 if gpu else 8, 0.05 * job.left))
    cli.trainer.callbacks.append(clock)
    wait_for(job)
    cli.execute()
    began = time.perf_counter()
    cli.trainer.save_checkpoint(folder / "calibration.ckpt", weights_only=False)
    validation = clock.validation_seconds + time.perf_counter() - began
    shutil.rmtree(folder, ignore_errors=True)
    return Timing(statistics.median(clock.intervals), validation, start)


def wait_for(job: Job) -> None:
    """Says that this run is ready, and waits until the others are, or for a tenth of its time."""
    (job.path / "ready").touch()
    last = time.time() + 0.1 * job.left
    while time.time() < last and not all((Path(folder) / "ready").exists() for folder in job.together):
        time.sleep(0.05)


def train(job: Job) -> None:
    """Trains for the time there is; steps, seconds, speed and memory go to ``trained.json``."""
    options = changes(job)
    timing = measure(job, options)
    # Neither evaluating the test part nor writing the model may come too late.
    stores = job.stores
    atoms = {part: json.loads((stores[part] / "manifest.json").read_text())["num_atoms"] for part in ("val", "test")}
    evaluation = timing.validation * (1.0 + 2.0 * atoms["test"] / atoms["val"])  # and the last validation
    reserve = evaluation + (4.0 if job.size == BASE else 15.0)
    steps = SMALL_STEPS if job.small else steps_within(job.left - reserve, timing)
    options["trainer.max_time"] = wall_clock(max(job.left - reserve, 10.0) / 60)
    arguments = fit_arguments(job.chosen, stores, job.path, steps, options)
    cli = build(arguments)
    clock = Clock(warm_up=1)
    cli.trainer.callbacks += [clock, BestOnly()]
    row = {
        "steps": 0,
        "steps_planned": steps,
        "train_s": None,
        "planned_ms": 1e3 * timing.step,
        "step_ms": None,
        "atoms_per_s": None,
        "peak_MiB": None,
        "max_atoms": cli.config["fit"].data.max_atoms,
        "learning_rate": cli.model.learning_rate,
        "parameters": sum(parameter.numel() for parameter in cli.model.parameters()),
        "failed": f"cut before its {steps} steps",
    }
    write_json(job.path / TRAINED, row)
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    row["failed"] = None
    try:
        cli.execute()
    except Exception as error:  # what it has by then is evaluated all the same
        row["failed"] = reason(error)
    row |= {"steps": int(cli.trainer.global_step), "train_s": time.perf_counter() - began}
    if clock.intervals:
        row["step_ms"] = 1e3 * statistics.median(clock.intervals)
        row["atoms_per_s"] = clock.atoms / sum(clock.intervals)
    if job.device == "cuda":
        row["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20
    if row["failed"] is None and row["steps"] < steps:
        row["failed"] = "stopped by the time: its learning rate had not come down"
    write_json(job.path / TRAINED, row)


def evaluate(job: Job) -> None:
    """Errors of the averaged weights of the best checkpoint on the test part, meV/atom, meV/Å, meV/Å³.

    The whole report goes to ``evaluation.json``, the model to ``NAME.escaip.xz``.
    """
    from escaip import load_potential

    checkpoint = best_checkpoint(job.path / "runs")
    found = held_out_errors(
        checkpoint, job.stores["test"], job.path, free_atoms_only=job.chosen.free_atoms_only, max_atoms=None,
        device=job.device, limit=SMALL_STRUCTURES if job.small else None,
    )  # fmt: skip
    report, mae = found["report"], found["mae"]
    errors = {
        "energy": mae["energy"],
        "energy_within_groups": mae["energy_within_groups"],
        "forces": mae["forces"],
        "forces_rmse": 1e3 * report["forces"]["errors"]["rmse"],
        "zero_forces_rmse": 1e3 * report["forces"]["baselines"]["zero"]["rmse"],
        "stress": mae.get("stress"),
    }
    if not math.isfinite(sum(error for error in errors.values() if error is not None)):
        raise FloatingPointError("predictions for the test part are not finite")
    write_json(job.path / ERRORS, errors)
    write_json(job.path / REPORT, {"by_file": found["by_file"], **report})
    plain = job.path / f"{job.name}.escaip"
    load_potential(checkpoint, device="cpu").save(plain)
    compress(plain, job.checkpoint)


def main(file: str, *options: str) -> None:
    job = Job(**json.loads(Path(file).read_text(encoding="utf-8")))
    if "--evaluate" not in options:
        train(job)
    if any((job.path / "runs").glob("version_*/best.ckpt")):
        evaluate(job)


if __name__ == "__main__":
    main(*sys.argv[1:])
