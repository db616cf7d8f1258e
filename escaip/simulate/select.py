"""Which frames of a trajectory to label next: those a committee disagrees on, and no two alike."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms

from escaip.errors import ConfigError, DataError
from escaip.simulate.guards import find_contact


@dataclass(frozen=True)
class FrameScores:
    """What a committee says of ``F`` frames.

    Attributes:
        forces_spread: ``(F,)`` eV/Å, the largest of an atom's ``√⟨|F_i − ⟨F_i⟩|²⟩`` over the members.
        mean_forces_spread: ``(F,)`` eV/Å, its mean over the atoms.
        energy_spread: ``(F,)`` eV, standard deviation of the energies.
        descriptors: of each frame ``(M · n,)`` eV: the atomic energies of each of ``M`` members, sorted within each
            element. Invariant under rotation, translation, re-wrapping and permutation, without further evaluations.
        formulas: of each frame; frames of different ones are never duplicates.
    """

    forces_spread: np.ndarray
    mean_forces_spread: np.ndarray
    energy_spread: np.ndarray
    descriptors: list[np.ndarray]
    formulas: list[str]


@dataclass(frozen=True)
class Selection:
    """Frames chosen, in the order in which they were.

    Attributes:
        chosen: ``(K,)`` indices into what was scored.
        distances: ``(K,)`` eV, of each to the nearest one chosen before; inf for the first of its formula.
        out: the structures.
        report: the spreads, JSON.
        count: asked for.
        considered: frames within the limits.
        frames: in all.
        broken: left out because atoms touch or the members' answers are no numbers.
        spread: largest and smallest ``forces_spread`` of those chosen, eV/Å.
    """

    chosen: np.ndarray
    distances: np.ndarray
    out: Path
    report: Path
    count: int
    considered: int
    frames: int
    broken: int
    spread: tuple[float, float]

    def summary(self) -> str:
        """Returns a few lines for people."""
        lines = [f"{len(self.chosen)} of {self.frames} frames chosen, {self.considered} were within the limits"]
        if self.broken:
            lines.append(f"{self.broken} frames are broken (atoms touch, or the answers are no numbers) and left out")
        if len(self.chosen) < self.count:
            lines.append(f"fewer than {self.count}: the others are too near to these, see --min-distance")
        lines.append(f"force spread {self.spread[1]:.3g} to {self.spread[0]:.3g} eV/Å; wrote {self.out}, {self.report}")
        return "\n".join(lines)


def select_frames(
    scores: FrameScores, count: int, candidates: np.ndarray, min_distance: float = 0.005
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses by spread and diversity: the most uncertain frame, then whichever has the largest product of spread and
    distance to the nearest one chosen (farthest-point sampling, weighted).

    The distance of two frames of one formula is the root mean square difference of their descriptors, eV; a frame of a
    formula that was not chosen yet counts as far as the farthest of the others.

    Args:
        scores: of all frames.
        count: at most so many.
        candidates: indices to choose from.
        min_distance: eV; nearer frames are the same.

    Returns:
        Indices in the order chosen, and the distance of each to those before it.
    """
    distance = np.full(len(scores.forces_spread), np.inf)
    chosen: list[int] = []
    distances: list[float] = []
    open_ = np.zeros(len(distance), dtype=bool)
    open_[candidates] = True
    _, kind = np.unique(scores.formulas, return_inverse=True)
    members = [np.flatnonzero(kind == number) for number in range(kind.max() + 1)]
    tables = [np.stack([scores.descriptors[index] for index in same]) for same in members]
    while len(chosen) < count and open_.any():
        farthest = distance[open_ & np.isfinite(distance)].max(initial=0.0) or 1.0
        weight = scores.forces_spread * np.where(np.isfinite(distance), distance, farthest)
        index = int(np.argmax(np.where(open_, weight, -1.0)))
        chosen.append(index)
        distances.append(float(distance[index]))
        same = members[kind[index]]
        differences = tables[kind[index]] - scores.descriptors[index]
        distance[same] = np.minimum(distance[same], np.sqrt((differences**2).mean(axis=1)))
        open_ &= distance > min_distance
        open_[index] = False
    return np.array(chosen, dtype=np.int64), np.array(distances)


def score_frames(
    frames: Sequence[Atoms], models: Sequence[str | os.PathLike[str]], *, max_atoms: int | None = None,
    progress: bool = False, **options: Any,
) -> FrameScores:  # fmt: skip
    """Evaluates frames with each member, packed by size, one member in memory at a time.

    Args:
        frames: without labels; charge and spin in ``info``.
        models: two or more model files.
        max_atoms: as in :meth:`~escaip.Potential.predict`.
        progress: as there.
        **options: ``device, dtype, precision, dataset`` as in :class:`~escaip.EScAIPCalculator`.

    Raises:
        ConfigError: fewer than two models.
        EscaipError: a frame that a member cannot evaluate.
    """
    from escaip.calculators.ase import EScAIPCalculator

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
    trajectory: str | os.PathLike[str],
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    count: int,
    min_spread: float = 0.0,
    max_spread: float | None = None,
    min_distance: float = 0.005,
    every: int = 1,
    max_atoms: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Selection:
    """Selects frames of a file, writes them without labels (extxyz), and the spreads of all beside them (JSON).

    Args:
        trajectory: anything ASE reads.
        models: the committee.
        out: ends in ``.extxyz``.
        count: frames to choose, at most.
        min_spread: eV/Å, below which nothing is learnt.
        max_spread: eV/Å, above which frames are taken for broken.
        min_distance: see :func:`select_frames`.
        every: look at every so many-th frame.
        max_atoms: see :func:`score_frames`.
        progress: see there.
        **options: see there.

    Raises:
        ConfigError: a setting is out of range.
        DataError: the file cannot be read, or no frame is within the limits.
    """
    _check(out, count, min_spread, max_spread, min_distance, every)
    frames, indices = _read(Path(trajectory), every)
    sound = np.array([_is_sound(atoms) for atoms in frames])
    kept = [atoms for atoms, good in zip(frames, sound, strict=True) if good]
    if not kept:
        raise DataError(
            f"{trajectory}: no frame is sound (atoms touch, or coordinates are NaN): use another trajectory"
        )
    numbers = indices[sound]
    scores = score_frames(kept, models, max_atoms=max_atoms, progress=progress, **options)
    finite = np.isfinite(scores.forces_spread) & np.isfinite(scores.energy_spread)
    inside = finite & (scores.forces_spread >= min_spread)
    if max_spread is not None:
        inside &= scores.forces_spread <= max_spread
    if not inside.any():
        low, high = scores.forces_spread[finite].min(initial=np.inf), scores.forces_spread[finite].max(initial=-np.inf)
        raise DataError(f"{trajectory}: no frame is within the limits: force spreads are {low:.3g} to {high:.3g} eV/Å")
    chosen, distances = select_frames(scores, count, np.flatnonzero(inside), min_distance)
    path = Path(out)
    _write_frames(path, [kept[index] for index in chosen], numbers[chosen], scores, chosen)
    report = path.with_suffix(".json")
    spreads = scores.forces_spread[chosen]
    _write_report(report, trajectory, models, numbers, scores, chosen, distances)
    broken = len(frames) - int(finite.sum())
    return Selection(
        chosen, distances, path, report, count, int(inside.sum()), len(frames), broken,
        (float(spreads.max()), float(spreads.min())),
    )  # fmt: skip


def _check(
    out: str | os.PathLike[str],
    count: int,
    min_spread: float,
    max_spread: float | None,
    min_distance: float,
    every: int,
) -> None:
    if Path(out).suffix != ".extxyz":
        raise ConfigError(f"out is {out}: choose a name that ends in .extxyz")
    for name, value in (("count", count), ("every", every)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    for name, spread in (("min_spread", min_spread), ("min_distance", min_distance)):
        if not spread >= 0:
            raise ConfigError(f"{name} is {spread}: it must be 0 or more")
    if max_spread is not None and not max_spread > min_spread:
        raise ConfigError(f"max_spread is {max_spread}: it must be above min_spread, {min_spread:g}")


def _read(path: Path, every: int) -> tuple[list[Atoms], np.ndarray]:
    """Every so many-th frame without its labels, and their indices in the file."""
    if not path.exists():
        raise DataError(f"trajectory {path} does not exist: check the path")
    frames = []
    try:
        for atoms in ase.io.iread(path, index=f"::{every}"):
            atoms.calc = None
            frames.append(atoms)
    except Exception as error:  # ASE's readers raise anything
        raise DataError(f"trajectory {path} cannot be read ({error}): use a file ASE reads") from error
    if not frames:
        raise DataError(f"trajectory {path} is empty: give a file with at least one structure")
    return frames, np.arange(len(frames)) * every


def _is_sound(atoms: Atoms) -> bool:
    return bool(np.isfinite(atoms.positions).all()) and find_contact(atoms) is None


def _write_frames(
    path: Path, frames: list[Atoms], numbers: np.ndarray, scores: FrameScores, chosen: np.ndarray
) -> None:
    bare = []
    for atoms, number, index in zip(frames, numbers, chosen, strict=True):
        frame = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        names = ("charge", "spin", "spin_multiplicity")
        frame.info = {name: atoms.info[name] for name in names if name in atoms.info}
        frame.info.update(source_frame=int(number), max_forces_spread=float(scores.forces_spread[index]))
        bare.append(frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.part.extxyz")
    try:
        ase.io.write(aside, bare, format="extxyz")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _write_report(
    path: Path,
    trajectory: str | os.PathLike[str],
    models: Sequence[str | os.PathLike[str]],
    numbers: np.ndarray,
    scores: FrameScores,
    chosen: np.ndarray,
    distances: np.ndarray,
) -> None:
    def plain(values: np.ndarray) -> list[float | None]:
        return [float(value) if np.isfinite(value) else None for value in values]

    content = {
        "trajectory": os.fspath(trajectory),
        "models": [os.fspath(model) for model in models],
        "units": {"forces_spread": "eV/Å", "energy_spread": "eV", "distance": "eV"},
        "chosen": {"frame": numbers[chosen].tolist(), "distance": plain(distances)},
        "frames": {
            "frame": numbers.tolist(),
            "max_forces_spread": plain(scores.forces_spread),
            "mean_forces_spread": plain(scores.mean_forces_spread),
            "energy_spread": plain(scores.energy_spread),
        },
    }
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
