"""Selection of frames to label next: those on which a committee disagrees, without duplicates."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from escaip.calculators.ase import EScAIPCalculator
from escaip.errors import ConfigError, DataError
from escaip.files import write_results
from escaip.simulate.guards import find_contact
from escaip.simulate.output import read_trajectory


@dataclass(frozen=True)
class FrameScores:
    """A committee's answers for ``F`` frames.

    Descriptors are the atomic energies of each of ``M`` members, sorted within each element: invariant under rotation,
    translation, re-wrapping and permutation, without further evaluations. Frames of different formulas are never
    duplicates.
    """

    forces_spread: np.ndarray  # (F,) eV/Å, the largest of an atom's √⟨|F_i − ⟨F_i⟩|²⟩ over the members
    mean_forces_spread: np.ndarray  # (F,) eV/Å, its mean over the atoms
    energy_spread: np.ndarray  # (F,) eV, standard deviation of the energies
    descriptors: list[np.ndarray]  # (M · n,) eV, of each frame
    formulas: list[str]


@dataclass(frozen=True)
class Selection:
    """The frames chosen from a file, in the order of choice."""

    frames: np.ndarray  # (K,) numbers of the frames in the file
    distances: np.ndarray  # (K,) eV, to the nearest frame chosen before; inf for the first of its formula
    spreads: np.ndarray  # (K,) eV/Å, largest spread of the forces on an atom
    num_frames: int  # that were read
    num_broken: int  # left out because atoms touch or the members' answers are not finite
    num_considered: int  # within the limits
    out: Path  # structures
    report: Path  # spreads, JSON

    def summary(self) -> str:
        """Returns a few lines for people."""
        lines = [f"{len(self.frames)} of {self.num_frames} frames chosen, {self.num_considered} were within the limits"]
        if self.num_broken:
            lines.append(f"{self.num_broken} frames are broken (atoms touch, or answers are not finite) and left out")
        low, high = self.spreads.min(), self.spreads.max()
        return "\n".join([*lines, f"force spread {low:.3g} to {high:.3g} eV/Å; wrote {self.out}, {self.report}"])


def select_frames(
    scores: FrameScores, count: int, candidates: np.ndarray, min_distance: float = 0.005
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses frames by spread and diversity: weighted farthest-point sampling.

    The first frame has the largest spread; each further one the largest product of spread and distance to the nearest
    frame chosen. The distance of two frames of one formula is the root mean square difference of their descriptors, eV;
    a frame of a formula that was not chosen yet counts as far as the farthest of the others.

    Chosen are at most ``count`` of the ``candidates``, indices of frames; frames nearer than ``min_distance`` eV to a
    chosen one are duplicates. Returns the indices in the order chosen, and the distance of each to those before it.
    """
    distance = np.full(len(scores.forces_spread), np.inf)
    chosen: list[int] = []
    distances: list[float] = []
    is_open = np.zeros(len(distance), dtype=bool)
    is_open[candidates] = True
    _, kind = np.unique(scores.formulas, return_inverse=True)
    members = [np.flatnonzero(kind == number) for number in range(kind.max() + 1)]
    tables = [np.stack([scores.descriptors[index] for index in same]) for same in members]
    while len(chosen) < count and is_open.any():
        farthest = distance[is_open & np.isfinite(distance)].max(initial=0.0) or 1.0
        weight = scores.forces_spread * np.where(np.isfinite(distance), distance, farthest)
        index = int(np.argmax(np.where(is_open, weight, -1.0)))
        chosen.append(index)
        distances.append(float(distance[index]))
        same = members[kind[index]]
        differences = tables[kind[index]] - scores.descriptors[index]
        distance[same] = np.minimum(distance[same], np.sqrt((differences**2).mean(axis=1)))
        is_open &= distance > min_distance
        is_open[index] = False
    return np.array(chosen, dtype=np.int64), np.array(distances)


def score_frames(
    frames: Sequence[Atoms], models: Sequence[str | os.PathLike[str]], *, max_atoms: int | None = None,
    progress: bool = False, **options: Any,
) -> FrameScores:  # fmt: skip
    """Evaluates frames with each member, in batches of frames, with one member in memory at a time.

    Frames need no labels; ``max_atoms`` and ``progress`` are those of ``predict``, and ``device``, ``dtype``,
    ``precision`` and ``dataset`` those of ``EScAIPCalculator``.

    Raises:
        ConfigError: fewer than two models.
        EscaipError: a frame that a member cannot evaluate.
    """
    if len(models) < 2:
        raise ConfigError("a committee needs at least two models: give further ones with --committee")
    sums = [np.zeros((2, len(atoms), 3)) for atoms in frames]  # mean, and sum of squared deviations (Welford)
    energies = np.zeros((len(models), len(frames)))
    descriptors: list[list[np.ndarray]] = [[] for _ in frames]
    for member, model in enumerate(models):
        potential = EScAIPCalculator(model, **options).potential
        for index, found in enumerate(potential.predict(frames, max_atoms=max_atoms, progress=progress)):
            forces, (mean, squares) = np.asarray(found.forces, dtype=np.float64), sums[index]
            before = forces - mean
            mean += before / (member + 1)
            squares += before * (forces - mean)
            energies[member, index] = float(found.energy)
            atomic = np.asarray(found.atomic_energies, dtype=np.float64)
            descriptors[index].append(atomic[np.lexsort((atomic, frames[index].numbers))])
        del potential
        gc.collect()
    spreads = [np.sqrt(squares.sum(axis=1) / len(models)) for _, squares in sums]
    return FrameScores(
        forces_spread=np.array([spread.max() for spread in spreads]),
        mean_forces_spread=np.array([spread.mean() for spread in spreads]),
        energy_spread=energies.std(axis=0),
        descriptors=[np.concatenate(parts) for parts in descriptors],
        formulas=[atoms.get_chemical_formula() for atoms in frames],
    )


def select_file(
    trajectory: str | os.PathLike[str], models: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *,
    count: int, min_spread: float = 0.0, max_spread: float | None = None, min_distance: float = 0.005, every: int = 1,
    max_atoms: int | None = None, progress: bool = False, **options: Any,
) -> Selection:  # fmt: skip
    """Selects frames of a file; writes them without labels (extxyz) and the spreads of all beside them (JSON).

    The trajectory is anything ASE reads, of which every ``every``-th frame is looked at; ``out`` ends in ``.extxyz``.
    Frames below ``min_spread`` eV/Å teach nothing, and frames above ``max_spread`` are broken. ``count`` and
    ``min_distance`` are explained in ``select_frames``, the rest in ``score_frames``.

    Raises:
        ConfigError: a setting is out of range.
        DataError: the file cannot be read, or no frame is within the limits.
    """
    if Path(out).suffix != ".extxyz":
        raise ConfigError(f"out is {out}: choose a name that ends in .extxyz")
    least = {"count": (count, 1), "every": (every, 1), "min_spread": (min_spread, 0), "min_distance": (min_distance, 0)}
    for name, (value, low) in least.items():
        if not value >= low:
            raise ConfigError(f"{name} is {value}: it must be at least {low}")
    if max_spread is not None and not max_spread > min_spread:
        raise ConfigError(f"max_spread is {max_spread}: it must be above min_spread, {min_spread:g}")
    frames = list(read_trajectory(trajectory, every=every))
    for atoms in frames:
        atoms.calc = None
    sound = [i for i, atoms in enumerate(frames) if np.isfinite(atoms.positions).all() and find_contact(atoms) is None]
    if not sound:
        raise DataError(
            f"{trajectory}: no frame is sound (atoms touch, or coordinates are NaN): use another trajectory"
        )
    kept, numbers = [frames[index] for index in sound], every * np.array(sound)
    scores = score_frames(kept, models, max_atoms=max_atoms, progress=progress, **options)
    spreads = scores.forces_spread
    finite = np.isfinite(spreads) & np.isfinite(scores.energy_spread)
    inside = finite & (spreads >= min_spread) & (spreads <= (np.inf if max_spread is None else max_spread))
    if not inside.any():
        low, high = spreads[finite].min(initial=np.inf), spreads[finite].max(initial=-np.inf)
        raise DataError(f"{trajectory}: no frame is within the limits: force spreads are {low:.3g} to {high:.3g} eV/Å")
    chosen, distances = select_frames(scores, count, np.flatnonzero(inside), min_distance)
    path = Path(out)
    found = Selection(
        numbers[chosen], distances, spreads[chosen], len(frames), len(frames) - int(finite.sum()), int(inside.sum()),
        path, path.with_suffix(".json"),
    )  # fmt: skip
    values = {
        "trajectory": os.fspath(trajectory), "models": [os.fspath(model) for model in models],
        "units": {"forces_spread": "eV/Å", "energy_spread": "eV", "distance": "eV"},
        "chosen": {"frame": found.frames, "distance": distances},
        "frames": {
            "frame": numbers, "max_forces_spread": spreads, "mean_forces_spread": scores.mean_forces_spread,
            "energy_spread": scores.energy_spread,
        },
    }  # fmt: skip
    bare = []
    for index in chosen:
        frame = kept[index]
        info = {name: frame.info[name] for name in ("charge", "spin", "spin_multiplicity") if name in frame.info}
        info |= {"source_frame": int(numbers[index]), "max_forces_spread": float(spreads[index])}
        bare.append(Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc, info=info))
    write_results(path.parent, {path.name: bare, found.report.name: values})
    return found
