"""One run of a study, in a process of its own: ``python -m escaip.scaling.job DIR ID``."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from escaip.errors import DataError, EscaipError, TrainingError
from escaip.scaling.files import claim, write_whole
from escaip.scaling.plan import Job
from escaip.scaling.records import Record

RECORD, JOB, LOG = "record.json", "job.json", "log.txt"
SAMPLE = 256
"""Structures in which edges are counted, evenly through the training set."""

# What a validation logs -> name and unit of a record.
_METRICS = {
    "loss": ("loss", 1.0),
    "energy_mae_meV_per_atom": ("energy_mae", 1e-3),
    "force_mae_meV_per_A": ("forces_mae", 1e-3),
    "stress_mae_meV_per_A3": ("stress_mae", 1e-3),
}


def folder_of(study: Path, job_id: str) -> Path:
    """Where a run keeps everything."""
    return study / "jobs" / job_id


def read_job(study: Path, job_id: str) -> Job:
    """Reads what the runner wrote.

    Raises:
        DataError: there is no such run.
    """
    file = folder_of(study, job_id) / JOB
    if not file.is_file():
        raise DataError(f"{study} has no run {job_id}: start it by escaip scaling run")
    return Job(**json.loads(file.read_text(encoding="utf-8")))


def train(study: Path, job: Job) -> Record:
    """Trains, from the last checkpoint where there is one, and writes the record.

    A run whose loss or predictions are no longer finite is recorded without losses.
    """
    import yaml

    from escaip.train.cli import build

    folder = folder_of(study, job.id)
    began = time.time()
    write_whole(folder / "config.yaml", yaml.safe_dump(dict(job.config), sort_keys=False, allow_unicode=True))
    arguments = ["fit", "--config", str(folder / "config.yaml"), "--out", str(folder), "--name", "run"]
    if job.budget is not None:
        arguments += [
            "--trainer.max_steps",
            str(_steps_within(job.budget, build(arguments))),
            "--trainer.max_epochs=-1",
        ]
    if any((folder / "run").glob("version_*/last.ckpt")):
        arguments += ["--ckpt_path", "last"]
    cli = build(arguments)
    finite = True
    try:
        cli.execute()
    except TrainingError as error:
        print(f"diverged: {error}", flush=True)
        finite = False
    record = _record(job, cli, folder, finite, time.time() - began)
    if cli.trainer.is_global_zero:
        write_whole(folder / RECORD, record.to_json() + "\n")
    return record


def _cost(cli: Any) -> tuple[Any, Any, float]:
    """Shape of a mean training structure, the training set, and structures in a step."""
    from escaip.scaling.shapes import mean_shape

    data = cli.datamodule.datasets["train"]
    chosen = sorted({round(i * (len(data) - 1) / max(1, SAMPLE - 1)) for i in range(SAMPLE)})
    shape = mean_shape((data[index] for index in chosen), cli.model.potential.config.graph)
    batches = len(cli.datamodule.train_dataloader())
    accumulated = int(cli.trainer.accumulate_grad_batches)
    return shape, data, len(data) / batches * accumulated


def _flops(cli: Any, steps: int) -> tuple[float, Any]:
    """FLOPs of so many steps of a run, and its training set."""
    from escaip.scaling.flops import training_flops

    shape, data, per_step = _cost(cli)
    config, mode = cli.model.potential.config, _mode(cli)
    return training_flops(config, shape, batch_size=per_step, steps=steps, mode=mode).total, data


def _mode(cli: Any) -> str:
    """What a step of training differentiates."""
    losses = cli.model.losses
    return "training" if losses.forces.weight > 0 or losses.stress.weight > 0 else "energy_training"


def _profiled(cli: Any) -> float:
    """A training step on two structures, run under PyTorch's counter, over what the formula says; on the CPU."""
    from escaip.data import collate
    from escaip.scaling.flops import count_flops, profile_flops

    data, config = cli.datamodule.datasets["train"], cli.model.potential.config
    two = collate([data[0], data[len(data) // 2]])
    return profile_flops(config, two, _mode(cli)) / count_flops(config, two, _mode(cli))


def _steps_within(budget: float, cli: Any) -> int:
    """Steps that spend a budget."""
    cli.datamodule.setup("fit")
    one = _flops(cli, 1)[0]
    steps = round(budget / one)
    if steps < 1:
        raise DataError(
            f"a budget of {budget:.3g} FLOPs is less than one step, {one:.3g}: raise it, or leave the size out"
        )
    return steps


def _record(job: Job, cli: Any, folder: Path, finite: bool, seconds: float) -> Record:
    from escaip.scaling.flops import parameter_count

    steps = max(1, int(cli.trainer.global_step))
    flops, data = _flops(cli, steps)
    rows = read_validations(folder / "run", steps)
    curve = [(float(step), flops * step / steps, row["val/loss"]) for step, row in rows.items() if "val/loss" in row]
    count = parameter_count(cli.model.potential.config)
    batches = len(cli.datamodule.train_dataloader())
    epochs = steps * int(cli.trainer.accumulate_grad_batches) / batches
    seen = min(1.0, epochs)  # a budget may end before all data were seen: D is what the run has learned from
    return Record(
        id=job.id, variant=job.variant, size=job.size, seed=job.seed, parameters=count.non_embedding,
        parameters_total=count.total, structures=max(1, round(seen * len(data))),
        atoms=max(1, round(seen * int(sum(data.natoms)))), epochs=epochs, steps=steps, flops=flops,
        learning_rate=job.learning_rate, losses=_losses(rows) if finite else {},
        curve=tuple(point for point in curve if math.isfinite(point[2])), seconds=seconds, commit=version(),
        config=dict(job.config), profiled=_profiled(cli),
    )  # fmt: skip


def _losses(rows: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """The last validation; it is of the averaged weights where the recipe averages them."""
    if not rows:
        raise DataError("a run has validated nothing: name data.val, or let data.split make it")
    last = rows[max(rows)]
    found = {new: last[f"val/{old}"] * unit for old, (new, unit) in _METRICS.items() if f"val/{old}" in last}
    return {name: value for name, value in found.items() if math.isfinite(value) and value > 0}


def read_validations(run: Path, steps: int) -> dict[int, dict[str, float]]:
    """Step to what was logged of the validation after it; of a resumed run the later part counts.

    A line that a killed process left unfinished is not read. Validations within a run are logged under the step before,
    one after its end under the last, ``steps``.
    """
    found: dict[int, dict[str, float]] = {}
    folders = sorted(run.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    for folder in folders:
        file = folder / "metrics.csv"
        if not file.is_file():
            continue
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                values = {k: v for k, v in row.items() if k and v and k.startswith("val/")}
                if not values or not row.get("step") or None in row:
                    continue
                found[min(int(row["step"]) + 1, steps)] = {key: float(value) for key, value in values.items()}
    return dict(sorted(found.items()))


def version() -> str:
    """Commit of the code that runs, else its version."""
    import subprocess

    from escaip import __version__

    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return __version__
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or __version__


def _end_with_parent() -> None:
    """A killed study takes its runs with it, on Linux: they would go on, and be started a second time."""
    if sys.platform.startswith("linux"):
        import ctypes

        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def main(argv: list[str]) -> int:
    """Runs a job by its id, or by its place in the list of a SLURM array."""
    study, name = Path(argv[0]), argv[1]
    try:
        if "--array" in argv:
            name = (study / argv[1]).read_text(encoding="utf-8").split()[int(os.environ["SLURM_ARRAY_TASK_ID"])]
            # Until this process ends. Those that it starts for its other devices (LOCAL_RANK) run under its claim.
            first = os.environ.get("LOCAL_RANK", "0") == "0"
            lock = claim(folder_of(study, name)) if first else None
            if first and lock is None:
                print(f"another process runs {name}: left to it")
                return 0
        else:
            _end_with_parent()
        if not (folder_of(study, name) / RECORD).is_file():
            train(study, read_job(study, name))
    except EscaipError as error:
        print(f"escaip: {error}", file=sys.stderr)
        return 1
    return 0


def as_json(job: Job) -> str:
    """What :func:`read_job` reads."""
    return json.dumps(dataclasses.asdict(job), indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
