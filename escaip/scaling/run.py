"""Runs the jobs of a study: in processes of this machine, or as a SLURM array.

Each job is a process of its own, ``python -m escaip.scaling.run DIR ID``, started by whoever holds the lock of its
folder.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import yaml

from escaip import __version__
from escaip.errors import ConfigError, DataError, TrainingError
from escaip.files import first_line, try_lock, write_file
from escaip.scaling.study import RECORDS, Job, Record, StudyPlan
from escaip.signals import run_as_child

if TYPE_CHECKING:
    from escaip.train.cli import TrainingCLI

SWEEP = "sweep.jsonl"
RECORD, JOB, LOG, LOCK = "record.json", "job.json", "log.txt", "lock"
COMMAND = (sys.executable, "-m", "escaip.scaling.run")
"""Command that runs a job, given the folder of the study and an id."""
SAMPLE = 256
"""Structures, evenly through the training set, whose edges are counted."""
_POLL = 0.2  # s

# Name in the log of a validation -> name and unit in a record.
_METRICS = {
    "loss": ("loss", 1.0),
    "energy_mae_meV_per_atom": ("energy_mae", 1e-3),
    "force_mae_meV_per_A": ("forces_mae", 1e-3),
    "stress_mae_meV_per_A3": ("stress_mae", 1e-3),
}


def run_study(
    config: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    changes: Sequence[str] = (),
    workers: int = 1,
    slurm: Sequence[str] | None = None,
) -> bool:
    """Runs what is missing of a study, as ``escaip scaling run``, printing a line for each run that ends.

    The folder ``out`` holds ``study.json``, ``jobs/ID/``, ``records.jsonl`` of the grid and ``sweep.jsonl`` of the
    search of learning rates. Runs with a record are left as they are. With ``slurm``, options of ``sbatch``, runs are
    submitted as an array, and this returns at once.

    Returns:
        Whether the study is complete.

    Raises:
        ConfigError: the study or an option is impossible, or there is no SLURM or submitit.
        DataError: the folder holds another study, or its array is still in the queue.
        TrainingError: runs failed; all others were run first.
    """
    plan, folder = StudyPlan.read(config, changes), Path(out)
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1")
    sweep, rates = plan.sweep_jobs(), None
    if sweep:
        plan.claim_folder(folder, sweep)
        finished = _execute(folder, sweep, workers, slurm, SWEEP)
        if finished is None:
            print("the search of learning rates is submitted: run the same command when it has ended")
            return False
        rates = best_rates(plan, finished)
        for (variant, size), rate in rates.items():
            print(f"learning rate of {variant}, {size}: {rate:.3g}")
    jobs = plan.jobs(rates)
    plan.claim_folder(folder, sweep, jobs)
    return _execute(folder, jobs, workers, slurm, RECORDS) is not None


def best_rates(plan: StudyPlan, finished: Mapping[str, Record]) -> dict[tuple[str, str], float]:
    """Returns the learning rate of the lowest loss for each variant and size, or that of the base size for all.

    Raises:
        TrainingError: every rate diverged.
    """
    found: dict[tuple[str, str], float] = {}
    for variant in plan.variants:
        for size in plan.swept_sizes(variant):
            tried = [r for r in finished.values() if (r.variant, r.size) == (variant, size) and "loss" in r.losses]
            if not tried:
                raise TrainingError(
                    f"every learning rate of {variant}, {size} diverged: add lower ones to learning_rate.sweep"
                )
            found[variant, size] = min(tried, key=lambda record: record.losses["loss"]).learning_rate
    if plan.learning_rate.base_width is None:
        return found
    return {(variant, size): rate for (variant, _), rate in found.items() for size in plan.sizes}


def folder_of(study: Path, job_id: str) -> Path:
    return study / "jobs" / job_id


def _collect(folder: Path, jobs: Sequence[Job], name: str) -> dict[str, Record]:
    """Writes the records of the jobs that have ended into one file, in the order of the plan, and returns them."""
    files = {job.id: folder_of(folder, job.id) / RECORD for job in jobs}
    found = {key: Record.from_json(file.read_text(encoding="utf-8")) for key, file in files.items() if file.is_file()}
    if found:
        write_file(folder / name, "".join(record.to_json() + "\n" for record in found.values()))
    return found


def _execute(
    folder: Path, jobs: Sequence[Job], workers: int, slurm: Sequence[str] | None, name: str
) -> dict[str, Record] | None:
    """Runs the jobs without a record and returns the records of all; None when they were submitted."""
    for job in jobs:
        folder_of(folder, job.id).mkdir(parents=True, exist_ok=True)
        write_file(folder_of(folder, job.id) / JOB, json.dumps(dataclasses.asdict(job), indent=1) + "\n")
    finished = _collect(folder, jobs, name)
    missing = [job for job in jobs if job.id not in finished]
    if finished:
        print(f"{len(finished)} of {len(jobs)} runs are done already")
    if slurm is not None and missing:
        print(submit(folder, missing, slurm))
        return None
    failed: list[Job] = []
    for job, status, seconds in _in_processes(folder, missing, workers):
        finished = _collect(folder, jobs, name)
        if job.id not in finished:
            failed.append(job)
            print(f"{job.id} failed (status {status})")
            continue
        record = finished[job.id]
        errors = ", ".join(f"{metric} {value:.4g}" for metric, value in record.losses.items()) or "diverged"
        print(f"{len(finished)} of {len(jobs)}: {job.id}: {errors}; {record.flops:.3g} FLOPs, {seconds:.0f} s")
    if failed:
        log = folder_of(folder, failed[0].id) / LOG
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
        raise TrainingError(
            f"{len(failed)} of {len(jobs)} runs failed; of {failed[0].id}: {lines[-1] if lines else 'no output'} "
            f"({log}): mend the cause and run the same command again"
        )
    return finished


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    lock: IO[bytes]
    began: float


def _in_processes(folder: Path, jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, int, float]]:
    """Runs jobs, at most ``workers`` at once, and waits for those that another command runs."""
    threads = max(1, _cores() // workers)
    waiting, running = list(jobs), list[_Running]()
    try:
        while waiting or running:
            for job in list(waiting):
                if len(running) >= workers:
                    break
                lock = try_lock(folder_of(folder, job.id) / LOCK)
                if lock is None:
                    continue
                waiting.remove(job)
                if (folder_of(folder, job.id) / RECORD).is_file():  # another command was faster
                    lock.close()
                    yield job, 0, 0.0
                else:
                    running.append(_Running(job, _start(folder, job.id, threads, lock), lock, time.time()))
            time.sleep(_POLL)
            for one in list(running):
                status = one.process.poll()
                if status is not None:
                    running.remove(one)
                    one.lock.close()
                    yield one.job, status, time.time() - one.began
    finally:  # an interrupted study leaves no runs behind
        for one in running:
            one.process.terminate()
        for one in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(30)
            one.process.kill()
            one.lock.close()


def _start(folder: Path, job_id: str, threads: int, lock: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts a job, which holds the lock of its folder as well, until its last process ends."""
    # Lightning starts the processes of the devices itself, also within a SLURM task.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_NTASKS")}
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    with (folder_of(folder, job_id) / LOG).open("ab") as log:
        return subprocess.Popen(
            [*COMMAND, str(folder), job_id], stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, env=environment, pass_fds=[lock.fileno()],
        )  # fmt: skip


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def submit(folder: Path, jobs: Sequence[Job], options: Sequence[str], cluster: str = "slurm") -> str:
    """Submits jobs as a SLURM array, one task for each run, and returns a line that says so.

    Options are those of ``sbatch``, such as ``gres=gpu:1``; the cluster is an executor of submitit.

    Raises:
        ConfigError: there is no submitit or no ``sbatch``, an option is no ``NAME=VALUE``, or ``sbatch`` refuses.
        DataError: runs of this study are in the queue.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("--slurm needs submitit: pip install 'escaip[cluster]', or leave --slurm out") from None
    parameters = dict(option.lstrip("-").partition("=")[::2] for option in options)
    if "" in parameters.values():
        raise ConfigError(f"--slurm {' '.join(options)}: write options of sbatch as NAME=VALUE, such as time=4:00:00")
    if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError("there is no sbatch here: run this on a machine that submits jobs, or leave --slurm out")
    executor = submitit.AutoExecutor(folder.resolve() / "slurm", cluster=cluster)
    if cluster == "slurm":
        executor.update_parameters(slurm_use_srun=False, slurm_additional_parameters=parameters)
    pending = folder / "slurm.txt"
    before = pending.read_text(encoding="utf-8").strip() if pending.is_file() else ""
    if before and shutil.which("squeue"):
        listed = subprocess.run(["squeue", "--noheader", "--jobs", before], capture_output=True, check=False)
        if listed.returncode == 0 and listed.stdout.strip():
            raise DataError(f"{folder}: its array {before} is still in the queue: wait for it")
    executor.update_parameters(name="escaip-scaling")
    try:
        tasks = executor.map_array(run_claimed, [str(folder.resolve())] * len(jobs), [job.id for job in jobs])
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(f"sbatch refuses the runs: {first_line(error)}") from error
    array = tasks[0].job_id.partition("_")[0]
    write_file(pending, array + "\n")
    return f"{len(jobs)} runs are submitted as array {array}: run the same command when it has ended"


def run_claimed(study: str, job_id: str) -> None:
    """Runs a job unless another process does, or raises a TrainingError; the task of an array."""
    folder = folder_of(Path(study), job_id)
    lock = try_lock(folder / LOCK)
    if lock is None:
        print(f"another process runs {job_id}: left to it")
        return
    with lock:
        if (folder / RECORD).is_file():
            return
        status = _start(Path(study), job_id, _cores(), lock).wait()
    if status:
        raise TrainingError(f"{job_id} failed (status {status}): see {folder / LOG}")


def train(study: Path, job: Job) -> Record:
    """Trains a job, from its last checkpoint where there is one, and writes the record.

    A run whose loss or predictions are no longer finite is recorded without losses.

    Raises:
        DataError: a budget below one step, or no validation.
    """
    from escaip.train.cli import build

    folder = folder_of(study, job.id)
    began = time.time()
    write_file(folder / "config.yaml", yaml.safe_dump(dict(job.config), sort_keys=False, allow_unicode=True))
    arguments = ["fit", "--config", str(folder / "config.yaml"), "--out", str(folder), "--name", "run"]
    if job.budget is not None:
        steps = _steps_within(job.budget, build(arguments))
        arguments += ["--trainer.max_steps", str(steps), "--trainer.max_epochs=-1"]
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
        write_file(folder / RECORD, record.to_json() + "\n")
    return record


def _record(job: Job, cli: TrainingCLI, folder: Path, finite: bool, seconds: float) -> Record:
    from escaip.data import collate
    from escaip.scaling.flops import count_flops, parameter_count, profile_flops

    steps = max(1, int(cli.trainer.global_step))
    flops, mode = _flops(cli, steps), _mode(cli)
    data, config = cli.datamodule.datasets["train"], cli.model.potential.config
    rows = read_validations(folder / "run", steps)
    curve = [(float(step), flops * step / steps, row["val/loss"]) for step, row in rows.items() if "val/loss" in row]
    count, two = parameter_count(config), collate([data[0], data[len(data) // 2]])
    epochs = steps * int(cli.trainer.accumulate_grad_batches) / len(cli.datamodule.train_dataloader())
    seen = min(1.0, epochs)  # a budget may end before all data were seen: D is what the run has learned from
    return Record(
        id=job.id, variant=job.variant, size=job.size, seed=job.seed, parameters=count.non_embedding,
        parameters_total=count.total, structures=max(1, round(seen * len(data))),
        atoms=max(1, round(seen * int(sum(data.natoms)))), epochs=epochs, steps=steps, flops=flops,
        learning_rate=job.learning_rate, losses=_losses(rows) if finite else {},
        curve=tuple(point for point in curve if math.isfinite(point[2])), seconds=seconds, commit=version(),
        config=dict(job.config), profiled=profile_flops(config, two, mode) / count_flops(config, two, mode),
    )  # fmt: skip


def _flops(cli: TrainingCLI, steps: int) -> float:
    """Returns the FLOPs of the first steps of a run."""
    from escaip.scaling.flops import mean_shape, training_flops

    data, config = cli.datamodule.datasets["train"], cli.model.potential.config
    chosen = sorted({round(i * (len(data) - 1) / (SAMPLE - 1)) for i in range(SAMPLE)})
    shape = mean_shape((data[index] for index in chosen), config.graph)
    per_step = len(data) / len(cli.datamodule.train_dataloader()) * int(cli.trainer.accumulate_grad_batches)
    return training_flops(config, shape, batch_size=per_step, steps=steps, mode=_mode(cli))


def _mode(cli: TrainingCLI) -> str:
    losses = cli.model.losses
    return "training" if losses.forces.weight > 0 or losses.stress.weight > 0 else "energy_training"


def _steps_within(budget: float, cli: TrainingCLI) -> int:
    cli.datamodule.setup("fit")
    one = _flops(cli, 1)
    steps = round(budget / one)
    if steps < 1:
        raise DataError(
            f"a budget of {budget:.3g} FLOPs is less than one step, {one:.3g}: raise it, or leave the size out"
        )
    return steps


def _losses(rows: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Returns the metrics of the last validation that are finite."""
    if not rows:
        raise DataError("a run has validated nothing: name data.val, or let data.split make it")
    last = rows[max(rows)]
    found = {new: last[f"val/{old}"] * unit for old, (new, unit) in _METRICS.items() if f"val/{old}" in last}
    return {name: value for name, value in found.items() if math.isfinite(value) and value > 0}


def read_validations(run: Path, steps: int) -> dict[int, dict[str, float]]:
    """Reads the validation metrics after each step; of a run that was resumed the later part counts.

    A line that a killed process left unfinished is skipped. Validations within a run are logged under the step before,
    one after its end under the last, ``steps``.
    """
    found: dict[int, dict[str, float]] = {}
    for folder in sorted(run.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_"))):
        file = folder / "metrics.csv"
        if not file.is_file():
            continue
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                values = {k: v for k, v in row.items() if k and v and k.startswith("val/")}
                if values and row.get("step") and None not in row:
                    found[min(int(row["step"]) + 1, steps)] = {key: float(value) for key, value in values.items()}
    return dict(sorted(found.items()))


def version() -> str:
    """Returns the commit of the code that runs, or its version where there is no repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return __version__
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or __version__


def main(argv: Sequence[str]) -> int:
    """Trains the job of a study's folder and an id, and returns the exit status."""
    study, job_id = Path(argv[0]), argv[1]
    folder = folder_of(study, job_id)

    def work() -> None:
        if not (folder / RECORD).is_file():
            train(study, Job(**json.loads((folder / JOB).read_text(encoding="utf-8"))))

    return run_as_child(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
