"""Runs the jobs of a study: one after the other, several at once, or as a SLURM array."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from escaip.errors import ConfigError, DataError, TrainingError
from escaip.scaling.files import claim, write_whole
from escaip.scaling.job import JOB, LOG, RECORD, as_json, folder_of
from escaip.scaling.plan import Job, StudyPlan, same_study
from escaip.scaling.records import RECORDS, Record

SWEEP = "sweep.jsonl"
COMMAND = (sys.executable, "-m", "escaip.scaling.job")
"""What runs a job, given the folder of the study and an id."""
TASK = "-m escaip.scaling.job '{folder}' slurm-jobs.txt --array"
"""What a task of an array gives to Python."""
_POLL = 0.2  # s

Say = Callable[[str], None]


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    lock: IO[bytes]
    began: float


def run_study(
    config: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    changes: Sequence[str] = (),
    workers: int = 1,
    slurm: Sequence[str] | None = None,
    say: Say = print,
) -> bool:
    """Runs what is missing of a study; whatever has a record is left as it is.

    Args:
        config: a file, or a recipe of ``configs/scaling``.
        out: folder of the study: ``study.json``, ``jobs/ID/``, ``records.jsonl`` of the grid and ``sweep.jsonl`` of
            the search of learning rates.
        changes: ``KEY=VALUE`` put into the settings of every run.
        workers: runs at once on this machine, each with its share of the cores.
        slurm: options of ``sbatch``: runs are submitted as an array instead, and the command comes back at once.
        say: gets a line for each run that ends.

    Returns:
        Whether the study is complete.

    Raises:
        ConfigError: a study that cannot be run.
        DataError: the folder holds another study.
        TrainingError: runs failed; all others were run first.
    """
    plan, folder = StudyPlan.read(config, changes), Path(out)
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1")
    sweep = plan.sweep_jobs()
    if sweep:
        same_study(folder, plan, sweep)
        if not _execute(folder, sweep, workers, slurm, say, SWEEP):
            say("the search of learning rates is submitted: run the same command when it has ended")
            return False
        rates = best_rates(plan, read_finished(folder, sweep))
        for (variant, size), rate in rates.items():
            say(f"learning rate of {variant}, {size}: {rate:.3g}")
        jobs = plan.jobs(rates)
    else:
        jobs = plan.jobs()
    same_study(folder, plan, sweep, jobs)
    return _execute(folder, jobs, workers, slurm, say, RECORDS)


def best_rates(plan: StudyPlan, finished: Mapping[str, Record], metric: str = "loss") -> dict[tuple[str, str], float]:
    """The learning rate of the lowest loss for each variant and size, or of the base size for all.

    Raises:
        TrainingError: every rate diverged.
    """
    found: dict[tuple[str, str], float] = {}
    for variant in plan.variants:
        for size in plan.swept_sizes(variant):
            tried = [r for r in finished.values() if (r.variant, r.size) == (variant, size) and metric in r.losses]
            if not tried:
                raise TrainingError(
                    f"every learning rate of {variant}, {size} diverged: add lower ones to learning_rate.sweep"
                )
            found[variant, size] = min(tried, key=lambda record: record.losses[metric]).learning_rate
    if plan.learning_rate.base_width is not None:
        base = {variant: rate for (variant, _), rate in found.items()}
        return {(variant, size): base[variant] for variant in plan.variants for size in plan.sizes}
    return found


def read_finished(folder: Path, jobs: Sequence[Job]) -> dict[str, Record]:
    """Records of those of the jobs that have one."""
    found = {}
    for job in jobs:
        file = folder_of(folder, job.id) / RECORD
        if file.is_file():
            found[job.id] = Record.from_json(file.read_text(encoding="utf-8"))
    return found


def write_records(folder: Path, jobs: Sequence[Job], name: str) -> dict[str, Record]:
    """Writes the records of the jobs into one file, in the order of the plan."""
    found = read_finished(folder, jobs)
    if found:
        write_whole(folder / name, "".join(found[job.id].to_json() + "\n" for job in jobs if job.id in found))
    return found


def _execute(
    folder: Path, jobs: Sequence[Job], workers: int, slurm: Sequence[str] | None, say: Say, records: str
) -> bool:
    """Runs those without a record; False when they were submitted elsewhere."""
    for job in jobs:
        place = folder_of(folder, job.id)
        place.mkdir(parents=True, exist_ok=True)
        if not (place / JOB).is_file():
            write_whole(place / JOB, as_json(job))
    finished = write_records(folder, jobs, records)
    missing = [job for job in jobs if job.id not in finished]
    if finished:
        say(f"{len(finished)} of {len(jobs)} runs are done already")
    if slurm is not None and missing:
        say(submit(folder, missing, slurm))
        return False
    failed: list[Job] = []
    for job, status, seconds in _in_processes(folder, missing, workers):
        done = write_records(folder, jobs, records)
        if job.id not in done:
            failed.append(job)
            say(f"{job.id} failed (status {status})")
            continue
        record = done[job.id]
        errors = ", ".join(f"{name} {value:.4g}" for name, value in record.losses.items()) or "diverged"
        say(f"{len(done)} of {len(jobs)}: {job.id}: {errors}; {record.flops:.3g} FLOPs, {seconds:.0f} s")
    if failed:
        log = folder_of(folder, failed[0].id) / LOG
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
        raise TrainingError(
            f"{len(failed)} of {len(jobs)} runs failed; of {failed[0].id}: {lines[-1] if lines else 'no output'} "
            f"({log}): mend the cause and run the same command again"
        )
    return True


def _in_processes(folder: Path, jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, int, float]]:
    """Runs jobs, at most ``workers`` at once; those that another command is running are waited for."""
    waiting, running = list(jobs), list[_Running]()
    try:
        while waiting or running:
            for job in list(waiting):
                if len(running) >= workers:
                    break
                lock = claim(folder_of(folder, job.id))
                if lock is not None:
                    waiting.remove(job)
                    running.append(_Running(job, _start(folder, job, workers, lock), lock, time.time()))
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


def _start(folder: Path, job: Job, workers: int, lock: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // workers)))
    with (folder_of(folder, job.id) / LOG).open("ab") as log:
        return subprocess.Popen(
            [*COMMAND, str(folder), job.id], stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, env=environment, pass_fds=[lock.fileno()],
        )  # fmt: skip


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def submit(folder: Path, jobs: Sequence[Job], options: Sequence[str]) -> str:
    """Writes a batch script of a SLURM array, one task for each run, and hands it to ``sbatch``.

    Raises:
        ConfigError: there is no ``sbatch``, or it refuses.
        DataError: runs of this study are in the queue.
    """
    pending = folder / "slurm.txt"
    before = pending.read_text(encoding="utf-8").strip() if pending.is_file() else ""
    if before and shutil.which("squeue") and _queued(before):
        raise DataError(f"{folder}: its array {before} is still in the queue: wait for it")
    write_whole(folder / "slurm-jobs.txt", "\n".join(job.id for job in jobs) + "\n")
    lines = ["#!/bin/bash", f"#SBATCH --array=0-{len(jobs) - 1}", "#SBATCH --job-name=escaip-scaling"]
    lines += [f"#SBATCH --output={folder.resolve()}/slurm-%A-%a.txt", *(f"#SBATCH {option}" for option in options)]
    lines += [f"exec '{sys.executable}' {TASK.format(folder=folder.resolve())}"]
    script = folder / "slurm.sh"
    write_whole(script, "\n".join(lines) + "\n")
    if shutil.which("sbatch") is None:
        raise ConfigError(f"there is no sbatch here: submit {script} where there is one, or leave --slurm out")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch refuses {script}: {' '.join(done.stderr.split())[:300]}")
    array = done.stdout.strip().partition(";")[0]  # the name of a cluster may follow
    write_whole(pending, array + "\n")
    return f"{len(jobs)} runs are submitted as array {array}: run the same command when it has ended"


def _queued(array: str) -> bool:
    done = subprocess.run(["squeue", "--noheader", "--jobs", array], capture_output=True, text=True, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())
