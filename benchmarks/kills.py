"""Runs that are interrupted over and over, beside one that is not: is the result the same, bit for bit?

python benchmarks/kills.py [md fit distil] [--kills 20] [--seed 0] [--out FILE]

``escaip md`` (``example:organic``, extxyz and ASE traj), ``escaip fit`` (the tiny recipe of the tests) and the labels
of ``escaip distil`` (by EMT that takes its time) each go through once. A second run gets Ctrl-C, SIGTERM and SIGKILL in
turn, every fourth while it starts, the others at random moments of its work, and goes on by the command that it
printed, after SIGKILL by the one that the documentation names. After each interruption the exit status is compared with
the documented one, every file is read, and no step may be lost but those since the last saving, and none after Ctrl-C
and SIGTERM. Compared at the end is everything that the runs wrote, but speeds and times. The processes are forked from
this one, which has imported the package: what is interrupted is a run and not an import.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown_table, provenance

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from training_stand_ins import write_recipe

import escaip.distil.run
import escaip.simulate.commands
import escaip.train.cli  # noqa: F401 - before the processes are forked
from escaip.cli import main as main_of_escaip
from escaip.files import write_file
from escaip.simulate import read_log, read_trajectory
from escaip.simulate.restart import RestartState
from escaip.train.callbacks import read_checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


class MD:
    """``escaip md`` in a folder of its own."""

    between, tells_steps = 20, True  # steps between two savings

    def __init__(self, folder: Path, suffix: str) -> None:
        folder.mkdir()
        self.folder, self.trajectory = folder, folder / f"run.{suffix}"
        self.log, self.restart = folder / "run.csv", folder / "run.restart.npz"
        self.start = shlex.split(
            "escaip md example:organic example:ethanol --ensemble nvt --temperature 300 --steps 250 --interval 2 "
            f"--trajectory-interval 3 --restart-interval {self.between} --seed 3 --out {self.trajectory.name}"
        )

    def after_kill(self) -> list[str]:
        """What the documentation names: --resume, or to begin anew where there is no restart file yet."""
        return [*self.start, "--resume" if self.restart.exists() else "--overwrite"]

    def traces(self) -> object:
        """Changes when the first step has been made."""
        return self.log.exists() and self.log.stat().st_mtime_ns

    def saved(self) -> int:
        return RestartState.load(self.restart).step if self.restart.exists() else 0

    def reached(self) -> int:
        """The last step in the log."""
        lines = self.log.read_bytes().split(b"\n") if self.log.exists() else []
        return int(lines[-2].split(b",")[0]) if len(lines) > 2 else 0

    def read(self, killed: bool) -> None:
        """Reads every file; a frame that SIGKILL has cut is left out with a warning, and allowed."""
        if self.trajectory.exists() and self.trajectory.stat().st_size:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if killed else "error")
                sum(1 for _ in read_trajectory(self.trajectory))

    def unlike(self, other: MD) -> Iterator[str]:
        """What differs from another run."""
        frames = [list(read_trajectory(run.trajectory)) for run in (self, other)]
        if len(frames[0]) != len(frames[1]):
            yield f"{len(frames[0])} and {len(frames[1])} frames"
        for one, two in zip(*frames, strict=False):
            values = [(x.positions, x.get_momenta(), x.get_forces(), x.get_potential_energy()) for x in (one, two)]
            if one.info != two.info or not all(np.array_equal(a, b) for a, b in zip(*values, strict=True)):
                yield f"frame of step {one.info['step']}"
        logs = [read_log(run.log) for run in (self, other)]
        for name in logs[0]:
            if name != "ns_per_day" and not np.array_equal(logs[0][name], logs[1][name], equal_nan=True):
                yield f"column {name}"


class Fit:
    """``escaip fit`` in a folder of its own."""

    between, tells_steps = 4, True

    def __init__(self, folder: Path, _: str) -> None:
        folder.mkdir()
        self.folder, self.runs = folder, folder / "runs" / "tiny"
        self.start = shlex.split(
            "escaip fit --config tiny.yaml --trainer.max_epochs 16 --evaluation.max_structures 3 "
            f"--checkpoint.every_n_steps {self.between}"
        )
        write_recipe(folder, 40, dropout=0.1)

    def versions(self) -> list[Path]:
        return sorted(self.runs.glob("version_*"), key=lambda path: int(path.name.partition("_")[2]))

    def after_kill(self) -> list[str]:
        """What the documentation names: --ckpt_path last, or to begin anew where there is no checkpoint yet."""
        return [*self.start, *(["--ckpt_path", "last"] if self.checkpoints() else [])]

    def checkpoints(self) -> list[Path]:
        return [path / "last.ckpt" for path in self.versions() if (path / "last.ckpt").exists()]

    def traces(self) -> object:
        return sum(1 for _ in self.runs.glob("version_*/run.log"))

    def saved(self) -> int:
        return max((read_checkpoint(path)["global_step"] for path in self.checkpoints()), default=0)

    def reached(self) -> int:
        """The last step that the newest run told, of about twenty."""
        log = max(self.runs.glob("version_*/run.log"), key=lambda path: int(path.parent.name.partition("_")[2]))
        return max((int(step) for step in re.findall(r"^step (\d+)/", log.read_text("utf-8"), re.MULTILINE)), default=0)

    def read(self, killed: bool) -> None:
        for path in self.runs.glob("version_*/[!.]*.ckpt"):
            read_checkpoint(path)

    def figures(self) -> dict[tuple[str, str], str]:
        """Of every step and column the figure of the run that made it last."""
        found: dict[tuple[str, str], str] = {}
        for path in self.versions():
            if (path / "metrics.csv").exists():
                with (path / "metrics.csv").open(encoding="utf-8") as stream:
                    rows = [row for row in csv.DictReader(stream) if None not in row.values()]
                found |= {(row["step"], key): value for row in rows for key, value in row.items() if value}
        return found

    def unlike(self, other: Fit) -> Iterator[str]:
        for name in ("last.ckpt", "best.ckpt"):
            states = [dict(_tensors("", read_checkpoint(run.versions()[-1] / name))) for run in (self, other)]
            if states[0].keys() != states[1].keys():
                yield f"{name}: other tensors"
            wrong = [key for key in states[0] if not torch.equal(states[0][key], states[1].get(key, torch.empty(0)))]
            if wrong:
                yield f"{name}: {wrong[0]} and {len(wrong) - 1} more of {len(states[0])} tensors"
        one, two = self.figures(), other.figures()
        missing = sorted({int(step) for step, _ in one.keys() - two.keys()})
        if missing:
            yield f"metrics.csv: nothing of {len(missing)} steps ({missing[0]} to {missing[-1]})"
        wrong_figures = sorted({name for (step, name) in one.keys() & two.keys() if one[step, name] != two[step, name]})
        if wrong_figures:
            yield f"metrics.csv: {', '.join(wrong_figures)}"
        reports = [run.versions()[-1] / "evaluation" / "report.json" for run in (self, other)]
        contents = [json.loads(path.read_text("utf-8")) for path in reports]
        compared = contents[0].keys() - {"model", "model_sha256", "seconds"}  # checkpoints hold the names of folders
        yield from (f"report.json: {key}" for key in compared if contents[0][key] != contents[1].get(key))


class Distil:
    """The labels of ``escaip distil``; a step is an answer in the log."""

    between, tells_steps = 0, False
    teacher = """
import time
from ase.calculators.emt import EMT


class Slow(EMT):
    def calculate(self, *given):
        time.sleep(0.03)
        super().calculate(*given)
"""
    plan = """
name: copper
teacher: {level_of_theory: EMT}
bases: {copper: {prototypes: [A1, A2, A3], elements: [Cu, Ni], relax: 10}}
structures: {strained: {of: [copper], count: 700, atoms: 4, strain: 0.1, rattle: 0.1}}
dynamics: {hot: {of: [copper], count: 12, atoms: 4, steps: 20, every: 5}}
student: {config: inp, steps: 1}
"""

    def __init__(self, folder: Path, _: str) -> None:
        folder.mkdir()
        self.folder, self.log = folder, folder / "out" / "labels" / "teacher.jsonl"
        (folder / "slow_teacher.py").write_text(self.teacher, "utf-8")
        (folder / "plan.yaml").write_text(self.plan, "utf-8")
        self.start = shlex.split(
            "escaip distil plan.yaml --calculator slow_teacher:Slow --out out --workers 2 --labels-only"
        )

    def after_kill(self) -> list[str]:
        return self.start

    def traces(self) -> object:
        return self.saved()

    def answers(self) -> list[dict[str, Any]]:
        lines = self.log.read_bytes().split(b"\n")[:-1] if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def saved(self) -> int:
        return len(self.answers())

    reached = saved

    def read(self, killed: bool) -> None:
        keys = [answer["key"] for answer in self.answers()]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{len(keys) - len(set(keys))} answers twice")

    def unlike(self, other: Distil) -> Iterator[str]:
        """Yields what differs: the answers, whatever their order, and the bytes of the prepared stores."""
        mine, theirs = (sorted(run.answers(), key=lambda answer: str(answer["key"])) for run in (self, other))
        if mine != theirs:
            yield "answers"
        for path in sorted((self.folder / "out" / "data").rglob("*.safetensors")):
            if path.read_bytes() != (other.folder / path.relative_to(self.folder)).read_bytes():
                yield path.name


def _tensors(path: str, held: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a checkpoint: weights, averages, moments of the optimizer, random states."""
    if isinstance(held, torch.Tensor):
        yield path, held
    elif isinstance(held, dict | list | tuple):
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            yield from _tensors(f"{path}.{key}", value)


class Process:
    """A command as a user types it, in a process of its own, which has begun when this returns."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.files = [folder.parent / name for name in ("stdout", "stderr")]
        reader, writer = os.pipe()
        self.pid, self.status = os.fork(), None
        if self.pid == 0:
            os.chdir(folder)
            for number, path in enumerate(self.files, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells ignore in the background
            sys.argv = command
            status = 1
            os.write(writer, b".")
            try:
                status = main_of_escaip(command[1:])
            except BaseException:  # none should come this far
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def result(self) -> tuple[int, str, str]:
        """Waits for its end; returns the status as a shell tells it, and what was printed on both streams."""
        while not self.ended():
            time.sleep(0.01)
        status = self.status or 0
        printed, told = (path.read_text("utf-8") for path in self.files)
        return status if status >= 0 else 128 - status, printed, told


def finish(command: list[str], folder: Path) -> float:
    """Runs a command to its end; returns the seconds."""
    began = time.perf_counter()
    status, _, told = Process(command, folder).result()
    if status:
        raise SystemExit(told)
    return time.perf_counter() - began


def interrupt(
    run: MD | Fit | Distil, command: list[str], number: int, seconds: float, rng: random.Random
) -> dict[str, Any]:
    """Interrupts a run once; returns what was found, ``next`` being the command to go on with."""
    which, in_work = SIGNALS[number % 3], number % 4 != 3
    saved, traces, aside = run.saved(), run.traces(), set(run.folder.rglob(".*part*"))
    process = Process(command, run.folder)
    if in_work:
        while not process.ended() and run.traces() == traces:
            time.sleep(0.01)
    time.sleep(rng.uniform(0.0, seconds if in_work else 2.0))
    # Before: what is told while the run ends may be more. A log is cut back when a run has begun.
    reached = run.reached() if run.traces() != traces else saved
    if process.ended():
        status, _, told = process.result()
        raise SystemExit(f"{shlex.join(command)} ended with {status} before interruption {number + 1}: {told}")
    os.kill(process.pid, which)
    status, printed, told = process.result()
    found: list[str] = []
    if status != 128 + which:
        found.append(f"status {status}")
    if "Traceback" in told:
        found.append("a traceback")
    lines = printed.splitlines()
    is_told = bool(lines) and lines[-1].startswith("escaip ")
    if in_work and which != signal.SIGKILL and not is_told:
        found.append("no command to go on")
    following = shlex.split(lines[-1]) if is_told else run.after_kill()
    try:
        run.read(which == signal.SIGKILL)
        now = run.saved()
    except Exception as error:
        found, now = [*found, f"{type(error).__name__}: {error}"], saved
    if now < saved or now < reached - (run.between if which == signal.SIGKILL else 0):
        found.append(f"{max(saved, reached) - now} steps lost")
    if which != signal.SIGKILL:
        found += [f"{path.name} left" for path in set(run.folder.rglob(".*part*")) - aside]
        if in_work and run.tells_steps and f"stopped at step {now}" not in printed:
            found.append(f"told other than step {now}")
    return {
        "when": "work" if in_work else "start", "signal": which.name, "status": status, "saved": now,
        "lost": max(reached - now, 0), "found": found, "next": following,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=["md", "fit", "distil"], help="default: all")
    parser.add_argument("--kills", type=int, default=20, help="default: 20")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, help="Markdown file")
    args = parser.parse_args()
    kinds = {"md": ((MD, "extxyz"), (MD, "traj")), "fit": ((Fit, ""),), "distil": ((Distil, ""),)}
    rows: list[list[str]] = []
    totals: list[list[str]] = []
    for kind, suffix in (pair for name in args.commands for pair in kinds[name]):
        name = f"{kind.__name__.lower()} {suffix}".strip()
        with tempfile.TemporaryDirectory() as place:
            whole, broken = (kind(Path(place) / part, suffix) for part in ("whole", "broken"))
            seconds, rng, command = finish(whole.start, whole.folder), random.Random(args.seed), broken.start
            for number in range(args.kills):
                result = interrupt(broken, command, number, 1.2 * seconds / args.kills, rng)
                command = result.pop("next")
                rows.append([name, str(number + 1), *(str(result[key]) for key in list(result)[:-1])])
                rows[-1].append("; ".join(result["found"]) or "–")
                print(*rows[-1], flush=True)
            finish(command, broken.folder)
            left = [path.name for path in broken.folder.rglob(".*part*")]
            different = list(whole.unlike(broken))  # type: ignore[arg-type]
            ends = ["; ".join(found) or "nothing" for found in (different, left)]
            totals.append([name, str(args.kills), f"{seconds:.0f} s", *ends])
            print(*totals[-1], flush=True)
    table = markdown_table(["run", "interruptions", "alone", "different at the end", "left aside"], totals)
    single = markdown_table(["run", "", "during", "signal", "status", "saved step", "steps lost", "found"], rows)
    if args.out:
        head = ", ".join(f"{key} {value}" for key, value in provenance().items())
        text = str(__doc__).split("\n", 4)[4]
        write_file(args.out, f"# Interrupted runs\n\n{text}\n{head}\n\n{table}\n\n{single}\n")
    if any(total[3] != "nothing" for total in totals) or any(row[-1] != "–" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
