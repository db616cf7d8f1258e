"""Predicts labelled structures in batches and compares."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from escaip.data import collate
from escaip.data.dataset import random_rotation, rotate_structure
from escaip.errors import DataError
from escaip.evaluate.records import Records, RecordsBuilder
from escaip.evaluate.report import EvaluationReport, compute_report
from escaip.potential import Potential
from escaip.potential.predict import StructurePrediction, join_structures, predict_pairs
from escaip.types import Prediction

if TYPE_CHECKING:
    from escaip.data import AtomicData

_RECORDED_TOGETHER = 256
_NUM_ROTATED = 10
_NUM_ROTATIONS = 5


def evaluate(
    potential: Potential,
    structures: Iterable[AtomicData],
    *,
    max_atoms: int | None = None,
    free_atoms_only: bool = False,
    progress: bool = False,
) -> tuple[EvaluationReport, Records]:
    """Compares predictions with labels.

    Structures are evaluated some at a time, see :func:`escaip.potential.predict.predict_pairs`; results
    do not depend on that beyond rounding. Records are in the order of the structures.

    Args:
        potential: in evaluation mode.
        structures: with labels; NaN marks those that are missing.
        max_atoms: evaluated at once; a larger structure is alone. By default as many as pay, or fit into memory.
        free_atoms_only: leave forces of constrained atoms out.
        progress: show a bar.

    Returns:
        The report, and labels beside predictions.

    Raises:
        DataError: no structures, none with a label, or one that alone does not fit into memory.
        UnsupportedElementError: an element that the potential was not trained on.
        UsageError: ``max_atoms`` below 1, or a potential in training mode.
    """
    builder = RecordsBuilder()
    first: list[AtomicData] = []
    started = time.perf_counter()
    pairs = predict_pairs(
        potential, structures, compute_stress=potential.config.is_conservative, max_atoms=max_atoms, progress=progress
    )
    while members := list(islice(pairs, _RECORDED_TOGETHER)):
        first.extend(data for data, _ in members[: _NUM_ROTATED - len(first)])
        batch = join_structures([data for data, _ in members]).to(potential.device)
        builder.add(batch, _join([found for _, found in members]), potential.atomic_references(batch))
    if not first:
        raise DataError("0 structures to evaluate: check the file, --limit and --format")
    records = builder.build()
    seconds = time.perf_counter() - started
    if not any(np.isfinite(values).any() for values in (records.energy, records.forces, records.stress)):
        raise DataError(
            "no structure has an energy, force or stress label: name their keys with --keys.energy, --keys.forces, "
            "--keys.stress"
        )
    rotation = None if potential.config.is_conservative else rotation_error(potential, first)
    report = compute_report(records, free_atoms_only=free_atoms_only, rotation_error=rotation, seconds=seconds)
    return report, records


def rotation_error(potential: Potential, structures: Sequence[AtomicData], seed: int = 0) -> float:
    """RMS of ``F(R x) − R F(x)`` over force components, eV/Å, for random rotations of each structure."""
    total, count = 0.0, 0
    for index, data in enumerate(structures):
        held = data.clone()
        held.forces = _forces(potential, data)
        for repeat in range(_NUM_ROTATIONS):
            turned = rotate_structure(held, random_rotation(seed, repeat, index))
            difference = _forces(potential, turned) - turned.forces
            total += float(difference.square().sum())
            count += difference.numel()
    return (total / count) ** 0.5


def _forces(potential: Potential, data: AtomicData) -> torch.Tensor:
    with torch.no_grad():
        prediction = potential(collate([data]).to(potential.device), create_graph=False)
    assert prediction.forces is not None
    return prediction.forces.detach().cpu().double()


def _join(found: Sequence[StructurePrediction]) -> Prediction:
    """As of one batch, with forces."""
    forces = [each.forces for each in found if each.forces is not None]
    stresses = [each.stress for each in found if each.stress is not None]
    return Prediction(
        energy=torch.tensor([each.energy for each in found], dtype=torch.float64),
        forces=torch.cat(forces),
        stress=torch.stack(stresses) if stresses else None,
        atomic_energies=torch.cat([each.atomic_energies for each in found]),
    )
