"""Compares the predictions of a potential with labels, and writes report and plots."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from escaip.data import collate, open_source
from escaip.data.dataset import random_rotation, rotate_structure
from escaip.errors import DataError
from escaip.evaluate.report import EvaluationReport, FloatArray, Records, compute_report
from escaip.files import resolve, write_file
from escaip.potential import Potential
from escaip.potential.loading import load_potential
from escaip.potential.predict import StructurePrediction, join_structures, predict_pairs
from escaip.types import TARGETS, Target

if TYPE_CHECKING:
    from escaip.data import AtomicData

_RECORDED_TOGETHER = 256
_NUM_ROTATED = 10
_NUM_ROTATIONS = 5


def evaluate_files(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model_options: Mapping[str, Any] | None = None,
    read_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> EvaluationReport:
    """Evaluates a model file on a data file; see :func:`evaluate_into`.

    Args:
        model: ``.ckpt`` or ``.escaip``.
        data: see :func:`escaip.data.open_source`.
        out: folder, made when needed.
        model_options: of :func:`escaip.load_potential`.
        read_options: of :func:`escaip.data.open_source`.
        **options: of :func:`evaluate_into`.

    Raises:
        CheckpointError: the model cannot be read.
        DataError: the data cannot be read, has no labels, or the folder cannot be written.
    """
    potential = load_potential(model, **(model_options or {}))
    structures = open_source(resolve(Path(data)), **(read_options or {}))
    origin = {"model": os.fspath(model), "data": os.fspath(data)}
    return evaluate_into(Path(out), potential, structures, origin, **options)


def evaluate_into(
    folder: Path,
    potential: Potential,
    structures: Iterable[AtomicData],
    origin: Mapping[str, str],
    *,
    plots: bool = True,
    free_atoms_only: bool = False,
    **options: Any,
) -> EvaluationReport:
    """Evaluates a potential; writes ``report.json``, ``parity.png`` and ``errors.png``.

    Args:
        folder: made when needed.
        potential: in evaluation mode.
        structures: with labels.
        origin: model and data in words, for the top of the report.
        plots: whether to draw.
        free_atoms_only: leave forces of constrained atoms out.
        **options: ``max_atoms`` and ``progress`` of :func:`evaluate`.

    Raises:
        DataError: no labels, or the folder cannot be written.
    """
    report, records = evaluate(potential, structures, free_atoms_only=free_atoms_only, **options)
    values = {**origin, "dtype": str(potential.dtype), "precision": potential.precision, **report.to_dict()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}: choose another --out") from error
    write_file(folder / "report.json", json.dumps(values, indent=1, ensure_ascii=False))
    if plots:
        from escaip.evaluate.plots import draw_errors, draw_parity

        write_file(folder / "parity.png", draw_parity(records, free_atoms_only=free_atoms_only))
        write_file(folder / "errors.png", draw_errors(records, free_atoms_only=free_atoms_only))
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

    Structures are evaluated some at a time, see :func:`escaip.potential.predict.predict_pairs`; results do not depend
    on that beyond rounding. Records are in the order of the structures.

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
    parts: list[Records] = []
    first: list[AtomicData] = []
    started = time.perf_counter()
    pairs = predict_pairs(
        potential, structures, compute_stress=potential.config.is_conservative, max_atoms=max_atoms, progress=progress
    )
    while members := list(islice(pairs, _RECORDED_TOGETHER)):
        first.extend(data for data, _ in members[: _NUM_ROTATED - len(first)])
        parts.append(_records(potential, members))
    if not parts:
        raise DataError("0 structures to evaluate: check the file, --limit and --format")
    records = _joined(parts)
    seconds = time.perf_counter() - started
    if not any(np.isfinite(values).any() for values in records.labels.values()):
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


def _records(potential: Potential, members: Sequence[tuple[AtomicData, StructurePrediction]]) -> Records:
    """Puts labels beside predictions for some structures."""
    batch = join_structures([data for data, _ in members])
    references = potential.atomic_references(batch.to(potential.device)).cpu().numpy()
    batch = batch.to("cpu")
    structure, found = batch.batch.numpy(), [prediction for _, prediction in members]
    shapes = {
        target.name: (len(structure) if target.per_atom else len(members), *target.shape) for target in TARGETS.values()
    }
    labels = {name: batch[name].numpy() if name in batch else np.full(shape, np.nan) for name, shape in shapes.items()}
    return Records(
        structure_id=tuple(batch.structure_id),
        num_atoms=(batch.ptr[1:] - batch.ptr[:-1]).numpy(),
        numbers=batch.atomic_numbers.numpy(),
        fixed=batch.fixed.numpy(),
        structure=structure,
        reference_energy=np.bincount(structure, weights=references, minlength=len(members)).astype(np.float64),
        labels=labels,
        predictions={target.name: _predicted(found, target, shapes[target.name]) for target in TARGETS.values()},
    )


def _predicted(found: Sequence[StructurePrediction], target: Target, shape: tuple[int, ...]) -> FloatArray:
    """Joins the predictions of a target; NaN where the potential has none."""
    values = [each.properties.get(target.name, getattr(each, target.name, None)) for each in found]
    if any(value is None for value in values):
        return np.full(shape, np.nan)
    return np.concatenate([np.asarray(value, dtype=np.float64).reshape(-1, *target.shape) for value in values])


def _joined(parts: Sequence[Records]) -> Records:
    """Joins records of consecutive structures."""

    def join(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    def join_targets(name: str) -> dict[str, FloatArray]:
        return {key: np.concatenate([getattr(part, name)[key] for part in parts]) for key in getattr(parts[0], name)}

    before = np.cumsum([0, *(len(part.num_atoms) for part in parts)])
    return Records(
        structure_id=tuple(name for part in parts for name in part.structure_id),
        num_atoms=join("num_atoms"),
        numbers=join("numbers"),
        fixed=join("fixed"),
        structure=np.concatenate([part.structure + start for part, start in zip(parts, before, strict=False)]),
        reference_energy=join("reference_energy"),
        labels=join_targets("labels"),
        predictions=join_targets("predictions"),
    )
