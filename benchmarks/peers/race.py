"""Our small preset against MACE small, trained for the same time on the same frames of the same machine in one run.

python benchmarks/peers/race.py --data DIR [--sets 3bpa inp] [--minutes 15] [--threads 2] [--compile true|false]
                                [--frames N] [--environments DIR] [--out FILE]

DIR holds molecular/3bpa_train_300K.xyz, molecular/3bpa_iso_atoms.xyz and materials/inp_fitsnap.extxyz.gz. One model
trains after the other, each by its own command and recipe, whose schedule ends when the time does: a short uncounted
training on a quarter of the frames measures the seconds per epoch, and so many whole epochs are asked for as fit best.
The clock runs from the start of the process to its last validation: imports, reading, compilation and validations are
in it. Both learn from energies and forces alone (no stress), and both keep averaged weights.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers
from ase.io import read, write
from common import markdown_table, provenance, write_json
from peers.environments import EnvironmentFailure, default_folder, interpreter
from peers.racing import (
    PARTS,
    Point,
    RaceFailure,
    baseline,
    curve,
    distinct,
    epochs_in,
    errors,
    labelled,
    last_words,
    parse_mace,
    parse_ours,
    split_frames,
    watch,
)

ADAPTERS = Path(__file__).resolve().parent / "adapters"
SEED = 0
CALIBRATION = 3  # epochs on a quarter of the frames
MANY = 1_000_000
HEADER = ["data", "model", "parameters", "epochs", "minutes", "energy MAE meV/atom", "force MAE meV/Å",
          "force RMSE meV/Å", "why not"]  # fmt: skip
ERRORS = ("energy_mae_meV_per_atom", "force_mae_meV_per_A", "force_rmse_meV_per_A")


@dataclass(frozen=True)
class DataSet:
    """Frames, our recipe for them, and the isolated atoms where there are any."""

    frames: str
    recipe: str
    isolated: str | None = None


SETS = {
    "3bpa": DataSet("molecular/3bpa_train_300K.xyz", "threebpa", "molecular/3bpa_iso_atoms.xyz"),
    "inp": DataSet("materials/inp_fitsnap.extxyz.gz", "inp"),
}


@dataclass
class Row:
    data: str
    model: str
    parameters: int | None = None
    epochs: int | None = None
    minutes: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    why: str | None = None


@dataclass(frozen=True)
class Racer:
    """One that takes part.

    Attributes:
        name: in the tables.
        python: of its environment.
        command: arguments of the Python for a number of epochs.
        parse: finds a validation in its output.
        predict: energies, forces and number of parameters by the model left in a folder, by name of the row.
    """

    name: str
    python: Path
    command: Callable[[int], list[str]]
    parse: Callable[[str, float], Point | None]
    predict: Callable[[Path], dict[str, tuple[np.ndarray, np.ndarray, int]]]


def our_command(recipe: str, compiled: bool, epochs: int) -> list[str]:
    """The recipe as it is, but for the stress, which nobody learns here, and the report, which is no training."""
    stress = ["--model.losses.stress.weight", "0"] if recipe == "inp" else []
    return [
        "-m", "escaip", "fit", "--config", recipe, "--data.train", "train.extxyz", "--data.val", "val.extxyz",
        "--data.split", "null", "--model.compile", str(compiled).lower(), *stress, "--trainer.max_epochs", str(epochs),
        "--trainer.accelerator", "cpu", "--evaluation.max_structures", "0", "--out", "runs", "--name", "race",
    ]  # fmt: skip


def mace_command(e0s: str, epochs: int) -> list[str]:
    """The example of MACE's README: its weights of energy and forces by default, stage two in the last quarter.

    r_max 5 Å, EMA 0.99, amsgrad, E0s. Small: 128x0e; ScaleShiftMACE, which begins at the mean energy;
    batches of 5 (10 by default), more steps in a short time; float32, by its README usually twice as fast.
    """
    second = max(1, min(round(0.75 * epochs), epochs - 1))  # by default 7 epochs would start it after 3
    return [
        "-m", "mace.cli.run_train", "--name", "race", "--seed", "123", "--train_file", "train.extxyz", "--valid_file",
        "val.extxyz", "--energy_key", "energy", "--forces_key", "forces", "--E0s", e0s, "--model", "ScaleShiftMACE",
        "--hidden_irreps", "128x0e", "--r_max", "5.0", "--scaling", "rms_forces_scaling", "--batch_size", "5",
        "--valid_batch_size", "10", "--lr", "0.01", "--amsgrad", "--ema", "--ema_decay", "0.99", "--swa",
        "--start_swa", str(second),
        "--max_num_epochs", str(epochs), "--eval_interval", "1", "--error_table", "PerAtomMAE", "--default_dtype",
        "float32", "--device", "cpu", "--plot", "False", "--pin_memory", "False",
    ]  # fmt: skip


def predict_ours(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """By the best checkpoint of the run, with averaged weights."""
    import escaip

    potential = escaip.load_potential(folder / "runs" / "race" / "version_0" / "best.ckpt", device="cpu")
    found = potential.predict(read_frames(folder.parent / "test.extxyz"))
    energies = np.array([float(item.energy) for item in found])
    forces = np.concatenate([np.asarray(item.forces) for item in found])
    return {"": (energies, forces, sum(parameter.numel() for parameter in potential.parameters()))}


def predict_mace(python: Path, folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """By the final model, which is that of stage two, and by the best of stage one."""
    found = {}
    for name, file in (("", "race_stagetwo.model"), (", stage one only", "race.model")):
        if not (folder / file).exists():
            continue
        out = folder / "prediction.npz"
        script = str(ADAPTERS / "mace_predict.py")
        done = subprocess.run(
            [str(python), script, file, str(folder.parent / "test.extxyz"), str(out)],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RaceFailure(f"prediction: {last_words(done.stderr.splitlines())}")
        with np.load(out) as arrays:
            found[name] = (arrays["energies"], arrays["forces"], int(arrays["parameters"]))
    if not found:
        raise RaceFailure("it left no model")
    return found


def read_frames(path: Path) -> list[Atoms]:
    frames = read(path, index=":")
    assert isinstance(frames, list)
    return frames


def isolated_energies(path: Path | None) -> str:
    if path is None:
        return "average"
    atoms = read_frames(path)
    energies = {atomic_numbers[atom.get_chemical_symbols()[0]]: float(atom.get_potential_energy()) for atom in atoms}
    return str(energies)


def write_parts(frames: list[Atoms], folder: Path, quarter: Path) -> dict[str, list[Atoms]]:
    """Writes train, val and test into ``folder``, and a quarter of each for the calibration."""
    parts = {}
    for name, indices in split_frames(len(frames), SEED).items():
        parts[name] = [labelled(frames[index]) for index in indices]
        write(folder / f"{name}.extxyz", parts[name], format="extxyz")
        write(quarter / f"{name}.extxyz", parts[name][: len(indices) // 4], format="extxyz")
    return parts


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def some(frames: list[Atoms], most: int | None) -> list[Atoms]:
    """So many of them, drawn by a fixed seed."""
    if most is None or most >= len(frames):
        return frames
    return [frames[index] for index in np.random.default_rng(SEED).choice(len(frames), most, replace=False)]


class Race:
    """All who take part on one data set.

    Args:
        name: of the data set.
        args: of the command line.
        folder: for everything that is written.
    """

    def __init__(self, name: str, args: argparse.Namespace, folder: Path) -> None:
        self.name, self.args, self.folder = name, args, folder
        self.quarter = folder / "quarter"
        self.quarter.mkdir(parents=True)
        frames = read_frames(args.data / SETS[name].frames)
        self.parts = write_parts(some(distinct(frames), args.frames), folder, self.quarter)
        self.result: dict[str, Any] = {
            "frames_in_file": len(frames),
            "split": {part: len(self.parts[part]) for part in PARTS},
            "atoms": {part: sum(len(atoms) for atoms in self.parts[part]) for part in PARTS},
            "labels": ["energy", "forces"],
            "models": {},
        }
        self.rows = [Row(name, "fit in the composition, zero forces")]
        self.rows[0].errors = errors(self.parts["test"], *baseline(self.parts["train"], self.parts["test"]))

    def run(self, racer: Racer) -> None:
        """Calibrates, trains, predicts; a failure becomes a row."""
        details: dict[str, Any] = {}
        self.result["models"][racer.name] = details
        row = Row(self.name, racer.name)
        try:
            self._train(racer, row, details)
        except (RaceFailure, OSError) as error:
            row.why = last_words([str(error)])
            self.rows.append(row)

    def _train(self, racer: Racer, row: Row, details: dict[str, Any]) -> None:
        trial = watch(
            self._command(racer, MANY), self._place(self.quarter, racer), self._variables(self.quarter, racer),
            racer.parse, CALIBRATION, wait=False, limit=1200.0 + 60.0 * self.args.minutes,
        )  # fmt: skip
        ratio = len(self.parts["train"]) / (len(self.parts["train"]) // 4)
        pace = ratio * trial.seconds_per_epoch
        details["calibration"] = {"start_up_s": trial.start_up, "seconds_per_epoch": pace, "minutes": trial.minutes}
        row.epochs = epochs_in(self.args.minutes, trial.start_up, pace)
        text = f"{trial.start_up:.0f} s to start, {pace:.1f} s per epoch, {row.epochs} epochs"
        print(f"{self.name}, {racer.name}: {text}", flush=True)
        command = racer.command(row.epochs)
        details["command"] = " ".join(["python", *command])
        place = self._place(self.folder, racer)
        course = watch(
            self._command(racer, row.epochs), place, self._variables(self.folder, racer), racer.parse, row.epochs,
            wait=True, limit=600.0 + 180.0 * self.args.minutes,
        )  # fmt: skip
        row.minutes = course.minutes
        details |= {"start_up_s": course.start_up, "seconds_per_epoch": course.seconds_per_epoch}
        details = {key: None if value != value else value for key, value in details.items()}
        details |= {"epochs": row.epochs, "minutes": course.minutes, "validation": curve(course)}
        self.result["models"][racer.name] = details
        for suffix, (energies, forces, parameters) in racer.predict(place).items():
            measured = errors(self.parts["test"], energies, forces)
            self.rows.append(Row(self.name, racer.name + suffix, parameters, row.epochs, row.minutes, measured))

    def _command(self, racer: Racer, epochs: int) -> list[str]:
        return [str(racer.python), *racer.command(epochs)]

    def _place(self, folder: Path, racer: Racer) -> Path:
        """A folder with links to the frames, so that commands need no path."""
        place = folder / slug(racer.name)
        place.mkdir()
        for part in ("train", "val"):
            (place / f"{part}.extxyz").symlink_to(folder / f"{part}.extxyz")
        return place

    def _variables(self, folder: Path, racer: Racer) -> dict[str, str]:
        """Threads, and a compiler's cache of its own: every run pays for its compilation."""
        cache = folder / slug(racer.name) / "cache"
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        return {
            **dict.fromkeys(names, str(self.args.threads)),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "ESCAIP_CACHE": str(cache / "escaip"),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
        }


def racers(name: str, args: argparse.Namespace, mace: Path) -> list[Racer]:
    """Ours and MACE, for one data set."""
    data = SETS[name]
    e0s = isolated_energies(args.data / data.isolated if data.isolated else None)
    compiled = " compiled" if args.compile else ""
    return [
        Racer(f"escaip 1m{compiled}", Path(sys.executable), lambda n: our_command(data.recipe, args.compile, n),
              parse_ours, predict_ours),
        Racer("MACE small", mace, lambda n: mace_command(e0s, n), parse_mace, lambda place: predict_mace(mace, place)),
    ]  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        parameters = "—" if row.parameters is None else f"{row.parameters:,}".replace(",", " ")
        minutes = "—" if row.minutes is None else f"{row.minutes:.1f}"
        figures = [f"{row.errors[name]:.1f}" if name in row.errors else "—" for name in ERRORS]
        if ERRORS[0] in row.errors:
            figures[0] = f"{row.errors[ERRORS[0]]:.2f}"
        epochs = "—" if row.epochs is None else str(row.epochs)
        lines.append([row.data, row.model, parameters, epochs, minutes, *figures, (row.why or "").replace("|", "/")])
    return markdown_table(HEADER, lines)


def plain_command(words: Sequence[str]) -> str:
    """The command line without folders of this machine."""
    hidden = {"--data": "DIR", "--environments": "DIR", "--out": "FILE"}
    found, skip = ["python", "benchmarks/peers/race.py"], None
    for word in words:
        option = word.partition("=")[0]
        if skip is not None:
            found.append(skip)
        elif option in hidden and "=" in word:
            found.append(f"{option}={hidden[option]}")
        else:
            found.append(word)
        skip = hidden.get(word) if skip is None else None
    return " ".join(found)


def versions(python: Path) -> dict[str, str]:
    """Of MACE's environment."""
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({n: m.version(n) for n in ('mace-torch', 'torch', 'e3nn', 'ase', 'numpy')}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--minutes", type=float, default=15.0, help="of training, per model and data set")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", choices=("true", "false"), default="true", help="ours; its compilation counts")
    parser.add_argument("--frames", type=int, metavar="N", help="of each set at most, for a trial; 200 or more")
    parser.add_argument("--environments", type=Path, default=default_folder(), help="made where they do not exist")
    parser.add_argument("--torch-index", metavar="URL", help="package index with builds of PyTorch for the CPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.minutes <= 0 or args.threads < 1:
        parser.error("--minutes must be above 0 and --threads at least 1")
    if args.frames is not None and args.frames < 200:
        parser.error(f"--frames is {args.frames}: it must be at least 200")
    files = [file for name in args.sets for file in (SETS[name].frames, SETS[name].isolated) if file]
    for file in files:
        if not (args.data / file).is_file():
            parser.error(f"--data: {args.data} has no {file}")
    args.compile, args.data = args.compile == "true", args.data.resolve()
    return args


def main() -> None:
    args = arguments()
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # ends the child, removes the folder
    torch.set_num_threads(args.threads)
    try:
        mace = interpreter("mace", args.environments, args.torch_index)
    except EnvironmentFailure as error:
        sys.exit(f"no environment for MACE: {error}")
    result: dict[str, Any] = {
        "provenance": {**provenance(), "command": plain_command(sys.argv[1:]), "threads": args.threads},
        "versions": {"escaip": importlib.metadata.version("escaip"), "mace": versions(mace)},
        "minutes_per_model": args.minutes,
        "seed_of_split": SEED,
        "sets": {},
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="escaip-race-") as temporary:
        for name in args.sets:
            race = Race(name, args, Path(temporary) / name)
            for racer in racers(name, args, mace):
                race.run(racer)
                result["sets"][name] = {**race.result, "rows": [vars(row) for row in race.rows]}
                result["minutes"] = (time.monotonic() - start) / 60.0
                if args.out:
                    write_json(args.out, result)
                print(f"\n{table(race.rows)}\n", flush=True)
            rows += race.rows
    print(f"{table(rows)}\n\n{(time.monotonic() - start) / 60.0:.1f} min")


if __name__ == "__main__":
    main()
