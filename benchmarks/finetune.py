"""Is it better to start from a potential? Fine-tuning beside training from nothing, for the same CPU seconds.

    python benchmarks/finetune.py --data ../shared/data
    python benchmarks/finetune.py --base organic.escaip --arms tuned nothing --frames 50 --seeds 0

``before``   the base as it is
``tuned``    the base, trained on frames of 3BPA (DFT)
``lora``     the same with low-rank updates; ``lora_fast`` at ten times the learning rate
``replay``   the same with data that the base was trained on mixed in, under a head of their own
``self``     the same with labels that the base gives to the frames themselves
``nothing``  random weights, the recipe threebpa, as many CPU seconds as ``tuned``
``xtb``      the same on 450 frames with labels of GFN2-xTB
``heads``    one trunk with a head for these and one for the fewest DFT frames, as many CPU seconds as both together

Errors are those of the last weights, so that no frame reported on has chosen anything: on 50 frames of 3BPA, and on
molecules of the base's own data that were held out of its training (by the command in md/potentials) and have the
elements of 3BPA. Levels of theory differ there, so energies count up to atomic energies and energies of charges, which
are fitted to another part held out. Each cell is one run on one core. After an interruption the same command keeps what
is finished; what was begun starts over, since its CPU seconds count. ``OUT/ARM/FRAMES/SEED/cell.json`` holds one run,
``OUT/finetune.json`` and ``OUT/finetune.md`` all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from accuracy import xtb
from accuracy.bench import MILLI, ROOT, child, spelled, written
from accuracy.sets import SETS
from common import markdown_table, provenance, write_json
from real_data import NUM_VALIDATIONS, fit_arguments

from escaip import Potential, load_potential
from escaip.data import AtomicData, Store, open_source
from escaip.data.prepare import prepare
from escaip.errors import EscaipError
from escaip.files import model_file, sha256, write_file
from escaip.models import MAX_ATOMIC_NUMBER
from escaip.potential.atomic_energies import Composition, fit_compositions
from escaip.train.arguments import find_checkpoint
from escaip.types import MAX_CHARGE

THREEBPA = SETS["threebpa"]
BASE_DATA = ("molecular/spice_des_monomers_GFN2.hdf5", "molecular/spice_amino_acid_ligand_GFN2.hdf5")
HELD_OUT, NUM_TRAIN = 10, 450  # every tenth frame of 500; the others
ELEMENTS = {1, 6, 7, 8}
RATE = 4e-4  # of the arms that start from the base: a tenth of the recipe's
# Arms that take the CPU seconds of `tuned` so many times; the others take as many steps.
TIMES = {"nothing": 1, "xtb": 1, "heads": 2}
FEWEST_ONLY = ("xtb", "heads")
ARMS = ("before", "tuned", "lora", "lora_fast", "replay", "self", *TIMES)
SECTIONS = {
    "From a potential and from nothing, for the same CPU seconds": ("tuned", "nothing"),
    "What is forgotten": ("before", "tuned", "replay", "self"),
    "Low-rank updates": ("tuned", "lora", "lora_fast"),
    "One trunk with two levels of theory beside two models": ("heads", "nothing", "xtb"),
}
PARTS = {"dft": "3BPA, DFT", "xtb": "3BPA, GFN2-xTB", "base": "data of the base"}


def options(arm: str, frames: int, files: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Options of ``escaip fit`` for an arm that trains on a number of DFT frames; ``files`` as of ``make_files``."""
    parts = {
        "dft": {"data.train": str(files[f"dft_{frames}"]), "data.val": str(files["dft_val"])},
        "xtb": {"data.train": str(files["xtb_train"]), "data.val": str(files["xtb_val"])},
    }

    def named(*levels: str) -> dict[str, str]:
        return {part: json.dumps({level: parts[level][part] for level in levels}) for part in parts["dft"]}

    start = {"model.init_from": base, "model.learning_rate": RATE}
    two = {"model.architecture.num_energy_heads": 2}
    return {
        "data.split": json.dumps({"by": "structure", "val": 0, "test": 0}),
        **{
            "tuned": {**start, **parts["dft"]},
            "lora": {**start, **parts["dft"], "model.lora": 8},
            "lora_fast": {**start, **parts["dft"], "model.lora": 8, "model.learning_rate": 10 * RATE},
            "replay": {**start, **named("dft"), **two, "data.replay": str(files["base"])},
            "self": {**start, **named("dft"), **two, "data.replay_labels": "self"},
            "nothing": parts["dft"],
            "xtb": {**parts["xtb"], "model.level_of_theory": "GFN2-xTB"},
            "heads": {**named("dft", "xtb"), **two, "data.sampling": json.dumps({"weights": {"dft": 0.5, "xtb": 0.5}})},
        }[arm],
    }


@dataclass(frozen=True)
class Cell:
    """One run: an arm on a number of DFT frames with a seed."""

    arm: str
    frames: int  # 0 for none
    seed: int
    steps: int  # of the arms that are not in TIMES
    base: str
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / self.arm / str(self.frames) / str(self.seed)

    def plan(self) -> dict[str, Any]:
        """What the numbers of the cell depend on, beside the code."""
        base = {"base": sha256(self.base)[:12]}
        if self.arm == "before":
            return base
        names = {name: name for name in (f"dft_{self.frames}", "dft_val", "xtb_train", "xtb_val", "base")}
        return {
            **base, "recipe": hashlib.sha256(THREEBPA.real.config.read_bytes()).hexdigest()[:12], "steps": self.steps,
            "seed": self.seed, "changes": options(self.arm, self.frames, names, "base"),
        }  # fmt: skip

    def finished(self) -> dict[str, Any] | None:
        return written(self.folder, self.plan())


def make_files(data: Path, folder: Path, counts: Iterable[int]) -> dict[str, Path]:
    """Writes what is trained on and measured on; what is there already is used again.

    Returns:
        3BPA as extxyz: ``dft_N`` for each count, the smaller in the larger ones, and ``dft_val``; ``xtb_train`` and
        ``xtb_val``, all frames with labels of GFN2-xTB. ``base``: a store divided as md/potentials says.
    """
    frames: list[Any] = ase.io.read(data / str(THREEBPA.real.source), ":")  # type: ignore[assignment]
    held_out = frames[HELD_OUT // 2 :: HELD_OUT]
    train = [one for index, one in enumerate(frames) if index % HELD_OUT != HELD_OUT // 2]
    parts = {f"dft_{count}": [train[k * len(train) // count] for k in range(count)] for count in counts}
    parts |= {"dft_train": train, "dft_val": held_out}
    makers = {name: partial(list, members) for name, members in parts.items()}
    for name, members in (("xtb_train", train), ("xtb_val", held_out)):
        makers[name] = lambda members=members: [xtb.labelled(one) for one in members]
    files = xtb.write(makers, folder)
    files["base"] = folder / "base"
    if not files["base"].exists():
        split = {"by": "group", "val": 0.1, "test": 0.1}
        prepare([data / name for name in BASE_DATA], files["base"], format="spice", split=split)
    return files


def run(cell: Cell, files: Mapping[str, Path]) -> None:
    """Trains a cell and measures it."""
    shutil.rmtree(cell.folder, ignore_errors=True)
    cell.folder.mkdir(parents=True)
    found: dict[str, Any] = {"plan": cell.plan(), "commit": provenance()["commit"]}
    model: Path | str = cell.base
    if cell.arm != "before":
        steps = steps_in_time(cell, files) if cell.arm in TIMES else cell.steps
        found |= {"steps": steps, "cpu_seconds": fit(cell, files, steps, cell.folder)}
        model = find_checkpoint("last", cell.folder / "runs")
    found["errors"] = measure(load_potential(model, device="cpu"), cell.arm, files)
    write_json(cell.folder / "cell.json", found)
    shown = ", ".join(f"{label} {value:.3g}" for label, value in figures(found).items())
    print(f"{cell.arm}, {cell.frames} frames, seed {cell.seed}: {shown}", flush=True)


def fit(cell: Cell, files: Mapping[str, Path], steps: int, folder: Path) -> float:
    """Trains a cell in a folder and returns the CPU seconds."""
    changes = {"seed_everything": cell.seed, **options(cell.arm, cell.frames, files, cell.base)}
    command = [sys.executable, "-m", "escaip", *fit_arguments(THREEBPA.real, {}, folder, steps, changes)]
    return child(command, cell.folder / "fit.log")


def steps_in_time(cell: Cell, files: Mapping[str, Path]) -> int:
    """Steps that fit the CPU seconds of ``tuned``, with start and validations, by two short runs.

    Raises:
        SystemExit: ``tuned`` has not run.
    """
    tuned = replace(cell, arm="tuned").finished()
    if tuned is None:
        raise SystemExit(f"finetune: {cell.arm} trains as long as tuned: run --arms tuned {cell.arm}")
    seconds = TIMES[cell.arm] * tuned["cpu_seconds"]
    few, more = NUM_VALIDATIONS, NUM_VALIDATIONS * max(3, cell.steps // (8 * NUM_VALIDATIONS))
    taken = [fit(cell, files, steps, cell.folder / "timing") for steps in (few, more)]
    shutil.rmtree(cell.folder / "timing")
    step = max((taken[1] - taken[0]) / (more - few), 1e-2)
    return few + NUM_VALIDATIONS * max(0, round((seconds - taken[0]) / step / NUM_VALIDATIONS))


def measure(potential: Potential, arm: str, files: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Mean absolute errors on each part that the arm says something about."""
    counts = {"dft": arm != "xtb", "xtb": arm in ("xtb", "heads"), "base": arm not in TIMES}
    found = {}
    for part in (part for part in PARTS if counts[part]):
        if part in potential.datasets:
            potential.choose_dataset(part)
        if part == "base":
            structures, others = of_base(files["base"], "test"), of_base(files["base"], "val")
        else:
            structures = list(open_source(files[f"{part}_val"]))
            others = list(open_source(files[f"{part}_train"])) if arm == "before" else []
        found[part] = errors_of(potential, structures, others)
    return found


def of_base(path: Path, split: str) -> list[AtomicData]:
    """Structures of a split of the base's data that have the elements of 3BPA."""
    store = Store(path)
    found = (store[int(index)] for index in store.split_indices(split))
    return [one for one in found if ELEMENTS.issuperset(one.atomic_numbers.tolist())]


def errors_of(potential: Potential, structures: Sequence[AtomicData], others: Sequence[AtomicData]) -> dict[str, float]:
    """Mean absolute errors, meV/atom and meV/Å; of energies what a fit of atomic energies to others leaves."""

    def left(members: Sequence[AtomicData], found: Sequence[Any]) -> list[Composition]:
        pairs = zip(members, found, strict=True)
        return [Composition.of(one)._replace(energy=float(one.energy) - own.energy) for one, own in pairs]

    rows = left(others, potential.predict(others, compute_forces=False))
    elements = sorted({number for one in others for number in one.atomic_numbers.tolist()})
    zeros = torch.zeros(MAX_ATOMIC_NUMBER + 1).double(), torch.zeros(2 * MAX_CHARGE + 1).double()
    atomic, charged = fit_compositions(rows, *zeros, elements, sorted({row.charge for row in rows} - {0}))
    found = potential.predict(structures)
    energies = [
        (row.energy - float(row.numbers @ atomic + charged[row.charge + MAX_CHARGE])) / float(row.numbers.sum())
        for row in left(structures, found)
    ]
    pairs = zip(found, structures, strict=True)
    forces = np.concatenate([np.asarray(own.forces) - one.forces.double().numpy() for own, one in pairs])
    return {name: 1e3 * float(np.abs(error).mean()) for name, error in (("energy", energies), ("forces", forces))}


def figures(cell: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a cell by what they are."""
    found = {label: cell[key] for label, key in (("steps", "steps"), ("CPU seconds", "cpu_seconds")) if key in cell}
    for part, errors in cell["errors"].items():
        found |= {f"{PARTS[part]}: {name} ({MILLI[name]})": value for name, value in errors.items()}
    return found


def report(cells: Mapping[str, Mapping[int, Mapping[int, Mapping[str, Any]]]], base: str) -> str:
    """Tables of finished cells, given by arm, frames and seed."""
    text = [
        f"Started from {base}. Mean absolute errors; the mean of the seeds and half their range.",
        "Energies on data of the base: up to atomic energies.",
    ]
    for title, arms in SECTIONS.items():
        few = {frames for arm in FEWEST_ONLY if arm in arms for frames in cells.get(arm, {})}
        rows = {
            (frames, arm): [figures(cell) for cell in seeds.values()]
            for arm in arms for frames, seeds in cells.get(arm, {}).items() if not few or frames in few
        }  # fmt: skip
        fullest = sorted((one for found in rows.values() for one in found), key=len, reverse=True)
        labels, table = list(dict.fromkeys(label for one in fullest for label in one)), []
        for frames, arm in sorted(rows, key=lambda row: row[0]):
            values = [[one[label] for one in rows[frames, arm] if label in one] for label in labels]
            table.append([str(frames), arm, str(len(rows[frames, arm])), *map(spelled, values)])
        text.append(f"## {title}\n\n" + markdown_table(["frames", "arm", "seeds", *labels], table))
    return "\n\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--base", default="example:organic", help="what to start from; trained on data as that is")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--frames", type=int, nargs="+", default=[50, 150, 450], metavar="N", help="of DFT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=THREEBPA.steps, help="of tuned (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--report", action="store_true", help="run nothing; report what is finished")
    given = parser.parse_args()
    try:
        run_all(given)
    except EscaipError as error:
        raise SystemExit(f"finetune: {error}") from error


def run_all(given: argparse.Namespace) -> None:
    """Runs and reports the cells that were asked for."""
    if not 1 <= min(given.frames) <= max(given.frames) <= NUM_TRAIN:
        raise SystemExit(f"finetune: --frames: give 1 to {NUM_TRAIN}")
    out = given.out.resolve()
    base = str(model_file(given.base).resolve())
    cells = [Cell("before", 0, 0, given.steps, base, out)] if "before" in given.arms else []
    for arm in (arm for arm in given.arms if arm != "before"):
        counts = [min(given.frames)] if arm in FEWEST_ONLY else given.frames
        cells += [Cell(arm, frames, seed, given.steps, base, out) for frames in counts for seed in given.seeds]
    if not given.report:
        files = make_files(given.data.resolve(), out / "data", given.frames)
        for timed in (False, True):  # those last: they take as long as others did
            now = [cell for cell in cells if (cell.arm in TIMES) == timed and not cell.finished()]
            with ThreadPoolExecutor(given.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(lambda cell: run(cell, files), now))
    found: dict[str, Any] = {}
    for cell in cells:
        if (done := cell.finished()) is not None:
            found.setdefault(cell.arm, {}).setdefault(cell.frames, {})[cell.seed] = done
    write_json(out / "finetune.json", {"provenance": provenance(), "cells": found})
    write_file(out / "finetune.md", report(found, given.base))
    print(report(found, given.base))


if __name__ == "__main__":
    main()
