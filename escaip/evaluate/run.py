"""Predicts labelled structures in batches and compares."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from escaip.data import collate
from escaip.data.dataset import random_rotation, rotate_structure
from escaip.errors import ConfigError, DataError
from escaip.evaluate.records import Records, RecordsBuilder
from escaip.evaluate.report import EvaluationReport, compute_report
from escaip.potential import Potential

if TYPE_CHECKING:
    from escaip.data import AtomicData

_NUM_ROTATED = 10
_NUM_ROTATIONS = 5


def evaluate(
    potential: Potential,
    structures: Iterable[AtomicData],
    *,
    max_atoms: int = 1000,
    free_atoms_only: bool = False,
) -> tuple[EvaluationReport, Records]:
    """Compares predictions with labels.

    Structures are taken in order and packed while the sum of their atoms stays within ``max_atoms``; a larger one is
    a batch of its own. Results do not depend on the packing beyond rounding.

    Args:
        potential: in evaluation mode.
        structures: with labels; NaN marks those that are missing.
        max_atoms: in a batch.
        free_atoms_only: leave forces of constrained atoms out.

    Returns:
        The report, and labels beside predictions.

    Raises:
        DataError: no structures, or none with a label.
        UnsupportedElementError: an element that the potential was not trained on.
    """
    if max_atoms < 1:
        raise ConfigError(f"max_atoms is {max_atoms}: it must be at least 1")
    builder = RecordsBuilder()
    first: list[AtomicData] = []
    started = time.perf_counter()
    for members in _pack(structures, max_atoms):
        first.extend(members[: _NUM_ROTATED - len(first)])
        batch = collate(members).to(potential.device)
        with_stress = potential.config.is_conservative and not bool(torch.isnan(batch.stress).all())
        with torch.no_grad():
            prediction = potential(batch, compute_stress=with_stress, create_graph=False)
        builder.add(batch, prediction, potential.atomic_references(batch))
    if not first:
        raise DataError("0 structures to evaluate: check the file, --limit and --format")
    records = builder.build()
    seconds = time.perf_counter() - started
    if not any(np.isfinite(values).any() for values in (records.energy, records.forces, records.stress)):
        raise DataError(
            "no structure has an energy, force or stress label: name their keys with --energy-key, --forces-key, "
            "--stress-key"
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


def _pack(structures: Iterable[AtomicData], max_atoms: int) -> Iterator[list[AtomicData]]:
    members: list[AtomicData] = []
    total = 0
    for data in structures:
        if members and total + data.num_nodes > max_atoms:
            yield members
            members, total = [], 0
        members.append(data)
        total += data.num_nodes
    if members:
        yield members
