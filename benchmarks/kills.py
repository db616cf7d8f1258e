"""Runs that are killed without warning, over and over, beside one that is not: is the result the same, bit for bit?

python benchmarks/kills.py --model FILE --structure FILE [--kills 20] [--steps 4000] [--formats extxyz traj]

For every format a run of ``escaip md`` goes through once. A second one gets SIGKILL after a random time, is continued
with ``--resume``, gets another, and so on until it has been killed so many times, and is then left to end. Compared are
every frame of both trajectories (positions, momenta, forces, energy) and every column of the logs but the speed.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown_table, provenance, write_json

from escaip.simulate import read_log, read_trajectory


def command(args: argparse.Namespace, out: Path, *more: str) -> list[str]:
    """Of ``escaip md``."""
    return [
        sys.executable, "-m", "escaip", "md", str(args.model), str(args.structure), "--ensemble", "nvt",
        "--temperature", "300", "--steps", str(args.steps), "--interval", "7", "--trajectory-interval", "13",
        "--restart-interval", "40", "--seed", "3", "--quiet", "--out", str(out), *more,
    ]  # fmt: skip


def killed_run(args: argparse.Namespace, out: Path, seconds: float, rng: random.Random) -> list[int]:
    """Kills a run at random moments; returns the steps of the last log line at each kill."""
    steps: list[int] = []
    log = out.with_suffix(".csv")
    while len(steps) < args.kills:
        more = ["--resume"] if out.with_suffix(".restart.npz").exists() else ["--overwrite"]
        process = subprocess.Popen(command(args, out, *more), stderr=subprocess.PIPE, text=True)
        before = log.stat().st_mtime_ns if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
            time.sleep(0.01)  # until it has begun: a kill while libraries are loaded tells nothing
        time.sleep(rng.uniform(0.0, 1.2 * seconds / (args.kills + 1)))
        if process.poll() is not None:
            if process.returncode:
                raise SystemExit(process.stderr.read() if process.stderr else "the run failed")
            raise SystemExit(f"the run ended after {len(steps)} kills: raise --steps")
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = log.read_bytes().split(b"\n")
        steps.append(int(lines[-2].split(b",")[0]) if len(lines) > 2 else 0)
    subprocess.run(command(args, out, "--resume"), check=True, stdout=subprocess.DEVNULL)
    return steps


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same."""
    found = []
    frames = [list(read_trajectory(path)) for path in (one, other)]
    if len(frames[0]) != len(frames[1]):
        found.append(f"{len(frames[0])} and {len(frames[1])} frames")
    for a, b in zip(*frames, strict=False):
        values = [(x.positions, x.get_momenta(), x.get_forces(), x.get_potential_energy()) for x in (a, b)]
        if not all(np.array_equal(x, y) for x, y in zip(*values, strict=True)):
            found.append(f"frame of step {a.info['step']}")
    logs = [read_log(path.with_suffix(".csv")) for path in (one, other)]
    for name in logs[0]:
        if name != "ns_per_day" and not np.array_equal(logs[0][name], logs[1][name], equal_nan=True):
            found.append(f"column {name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--structure", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--formats", nargs="+", default=["extxyz", "traj"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for suffix in args.formats:
        with tempfile.TemporaryDirectory() as folder:
            whole, killed = (Path(folder) / f"{name}.{suffix}" for name in ("whole", "killed"))
            began = time.perf_counter()
            subprocess.run(command(args, whole), check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - began
            steps = killed_run(args, killed, seconds, random.Random(args.seed))
            rows.append({"format": suffix, "killed_at": steps, "different": differences(whole, killed)})
        print(f"{suffix}: killed at {steps}: {rows[-1]['different'] or 'the same to the last bit'}", flush=True)
    print(markdown_table(
        ["format", "kills", "different"],
        [[r["format"], str(len(r["killed_at"])), "; ".join(r["different"]) or "nothing"] for r in rows],
    ))  # fmt: skip
    if args.out:
        content = provenance()
        content["command"] = f"python benchmarks/kills.py --model FILE --structure FILE --steps {args.steps} ..."
        write_json(args.out, {"provenance": content, "steps": args.steps, "runs": rows})


if __name__ == "__main__":
    main()
