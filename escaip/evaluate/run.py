"""Compares the predictions of a potential with labels; writes report and plots."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from escaip.data import AtomicData
from escaip.data.dataset import random_rotation, rotate_structure
from escaip.errors import DataError
from escaip.evaluate.report import EvaluationReport, Records, compute_report
from escaip.files import write_results
from escaip.potential import Potential
from escaip.potential.potential import origin_of
from escaip.potential.predict import StructurePrediction, join_structures, predict_pairs
from escaip.types import TARGETS

_RECORDED_TOGETHER = 256
_NUM_ROTATED = 10
_NUM_ROTATIONS = 5


def evaluate_into(
    folder: Path, potential: Potential, structures: Iterable[AtomicData], origin: Mapping[str, str], *,
    plots: bool = True, free_atoms_only: bool = False, **options: Any,
) -> EvaluationReport:  # fmt: skip
    """Evaluates a potential; writes ``report.json`` and, with ``plots``, ``parity.png`` and ``errors.png``.

    The ``origin``, model and data in words, is at the top of the report; all else is explained in ``evaluate``.

    Raises:
        DataError: no labels, or the folder cannot be written.
    """
    report, records = evaluate(potential, structures, free_atoms_only=free_atoms_only, **options)
    about = {**origin_of([potential]), **origin, "dtype": str(potential.dtype), "precision": potential.precision}
    files: dict[str, Any] = {"report.json": {**about, **report.to_dict()}}
    if plots:
        from escaip.evaluate.plots import draw

        figures = draw(records, free_atoms_only=free_atoms_only)
        files |= {f"{name}.png": figure for name, figure in figures.items()}
    write_results(folder, files)
    return report


def evaluate(
    potential: Potential,
    structures: Iterable[AtomicData],
    *,
    max_atoms: int | None = None,
    free_atoms_only: bool = False,
    progress: bool = False,
) -> tuple[EvaluationReport, Records]:
    """Compares predictions with labels.

    Structures are evaluated some at a time, see ``escaip.potential.predict.predict_pairs``; results do not depend
    on that beyond rounding. Records are in the order of the structures.

    Args:
        potential: in evaluation mode.
        structures: with labels; NaN marks those that are missing.
        max_atoms: atoms evaluated at once, but for a larger structure; by default what is fastest and fits into memory.
        free_atoms_only: leave forces of constrained atoms out.
        progress: show a bar.

    Returns:
        The report, and labels beside predictions.

    Raises:
        DataError: no structures, none with a label, or one that alone does not fit into memory.
        UnsupportedElementError: an element that the potential was not trained on.
        UsageError: ``max_atoms`` below 1, or a potential in training mode.
    """
    first, names, started = list[AtomicData](), list[str](), time.perf_counter()
    columns = collections.defaultdict[str | tuple[str, str], list[NDArray[Any]]](list)
    stress = potential.config.is_conservative
    pairs = predict_pairs(potential, structures, compute_stress=stress, max_atoms=max_atoms, progress=progress)
    while members := list(islice(pairs, _RECORDED_TOGETHER)):
        first.extend(data for data, _ in members[: _NUM_ROTATED - len(first)])
        names.extend(data.structure_id for data, _ in members)
        for key, values in _columns(potential, members).items():
            columns[key].append(values)
    if not names:
        raise DataError("0 structures to evaluate: check the file, --limit and --format")
    joined = {key: np.concatenate(values) for key, values in columns.items()}
    records = Records(
        structure_id=tuple(names),
        num_atoms=joined["num_atoms"],
        numbers=joined["atomic_numbers"],
        fixed=joined["fixed"],
        structure=np.repeat(np.arange(len(names)), joined["num_atoms"]),
        reference_energy=joined["reference_energy"],
        labels={name: joined["label", name] for name in TARGETS},
        predictions={name: joined["prediction", name] for name in TARGETS},
    )
    seconds = time.perf_counter() - started
    if not any(np.isfinite(values).any() for values in records.labels.values()):
        raise DataError(
            "no structure has an energy, force or stress label: name their keys with --keys.energy, --keys.forces, "
            "--keys.stress"
        )
    rotation = None if potential.config.is_conservative else rotation_error(potential, first)
    report = compute_report(records, free_atoms_only=free_atoms_only, rotation_error=rotation, seconds=seconds)
    return report, records


def rotation_error(potential: Potential, structures: Sequence[AtomicData]) -> float:
    """Returns the RMS of ``F(R x) − R F(x)`` over force components, eV/Å, for random rotations of each structure."""
    turned = []
    for index, (data, forces) in enumerate(zip(structures, _forces(potential, structures), strict=True)):
        held = data.clone()
        held.forces = forces
        turned += [rotate_structure(held, random_rotation(0, repeat, index)) for repeat in range(_NUM_ROTATIONS)]
    pairs = zip(turned, _forces(potential, turned), strict=True)
    return float(torch.cat([forces - data.forces for data, forces in pairs]).square().mean().sqrt())


def _forces(potential: Potential, structures: Sequence[AtomicData]) -> list[torch.Tensor]:
    return [torch.as_tensor(found.forces, dtype=torch.float64) for found in potential.predict(structures)]


def _columns(
    potential: Potential, members: Sequence[tuple[AtomicData, StructurePrediction]]
) -> dict[str | tuple[str, str], NDArray[Any]]:
    """Returns labels beside predictions of some structures, NaN where missing, and the other arrays of records."""
    batch = join_structures([data for data, _ in members]).to(potential.device)
    references, batch = potential.atomic_references(batch).cpu().numpy(), batch.to("cpu")
    found: dict[str | tuple[str, str], NDArray[Any]] = {
        "num_atoms": np.diff(batch.ptr.numpy()),
        "atomic_numbers": batch.atomic_numbers.numpy(),
        "fixed": batch.fixed.numpy(),
        "reference_energy": np.bincount(batch.batch.numpy(), weights=references, minlength=len(members)),
    }
    for name, target in TARGETS.items():
        missing = np.full((len(batch.batch) if target.per_atom else len(members), *target.shape), np.nan)
        values = [prediction.of_target(name) for _, prediction in members]
        arrays = [
            np.asarray(value, dtype=np.float64).reshape(-1, *target.shape) for value in values if value is not None
        ]
        found["label", name] = batch[name].numpy() if name in batch else missing
        found["prediction", name] = np.concatenate(arrays) if len(arrays) == len(members) else missing
    return found
