"""Is a change better? Trains arms on many sets at equal steps, several seeds each, and reports errors as a table.

    python benchmarks/accuracy/bench.py --data ../shared/data --arms before default
    python benchmarks/accuracy/bench.py --arms before soap --sets threebpa inp --seeds 0 --report
    python benchmarks/accuracy/bench.py --sets inp silicon_snap --frames 50 100 0

An arm is a list of options of ``escaip fit`` (``arms.yaml``, or a file of the same form given with --arms-file), or
``mace``: MACE small, in an environment of its own that is made the first time, on the same energies and forces for as
many CPU seconds as ``default`` took. Each arm, set and seed is one run on one core. After an interruption the same
command keeps what is finished and resumes what was begun from its last checkpoint. ``OUT/ARM/SET/SEED/cell.json``
holds one run (``SEED-N`` one on N structures, for learning curves), ``OUT/accuracy.json`` and ``OUT/accuracy.md`` all.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import yaml
from accuracy import mace, measures
from accuracy.sets import SETS, kinds_of, thinned
from common import markdown_table, provenance, write_json
from real_data import best_checkpoint, fit_arguments

from escaip import Potential, load_potential
from escaip.data import AtomicData, Store
from escaip.errors import DataError
from escaip.evaluate import evaluate
from escaip.files import write_file

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
MACE = "mace"
MILLI = {"energy": "meV/atom", "forces": "meV/Å", "stress": "meV/Å³"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: an arm's changes on a set, or on a number of its training structures, with a seed."""

    arm: str
    changes: dict[str, Any]
    name: str
    seed: int
    steps: int
    out: Path
    frames: int  # 0 for all

    @property
    def title(self) -> str:
        return f"{self.name}, {self.frames} frames" if self.frames else self.name

    @property
    def folder(self) -> Path:
        return self.out / self.arm / self.name / (f"{self.seed}-{self.frames}" if self.frames else str(self.seed))

    def plan(self) -> dict[str, Any]:
        """What the numbers of the cell depend on, beside the code."""
        recipe = SETS[self.name].real.config.read_bytes()
        return {
            "changes": self.changes, "steps": self.steps, "seed": self.seed,
            "recipe": hashlib.sha256(recipe).hexdigest()[:12], **({"frames": self.frames} if self.frames else {}),
        }  # fmt: skip

    def finished(self) -> dict[str, Any] | None:
        return written(self.folder, self.plan())


def written(folder: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the finished cell of a folder, or None.

    Raises:
        SystemExit: it was made with other settings.
    """
    path = folder / "cell.json"
    if not path.exists():
        return None
    cell: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if cell["plan"] != plan:
        raise SystemExit(f"{path} was made with other settings: remove its folder, or give another --out")
    return cell


def run(cell: Cell, stores: dict[str, Path]) -> dict[str, Any]:
    """Trains a cell, or goes on with it, and measures it in a process of its own."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    chosen = SETS[cell.name]
    parts = {part: stores[part] for part in ("train", "val", "test")}
    if cell.frames:
        parts["train"] = thinned(stores["train"], cell.frames)
    changes = {"seed_everything": cell.seed, **chosen.options(cell.changes)}
    command = [sys.executable, "-m", "escaip"]
    command += fit_arguments(chosen.real, parts, cell.folder, cell.steps, changes)
    begun = cell.folder / "begun"
    if list((cell.folder / "runs").glob("version_*/last.ckpt")):
        command += ["--ckpt_path", "last"]
    whole = cell.arm == MACE or not begun.exists()  # else the seconds of the part that was interrupted are not known
    begun.touch()
    if cell.arm == MACE:
        seconds = mace.train(parts, cell.folder, cell.seed, seconds_of_default(cell), child)
    else:
        seconds = child(command, cell.folder / "fit.log")
    measuring = [sys.executable, __file__, "--measure", str(cell.folder), "--only", cell.name]
    for name, path in stores.items():
        measuring += ["--store", f"{name}={path}"]
    child(measuring, cell.folder / "measure.log")
    found = json.loads((cell.folder / "measured.json").read_text("utf-8"))
    result = {"plan": cell.plan(), "commit": provenance()["commit"], "cpu_seconds": seconds if whole else None, **found}
    write_json(cell.folder / "cell.json", result)
    print(f"{cell.arm} on {cell.title}, seed {cell.seed}: {brief(result)}", flush=True)
    return result


def seconds_of_default(cell: Cell) -> float:
    """CPU seconds of the same run by the default.

    Raises:
        SystemExit: it is not finished, or was interrupted.
    """
    path = dataclasses.replace(cell, arm="default").folder / "cell.json"
    seconds = json.loads(path.read_text("utf-8"))["cpu_seconds"] if path.exists() else None
    if seconds is None:
        raise SystemExit(f"mace trains as long as default: run --arms default first, without a break ({path})")
    return float(seconds)


def brief(cell: dict[str, Any]) -> str:
    test = cell["errors"]["test"]
    return ", ".join(f"{name} {test[name]:.3g} {unit}" for name, unit in MILLI.items() if name in test)


def child(command: list[str], log: Path, folder: Path = ROOT) -> float:
    """Runs a command on one core in a folder; returns its CPU seconds.

    Raises:
        SystemExit: it failed; the end of its output is shown.
    """
    with log.open("ab") as stream:
        process = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        tail = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-8:])
        raise SystemExit(f"accuracy: {log} ended with status {os.waitstatus_to_exitcode(status)}:\n{tail}")
    return usage.ru_utime + usage.ru_stime


def measure(folder: Path, name: str, stores: dict[str, Path]) -> None:
    """Writes ``measured.json``: errors on the validation part and on all tests, by kind, and the further measures."""
    torch.set_num_threads(1)
    chosen, which = SETS[name], SETS[name].measures
    if (folder / "train_stagetwo.model").exists():
        elements = sorted({int(number) for one in Store(stores["train"]) for number in one.atomic_numbers})
        potential: Any = mace.TrainedMACE(folder, elements)
        mean_errors: Callable[[Sequence[AtomicData]], dict[str, float]] = potential.errors
        which = tuple(one for one in which if one not in measures.OURS_ONLY)
    else:
        potential = load_potential(best_checkpoint(folder / "runs"))
        mean_errors = partial(errors_of_ours, potential, free_atoms_only=chosen.real.free_atoms_only)
    errors: dict[str, dict[str, float]] = {}
    for part, path in stores.items():
        if part != "train":
            errors |= errors_of(mean_errors, path, part, kinds_of(chosen, path))
    values: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for one in which:
            values |= getattr(measures, one)(potential, stores, Path(scratch))
    parameters = potential.parameters
    parameters = parameters if isinstance(parameters, int) else sum(weight.numel() for weight in parameters())
    write_json(folder / "measured.json", {"errors": errors, "measures": values, "parameters": parameters})


def errors_of(
    mean_errors: Callable[[Sequence[AtomicData]], dict[str, float]], path: Path, part: str, kinds: list[str]
) -> dict[str, dict[str, float]]:
    """Mean absolute errors of a part and, for tests, of each kind in it; meV/atom, meV/Å, meV/Å³."""
    structures = list(Store(path))
    groups = {part: structures}
    if part in ("test", "hot") and len(set(kinds)) > 1:
        for kind in sorted(set(kinds)):
            groups[f"{part}: {kind}"] = [one for one, own in zip(structures, kinds, strict=True) if own == kind]
    return {title: mean_errors(members) for title, members in groups.items()}


def errors_of_ours(potential: Potential, structures: Sequence[AtomicData], free_atoms_only: bool) -> dict[str, float]:
    report, _ = evaluate(potential, structures, free_atoms_only=free_atoms_only)
    mae = {"energy": report.energy_per_atom, "forces": report.forces, "stress": report.stress}
    return {key: 1e3 * value.errors.mae for key, value in mae.items() if value is not None}


def table(cells: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """One row for each set, error or measure; one column for each arm, the mean of its seeds and half their range."""
    arms = list(cells)
    rows = []
    for name in dict.fromkeys(name for sets in cells.values() for name in sets):
        done = [cells[arm].get(name, []) for arm in arms]
        for label in dict.fromkeys(label for of_arm in done for cell in of_arm for label in figures(cell)):
            values = [[figures(cell)[label] for cell in of_arm if label in figures(cell)] for of_arm in done]
            rows.append([name, label, *(spelled(one) for one in values)])
    return markdown_table(["set", "what", *arms], rows)


def figures(cell: dict[str, Any]) -> dict[str, float]:
    """All numbers of a cell by what they are."""
    found = {} if cell["cpu_seconds"] is None else {"CPU seconds": cell["cpu_seconds"]}
    for part, errors in cell["errors"].items():
        found |= {f"{part}, {name} ({MILLI[name]})": value for name, value in errors.items()}
    return {**found, **cell["measures"]}


def spelled(values: list[float]) -> str:
    if not values:
        return ""
    mean = float(np.mean(values))
    text = f"{mean:.0f}" if abs(mean) >= 1000 else f"{mean:.3g}"
    return f"{text} ± {np.ptp(values) / 2:.1g}" if len(values) > 1 else text


def gather(cells: Iterable[Cell]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in cells:
        if (done := cell.finished()) is not None:
            found.setdefault(cell.arm, {}).setdefault(cell.title, []).append(done)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--arms", nargs="+", default=["before", "default"], metavar="ARM")
    parser.add_argument("--arms-file", type=Path, default=Path(__file__).with_name("arms.yaml"))
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=list(SETS), metavar="SET")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[0], metavar="N",
        help="train on so many structures, evenly spread over the training part; 0 for all (default)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, help="instead of the set's own, for a dry run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--report", action="store_true", help="run nothing; report what is finished")
    for hidden in ("--measure", "--only"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--store", action="append", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        given = (one.split("=", 1) for one in options.store)
        return measure(Path(options.measure), options.only, {name: Path(path) for name, path in given})
    known = {**yaml.safe_load(options.arms_file.read_text("utf-8")), MACE: {}}
    for arm in options.arms:
        if arm not in known:
            raise SystemExit(f"accuracy: no arm {arm} in {options.arms_file}: it has {', '.join(known)}")
    out = options.out.resolve()
    cells = [
        Cell(arm, known[arm], name, seed, options.steps or SETS[name].steps, out, frames)
        for name in options.sets for frames in options.frames for seed in options.seeds for arm in options.arms
    ]  # fmt: skip
    if not options.report:
        try:
            stores = {name: SETS[name].stores(options.data.resolve(), out / "data") for name in options.sets}
            for name in options.sets:
                for frames in filter(None, options.frames):  # here, not where several runs at once would
                    thinned(stores[name]["train"], frames)
        except DataError as error:
            raise SystemExit(f"accuracy: {error}") from error
        for of_mace in (False, True):  # those last: they take as long as others did
            now = [cell for cell in cells if (cell.arm == MACE) == of_mace and not cell.finished()]
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(lambda cell: run(cell, stores[cell.name]), now))
    found = gather(cells)
    write_json(out / "accuracy.json", {"provenance": provenance(), "cells": found})
    write_file(out / "accuracy.md", table(found) + "\n")
    print(table(found))
    return None


if __name__ == "__main__":
    main()
