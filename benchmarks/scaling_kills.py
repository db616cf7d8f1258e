"""A study of scaling laws that is killed without warning, over and over, beside one that is not: is the table the same?

python benchmarks/scaling_kills.py [--config smoke] [--kills 5] [--seed 0] [--widths 16 32] [--epochs 2] [--out FILE]

A study of real trainings goes through once, by ``escaip scaling run``. A second one gets SIGKILL at random moments, one
in each equal part of the time that the first took: the runner alone, then the runner with its whole process group, in
turn. Each time the same command goes on. Compared are every field of every record (losses, learning curves, N, D, C)
but those that tell when and where a run was made, the weights of every last checkpoint, whether a run is lost or
doubled, and what ``escaip scaling fit`` prints and writes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from common import markdown_table, provenance, write_json

from escaip.cli import main as main_of_escaip
from escaip.files import config_path, try_lock
from escaip.train.callbacks import LAST, read_checkpoint

NOT_COMPARED = {"seconds": "wall-clock time", "commit": "of the code that made the record"}
REDUCED = {"widths": int, "data_sizes": float, "seeds": int}


def command(args: argparse.Namespace, config: Path, out: Path) -> list[str]:
    """As a user types it, to begin and to go on."""
    changes = ["--set", *args.changes] if args.changes else []
    workers = ["--workers", str(args.workers)]
    return [sys.executable, "-m", "escaip", "scaling", "run", str(config), "--out", str(out), *workers, *changes]


def write_study(args: argparse.Namespace, file: Path) -> None:
    """The recipe with the widths, data sizes, seeds and epochs that were asked for."""
    content = yaml.safe_load(config_path(args.config, "scaling").read_text(encoding="utf-8"))
    given = {name: getattr(args, name) for name in (*REDUCED, "epochs")}
    file.write_text(yaml.safe_dump({**content, **{k: v for k, v in given.items() if v is not None}}), "utf-8")


def moments(seconds: float, kills: int, rng: random.Random) -> list[float]:
    """One moment in each of so many equal parts of a time, s."""
    return [(number + rng.random()) * seconds / kills for number in range(kills)]


def state(study: Path) -> dict[str, int]:
    """How far a study has come: runs with a record; of the others those begun, and those with a checkpoint."""
    jobs = [file.parent for file in study.glob("jobs/*/job.json")]
    open_ones = [job for job in jobs if not (job / "record.json").is_file() and (job / "log.txt").is_file()]
    kept = sum(any(job.glob(f"run/version_*/{LAST}")) for job in open_ones)
    return {"finished": len(list(study.glob("jobs/*/record.json"))), "begun": len(open_ones), "with_checkpoint": kept}


def alive(study: Path) -> int:
    """Runs whose lock a process has."""
    locks = [try_lock(file.with_name("lock")) for file in study.glob("jobs/*/job.json")]
    for lock in locks:
        if lock is not None:
            lock.close()
    return locks.count(None)


def killed_study(arguments: list[str], study: Path, when: Sequence[float], log: Path) -> list[dict[str, Any]]:
    """Kills a study at these moments of the time that it has run, s, and lets it end; returns what each kill met."""
    kills: list[dict[str, Any]] = []
    ran = 0.0
    with log.open("ab") as stream:
        for number, moment in enumerate(when):
            process = subprocess.Popen(arguments, stdout=stream, stderr=stream, start_new_session=True)
            try:
                process.wait(moment - ran)
            except subprocess.TimeoutExpired:
                (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGKILL)
                process.wait()
            else:
                raise SystemExit(f"the study ended (status {process.returncode}) after {number} kills: see {log}")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    if process.poll() is None:  # this benchmark was interrupted
                        os.killpg(process.pid, signal.SIGKILL)
            ran = moment
            time.sleep(0.5)  # for what dies with the runner
            who = "runner and its group" if number % 2 else "runner"
            kills.append({"seconds": moment, "killed": who, **state(study), "outlived": alive(study)})
            print(kills[-1], flush=True)
        subprocess.run(arguments, check=True, stdout=stream, stderr=stream)
    return kills


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Records as they were written, with those that are there twice."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def differences(whole: Sequence[Mapping[str, Any]], killed: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not the same in the records of two studies, by run and field."""
    names = [[record["id"] for record in records] for records in (whole, killed)]
    found = [f"{name}: lost" for name in names[0] if name not in names[1]]
    found += [f"{name}: in the killed study alone" for name in names[1] if name not in names[0]]
    for which, counts in zip(("uninterrupted", "killed"), map(Counter, names), strict=True):
        found += [f"{name}: {times} times in the {which} study" for name, times in counts.items() if times > 1]
    if not found and names[0] != names[1]:
        found.append("the order of the runs")
    others = {record["id"]: record for record in killed}
    for one in whole:
        other = others.get(one["id"])
        if other is not None:
            found += [f"{one['id']}: {text}" for text in _unlike("", dict(one), dict(other)) if text]
    return found


def _unlike(path: str, one: Any, other: Any) -> Iterator[str]:
    """Fields whose values differ, with both and, of numbers, by how much."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            if path or key not in NOT_COMPARED:
                below = f"{path}.{key}" if path else key
                if key in one and key in other:
                    yield from _unlike(below, one[key], other[key])
                else:
                    yield f"{below} is in one alone"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _unlike(f"{path}[{number}]", a, b)
    elif type(one) is not type(other) or one != other:
        numbers = all(isinstance(value, int | float) for value in (one, other))
        yield f"{path} {one!r} and {other!r}" + (f" ({other - one:+.3g})" if numbers else "")


def last_weights(job: Path) -> dict[str, Any]:
    """Weights, plain and averaged, of the last checkpoint of a run."""
    files = list(job.glob(f"run/version_*/{LAST}"))
    if not files:
        return {}
    checkpoint = read_checkpoint(max(files, key=lambda file: file.stat().st_mtime_ns))
    parts = {part: checkpoint.get(part, {}) for part in ("state_dict", "current_model_state")}
    return {f"{p}.{k}": v for p, held in parts.items() for k, v in held.items() if isinstance(v, torch.Tensor)}


def unlike_weights(whole: Path, killed: Path) -> list[str]:
    """Runs of two studies whose last weights differ."""
    found = []
    for job in sorted(path for path in (whole / "jobs").iterdir() if path.is_dir()):
        one, other = last_weights(job), last_weights(killed / "jobs" / job.name)
        if not one or one.keys() != other.keys():
            found.append(f"{job.name}: other weights, or none")
            continue
        wrong = [name for name in one if not torch.equal(one[name], other[name])]
        found += [f"{job.name}: weights {wrong[0]} and {len(wrong) - 1} more"] if wrong else []
    return found


def fitted(study: Path) -> tuple[int, str, str]:
    """Status, output and ``fit.json`` of ``escaip scaling fit``."""
    with contextlib.redirect_stdout(io.StringIO()) as stream, contextlib.redirect_stderr(stream):
        status = main_of_escaip(["scaling", "fit", str(study)])
    file = study / "fit.json"
    return status, stream.getvalue().replace(str(study), "DIR"), file.read_text("utf-8") if file.is_file() else ""


def compared(whole: Path, killed: Path) -> dict[str, Any]:
    """What differs between two studies, and what their fits are."""
    found, count = [], 0
    for name in ("records.jsonl", "sweep.jsonl"):
        files = [study / name for study in (whole, killed)]
        records = [read_lines(file) if file.is_file() else [] for file in files]
        found += differences(*records)
        count += len(records[0])
    if (whole / "study.json").read_bytes() != (killed / "study.json").read_bytes():
        found.append("study.json")
    found += unlike_weights(whole, killed)
    fits = [fitted(study) for study in (whole, killed)]
    for part, one, other in zip(("status", "output", "fit.json"), *fits, strict=True):
        if one != other:
            found.append(f"{part} of escaip scaling fit")
    left = sorted(file.name for file in killed.rglob("*.part"))
    return {"records": count, "different": found, "fit_status": fits[0][0], "fit": fits[0][1], "left_aside": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smoke", help="study: a file or a recipe (default: smoke)")
    parser.add_argument("--kills", type=int, default=5, help="default: 5")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    for name, kind in REDUCED.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+", help="instead of the recipe's")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes", help="of every run")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config, whole, killed = folder / "study.yaml", folder / "whole" / "study", folder / "killed" / "study"
        write_study(args, config)
        began = time.perf_counter()
        subprocess.run(command(args, config, whole), check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        print(f"uninterrupted: {seconds:.0f} s", flush=True)
        when = moments(seconds, args.kills, random.Random(args.seed))
        kills = killed_study(command(args, config, killed), killed, when, folder / "killed.txt")
        result = compared(whole, killed)
    header = ["kill", "at, s", "who", "runs done", "begun", "with a checkpoint", "outlived it"]
    names = ("killed", "finished", "begun", "with_checkpoint", "outlived")
    rows = [[str(n), f"{k['seconds']:.0f}", *(str(k[x]) for x in names)] for n, k in enumerate(kills, 1)]
    print(result["fit"], markdown_table(header, rows), sep="\n")
    print(f"{result['records']} records: {'; '.join(result['different']) or 'the same to the last bit'}")
    if args.out:
        content = {"uninterrupted_seconds": seconds, "workers": args.workers, "kills": kills, **result}
        write_json(args.out, {"provenance": provenance(), "not_compared": NOT_COMPARED, **content})
    if result["different"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
