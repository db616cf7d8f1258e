"""Trains real data sets on one GPU, several at once, for some minutes each, and reports errors on what was held out.

    python benchmarks/gpu/training.py --data .gpu_data --minutes 9 [--sizes 1m 5m] [--workers 4] [--only SET ...]

A small model leaves most of a GPU idle, so that ``--workers`` runs share it, each in a process of its own
(``fitting.py``), which times its steps beside those of the others and plans as many as fit its share of the time. After
every run ``training.json`` is written below ``--out``, with the table, the learning curves and the errors by file, and
``training-N.tar`` with plots and models. ``--data`` is what ``pack.py`` made. ``--device cpu --small`` is tiny.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import write_json
from gpu import fitting
from gpu.fitted import Results, Row, table
from gpu.fitting import BASE, Job
from real_data_sets import SETS, divided

if TYPE_CHECKING:
    from gpu.runner import Setting

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "gpu_training"
# Those of most interest first; both sizes of six are three rounds of four runs.
DEFAULT_SETS = ("threebpa", "inp", "mptrj", "solvents", "oc20_direct", "oc20_conservative")
WORKERS = {"cuda": 4, "cpu": 1}
LEAST_SECONDS = 30.0  # of a run: starting takes half of it
GRACE = 10.0  # seconds after its share at which a run is killed
FIGURE = 5.0  # seconds that the learning curves of all runs take to draw


@dataclass(frozen=True)
class Times:
    """How the time is divided: equal shares, so that runs can be compared.

    Attributes:
        share: seconds of each run.
        last: seconds after the start at which the last share ends; what follows is for runs that were cut.
    """

    share: float
    last: float

    @classmethod
    def divide(cls, seconds: float, runs: int, workers: int) -> Times:
        """Of ``seconds`` for ``runs``, ``workers`` of them at once."""
        last = seconds - GRACE - FIGURE - min(0.05 * seconds, 20.0)
        return cls(last / -(-runs // workers), last)

    def deadline(self, now: float) -> float | None:
        """Of a run that starts ``now`` seconds after the start; None when too little is left."""
        end = min(now + self.share, self.last)
        return end if end - now >= min(LEAST_SECONDS, 0.5 * self.share) else None


def training(setting: Setting) -> Iterator[Row]:
    """The part of the suite: ``setting.data`` names the folder of the divided data."""
    sizes = (BASE,) if setting.small else (BASE, "5m")
    yield from trained(
        Path(setting.data[0]), setting.out, setting.left - 2.0, setting.device, sizes=sizes, small=setting.small
    )


def train_sets(data: Path, out: Path, seconds: float, device: str, **options: Any) -> list[Row]:
    """The rows of :func:`trained`, in the order of sets and sizes."""
    rows = list(trained(data, out, seconds, device, **options))
    order = {name: index for index, name in enumerate(SETS)}
    return sorted(rows, key=lambda row: (order[row["set"]], row["parameters"] or 0, row["size"]))


def trained(
    data: Path,
    out: Path,
    seconds: float,
    device: str,
    *,
    sizes: Sequence[str] = (BASE, "5m"),
    workers: int | None = None,
    only: Sequence[str] | None = None,
    small: bool = False,
    compiled: bool = False,
) -> Iterator[Row]:
    """Trains every set at every size, and yields a row of plain values when a run has ended.

    Args:
        data: folder of the divided data, made by ``pack.py``.
        out: folder for ``training.json`` and the archives.
        seconds: for everything.
        device: ``cuda`` or ``cpu``.
        sizes: presets.
        workers: runs at once; default 4 on ``cuda``, 1 on ``cpu``.
        only: names of sets; default :data:`DEFAULT_SETS`.
        small: few steps, few test structures.
        compiled: compile the models, which costs each run about two minutes.

    Raises:
        SystemExit: a set was not divided into ``data``.
    """
    began, names = time.time(), list(only or DEFAULT_SETS)
    missing = [name for name in names if divided(SETS[name], data) is None]
    if missing:
        sys.exit(f"training: {data} has no {', '.join(missing)}: make it by python benchmarks/gpu/pack.py --out {data}")
    workers = workers or WORKERS[device]
    pairs = [(name, size) for name in names for size in sizes]
    times = Times.divide(seconds, len(pairs), workers)
    shutil.rmtree(WORK, ignore_errors=True)
    jobs = [
        Job(
            f"{name}-{size}", name, size, str(data.resolve()), str(WORK / f"{name}-{size}"), device, 0.0,
            tuple(str(WORK / f"{n}-{s}") for n, s in pairs[:workers]) if index < workers else (), compiled, small,
        )
        for index, (name, size) in enumerate(pairs)
    ]  # fmt: skip
    ended = Results(data, out, WORK)
    with Pool(workers, device) as pool:
        waiting = list(jobs)
        while waiting or pool.running:
            while waiting and len(pool.running) < workers:
                job, deadline = waiting.pop(0), times.deadline(time.time() - began)
                if deadline is None:
                    yield ended.add(job, "no time left", 0.0)
                    continue
                pool.start(dataclasses.replace(job, deadline=began + deadline))
            for name in names:
                ended.compare(name)
            for job, status, took in pool.ended():
                yield ended.add(job, status, took)
        # Those that were cut: what they have is evaluated while there is time.
        waiting, end = ended.without_errors(), began + seconds - FIGURE
        while waiting or pool.running:
            while waiting and len(pool.running) < workers:
                job = waiting.pop(0)
                if end - time.time() > 0.5 * LEAST_SECONDS:
                    pool.start(dataclasses.replace(job, deadline=end - GRACE), "--evaluate")
            for job, _, _ in pool.ended():
                ended.update(job)
    ended.write(figure=True)


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    began: float


class Pool:
    """Processes of ``fitting.py``; none outlives it, and they stay in the group of this one, to be killed with it.

    Args:
        workers: at once, for their share of the cores.
        device: theirs.
    """

    def __init__(self, workers: int, device: str) -> None:
        self.running: list[_Running] = []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Beside a GPU a process has a loader of its own.
        self._threads = max(1, cores // workers // (2 if device == "cuda" else 1))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.running:
            one.process.kill()
            one.process.wait()

    def start(self, job: Job, *options: str) -> None:
        """Starts a run; what it prints goes to ``log.txt`` in its folder."""
        job.path.mkdir(parents=True, exist_ok=True)
        write_json(job.path / "job.json", dataclasses.asdict(job))
        command = [sys.executable, fitting.__file__, str(job.path / "job.json"), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
        with (job.path / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self.running.append(_Running(job, process, time.time()))

    def ended(self) -> Iterator[tuple[Job, str | None, float]]:
        """Waits a little; runs that have ended, why if not of themselves, and seconds that they took."""
        time.sleep(0.1)
        for one in list(self.running):
            cut = time.time() > one.job.deadline + GRACE
            if cut:
                one.process.kill()
                one.process.wait()
            status = one.process.poll()
            if status is None:
                continue
            self.running.remove(one)
            why = "cut by the time" if cut else _last_line(one.job.path / "log.txt") if status else None
            yield one.job, why, time.time() - one.began


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no output"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".gpu_data"), help="made by pack.py (default: .gpu_data)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/bench")))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--device", default="cuda", choices=sorted(WORKERS))
    parser.add_argument("--sizes", nargs="+", default=[BASE, "5m"], help="presets (default: 1m 5m)")
    parser.add_argument("--workers", type=int, help="runs at once (default: 4 on cuda, 1 on cpu)")
    parser.add_argument("--only", nargs="+", choices=sorted(SETS), help=f"default: {' '.join(DEFAULT_SETS)}")
    parser.add_argument("--compile", action="store_true", help="two minutes of each run")
    parser.add_argument("--small", action="store_true", help="few steps, few test structures: does it all work?")
    args = parser.parse_args()
    rows = train_sets(
        args.data, args.out, 60.0 * args.minutes, args.device, sizes=args.sizes, workers=args.workers, only=args.only,
        small=args.small, compiled=args.compile,
    )  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
