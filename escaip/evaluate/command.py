"""From files to a folder: what ``escaip evaluate`` calls."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip.errors import DataError
from escaip.evaluate.report import EvaluationReport

if TYPE_CHECKING:
    from escaip.data import AtomicData
    from escaip.potential import Potential


def evaluate_files(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_atoms: int | None = None,
    free_atoms_only: bool = False,
    plots: bool = True,
    progress: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    dataset: str | None = None,
    precision: str = "highest",
    **source: Any,
) -> EvaluationReport:
    """Evaluates a model file on a data file; writes ``report.json``, ``parity.png`` and ``errors.png``.

    Args:
        model: ``.ckpt`` or ``.escaip``.
        data: see :func:`escaip.data.open_source`.
        out: folder, made when needed.
        max_atoms: evaluated at once; by default as many as pay, or fit into memory.
        free_atoms_only: leave forces of constrained atoms out.
        plots: whether to draw.
        progress: show a bar.
        device: a torch device or ``"auto"``.
        dtype: ``"float32"`` or ``"float64"``; by default as stored.
        dataset: whose element references to use, for potentials trained on several sets.
        precision: ``"highest"``, ``"tf32"``, ``"float16"`` or ``"bfloat16"`` (docs/precision.md).
        **source: ``format``, ``keys``, ``units``, ``limit``, ... of :func:`escaip.data.open_source`.

    Raises:
        CheckpointError: the model cannot be read.
        DataError: the data cannot be read, has no labels, or the folder cannot be written.
    """
    from escaip.data import open_source
    from escaip.files import resolve
    from escaip.potential.loading import load_potential

    potential = load_potential(model, device=device, dtype=dtype, dataset=dataset, precision=precision)
    structures = open_source(resolve(Path(data)), **source)
    origin = {"model": os.fspath(model), "data": os.fspath(data)}
    return evaluate_into(
        Path(out), potential, structures, origin, max_atoms=max_atoms, free_atoms_only=free_atoms_only, plots=plots,
        progress=progress,
    )  # fmt: skip


def evaluate_into(
    folder: Path,
    potential: Potential,
    structures: Iterable[AtomicData],
    origin: dict[str, Any],
    *,
    max_atoms: int | None = None,
    free_atoms_only: bool = False,
    plots: bool = True,
    progress: bool = False,
) -> EvaluationReport:
    """Evaluates a potential; writes ``report.json``, ``parity.png`` and ``errors.png``.

    Args:
        folder: made when needed.
        potential: in evaluation mode.
        structures: with labels.
        origin: what model and data are, in words; goes to the top of the report.
        max_atoms: evaluated at once; by default as many as pay, or fit into memory.
        free_atoms_only: leave forces of constrained atoms out.
        plots: whether to draw.
        progress: show a bar.

    Raises:
        DataError: no labels, or the folder cannot be written.
    """
    from escaip.evaluate.run import evaluate

    report, records = evaluate(
        potential, structures, max_atoms=max_atoms, free_atoms_only=free_atoms_only, progress=progress
    )
    values = {**origin, "dtype": str(potential.dtype), "precision": potential.precision, **report.to_dict()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "report.json", json.dumps(values, indent=1, ensure_ascii=False).encode())
        if plots:
            from escaip.evaluate.plots import draw_errors, draw_parity

            _replace(folder / "parity.png", draw_parity(records, free_atoms_only=free_atoms_only))
            _replace(folder / "errors.png", draw_errors(records, free_atoms_only=free_atoms_only))
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}: choose another --out") from error
    return report


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
