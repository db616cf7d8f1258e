"""What runs in a race: the same frames for all, a training process that is watched, and one measure of its errors."""

from __future__ import annotations

import math
import os
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from escaip.errors import EscaipError

PARTS = ("train", "val", "test")
MILLI = 1000.0

_OURS = re.compile(r"^epoch (\d+)  step \S+  validation: loss \S+  energy (\S+) meV/atom  forces (\S+) meV/Å")
_MACE = re.compile(r"INFO: Epoch (\d+): head: \S+, loss=\s*\S+, MAE_E_per_atom=\s*(\S+) meV, MAE_F=\s*(\S+) meV / A")


class RaceFailure(EscaipError):
    """One that takes part has failed; one line says why."""


@dataclass(frozen=True)
class Point:
    """Errors on the validation set after an epoch (counted from 1), in meV/atom and meV/Å."""

    epoch: int
    minutes: float
    energy: float
    forces: float


@dataclass
class Course:
    """What a training process printed: its learning curve."""

    points: list[Point] = field(default_factory=list)
    minutes: float = 0.0

    @property
    def seconds_per_epoch(self) -> float:
        """Median of those after the first, which also pays for compilation."""
        gaps = [60.0 * (b.minutes - a.minutes) / (b.epoch - a.epoch) for a, b in zip(self.points, self.points[1:])]
        return statistics.median(gaps) if gaps else math.nan

    @property
    def start_up(self) -> float:
        """Seconds before an epoch of usual length could have started: imports, reading, compilation."""
        return 60.0 * self.points[0].minutes - self.seconds_per_epoch if self.points else math.nan


def parse_ours(line: str, minutes: float) -> Point | None:
    """A validation of ``escaip fit``."""
    return _point(_OURS.search(line), minutes)


def parse_mace(line: str, minutes: float) -> Point | None:
    """A validation of ``mace_run_train --error_table PerAtomMAE``; that of the untrained model is none."""
    return _point(_MACE.search(line), minutes)


def _point(found: re.Match[str] | None, minutes: float) -> Point | None:
    return found and Point(int(found[1]) + 1, minutes, float(found[2]), float(found[3]))


def watch(
    command: Sequence[str],
    folder: Path,
    variables: Mapping[str, str],
    parse: Callable[[str, float], Point | None],
    epochs: int,
    *,
    wait: bool,
    limit: float,
) -> Course:
    """Runs a training process until it has validated ``epochs`` times, or, to ``wait``, until it ends by itself.

    The clock runs from the start of the process to the last of these validations: what is computed afterwards (reports,
    exports) is not training.

    Args:
        command: what to run, in ``folder``.
        folder: where it leaves its files; its output goes to ``output.log``.
        variables: of the environment, beside those of the driver.
        parse: finds a validation in a line of the output.
        epochs: after which training is over.
        wait: whether what it writes at its end is needed.
        limit: seconds after which it is ended.

    Raises:
        RaceFailure: it ended early or took too long.
    """
    course = Course()
    start = time.monotonic()
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=folder, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        timer = threading.Timer(limit, end)
        timer.start()
        try:
            assert process.stdout is not None
            with (folder / "output.log").open("w", encoding="utf-8") as log:
                for line in process.stdout:
                    log.write(line)
                    lines = [*lines[-40:], line.strip()]
                    point = parse(line, (time.monotonic() - start) / 60.0)
                    if point is not None:
                        course.points.append(point)
                        course.minutes = point.minutes
                        if len(course.points) >= epochs and not wait:
                            break
            finished = len(course.points) >= epochs
            if finished and not wait:
                return course
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
    if late.is_set():
        raise RaceFailure(f"not done after {limit:.0f} s, {len(course.points)} of {epochs} epochs")
    if status or not finished:
        raise RaceFailure(f"ended with status {status} after {len(course.points)} epochs: {last_words(lines)}")
    return course


def last_words(lines: Sequence[str]) -> str:
    """The last line that says something, without folders of this machine."""
    last = next((line for line in reversed(lines) if line), "nothing was printed")
    return re.sub(r"(?:/[\w.\-+]+)+/", "", last)[:200]


def epochs_in(minutes: float, start_up: float, seconds_per_epoch: float) -> int:
    """Whole epochs that fit best.

    Raises:
        RaceFailure: less than one.
    """
    epochs = round((60.0 * minutes - start_up) / seconds_per_epoch)
    if epochs < 1:
        raise RaceFailure(f"{start_up:.0f} s to start and {seconds_per_epoch:.0f} s per epoch: no epoch in the time")
    return epochs


def distinct(frames: Sequence[Atoms]) -> list[Atoms]:
    """The first of each group of equal structures: none may be learned and held out at once."""
    found: dict[bytes, Atoms] = {}
    for atoms in frames:
        shape = np.concatenate([atoms.cell.array, atoms.positions]).round(4) + 0.0
        found.setdefault(atoms.numbers.tobytes() + shape.tobytes(), atoms)
    return list(found.values())


def split_frames(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Indices of training, validation (a tenth) and test set (an eighth), at least 50 each, by a fixed seed.

    Raises:
        RaceFailure: too few frames.
    """
    test, val = max(50, count // 8), max(50, count // 10)
    if count < 2 * (test + val):
        raise RaceFailure(f"{count} frames are too few")
    order = np.random.default_rng(seed).permutation(count)
    return {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}


def labelled(atoms: Atoms) -> Atoms:
    """A copy with energy and forces as its only labels."""
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    bare.calc = SinglePointCalculator(bare, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
    return bare


def errors(frames: Sequence[Atoms], energies: np.ndarray, forces: np.ndarray) -> dict[str, float]:
    """Energy MAE in meV/atom, force MAE and RMSE over components in meV/Å.

    Args:
        frames: with labels.
        energies: ``(B,)`` eV.
        forces: ``(N, 3)`` eV/Å, frame after frame.

    Raises:
        RaceFailure: a prediction is missing or not finite.
    """
    labels = np.concatenate([atoms.get_forces() for atoms in frames])
    if len(energies) != len(frames) or forces.shape != labels.shape:
        raise RaceFailure(f"{len(energies)} energies and {len(forces)} forces for {len(frames)} frames")
    if not (np.isfinite(energies).all() and np.isfinite(forces).all()):
        raise RaceFailure("a prediction is not finite")
    sizes = np.array([len(atoms) for atoms in frames])
    truth = np.array([atoms.get_potential_energy() for atoms in frames])
    wrong = forces.astype(np.float64) - labels
    return {
        "energy_mae_meV_per_atom": MILLI * float(np.mean(np.abs(energies - truth) / sizes)),
        "force_mae_meV_per_A": MILLI * float(np.mean(np.abs(wrong))),
        "force_rmse_meV_per_A": MILLI * float(np.sqrt(np.mean(wrong**2))),
    }


def baseline(train: Sequence[Atoms], test: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Energies of a least-squares fit in the composition (the mean where that is constant), and forces of zero."""
    species = sorted({number for atoms in train for number in atoms.numbers})

    def composition(frames: Sequence[Atoms]) -> np.ndarray:
        return np.array([[np.sum(atoms.numbers == number) for number in species] for atoms in frames], dtype=float)

    energies = np.array([atoms.get_potential_energy() for atoms in train])
    weights = np.linalg.lstsq(composition(train), energies, rcond=None)[0]
    return composition(test) @ weights, np.zeros((sum(len(atoms) for atoms in test), 3))


def curve(course: Course) -> list[dict[str, Any]]:
    """For the file of results; what is not finite becomes None."""
    names = ("energy_mae_meV_per_atom", "force_mae_meV_per_A")
    return [
        {"epoch": p.epoch, "minutes": round(p.minutes, 3)}
        | {name: x if math.isfinite(x) else None for name, x in zip(names, (p.energy, p.forces), strict=True)}
        for p in course.points
    ]
