"""Kills ``escaip data prepare`` without warning at random moments and runs it again: nothing may be lost or doubled.

    python benchmarks/prepare_faults.py [--kills 20] [--out results.json]

Each trial starts the command on the committed SPICE sample, written as many extended XYZ files, kills it (every second
time with its workers, else the parent alone) at a moment drawn over the time that an undisturbed run takes, and runs it
to its end. The store must hold the structures of an undisturbed one, in order, with the same checksums.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ase.io
from common import provenance, write_json

from escaip.data import Store, open_source
from escaip.files import resolve

FILES = 48


def write_files(folder: Path) -> None:
    """The sample in pieces."""
    structures = [data.to_ase() for data in open_source(resolve("dataset:spice/sample.hdf5"))]
    size = -(-len(structures) // FILES)
    for number in range(FILES):
        ase.io.write(folder / f"{number:03d}.extxyz", structures[number * size : (number + 1) * size])


def command(folder: Path, out: Path, workers: int) -> list[str]:
    """As a user types it."""
    arguments = ["data", "prepare", "ase", str(folder / "*.extxyz"), "--out", str(out), "--workers", str(workers)]
    return [sys.executable, "-m", "escaip", *arguments]


def trial(
    folder: Path, whole: Store, seconds: float, moment: float, workers: int, with_workers: bool
) -> dict[str, Any]:
    """One kill and what came of it."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "store"
        process = subprocess.Popen(command(folder, out, workers), stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(moment * seconds)
        (os.killpg if with_workers else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        work = out.parent / f".{out.name}.work"
        at_kill = {"parts": len(list(work.glob("part-*"))), "finished": out.is_dir()}
        if out.is_dir():
            kept = 0
        else:
            done = subprocess.run(command(folder, out, 1), capture_output=True, text=True, check=True)
            kept = next((int(line.split()[0]) for line in done.stdout.splitlines() if "were there" in line), 0)
        store = Store(out)
        store.verify()
        names = [data.structure_id for data in store]
        same = store.fingerprint == whole.fingerprint and names == [data.structure_id for data in whole]
        leftovers = sorted(entry.name for entry in out.parent.iterdir() if entry.name != out.name)
    return {
        "seconds": moment * seconds,
        "with_workers": with_workers,
        **at_kill,
        "kept": kept,
        "same": same,
        "doubled": len(names) - len(set(names)),
        "lost": len(whole) - len(set(names)),
        "leftovers": leftovers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="default: 20")
    parser.add_argument("--workers", type=int, default=2, help="of the runs that are killed (default: 2)")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_files(folder)
        start = time.perf_counter()
        subprocess.run(command(folder, folder / "whole", options.workers), check=True, capture_output=True)
        seconds = time.perf_counter() - start
        whole = Store(folder / "whole")
        trials = []
        for number in range(options.kills):
            moment = rng.uniform(0.6, 1.0)  # before that, Python imports
            trials.append(trial(folder, whole, seconds, moment, options.workers, with_workers=number % 2 == 1))
            print(trials[-1], flush=True)
    wrong = sum(not item["same"] for item in trials)
    print(f"{len(trials)} kills, {wrong} stores that differ from the undisturbed one")
    if options.out:
        write_json(options.out, {"provenance": provenance(), "undisturbed_seconds": seconds, "trials": trials})
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
