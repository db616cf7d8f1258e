"""The ``evaluate`` and ``predict`` commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from escaip.data.commands import reading
from escaip.errors import UsageError
from escaip.options import DataPath, ModelFile, ModelOptions, ReadOptions


class _Options(ModelOptions, ReadOptions, total=False):
    """Options of the model and of the data."""


def evaluate(
    model: ModelFile,
    data: DataPath,
    *,
    out: str = "evaluation",
    free_atoms: bool = False,
    max_atoms: int | None = None,
    plots: bool = True,
    **options: Unpack[_Options],
) -> None:
    """Computes the errors of a model on labelled data, beside those of trivial predictions.

    Args:
        model: a model file
        data: labelled structures
        out: folder for report.json and plots
        free_atoms: count forces of unconstrained atoms only
        max_atoms: atoms evaluated at once (default: what is fastest and fits into memory)
        plots: draw parity.png and errors.png

    Example: escaip evaluate model.escaip test.extxyz --out evaluation
    """
    from escaip.evaluate.run import evaluate_into

    potential, structures = _open(model, data, options)
    report = evaluate_into(
        Path(out), potential, structures, {"model": model, "data": data}, free_atoms_only=free_atoms,
        max_atoms=max_atoms, plots=plots, progress=sys.stderr.isatty(),
    )  # fmt: skip
    print(report.table())
    print(f"wrote {out}")


def predict(
    model: ModelFile,
    data: DataPath,
    *,
    out: str,
    max_atoms: int | None = None,
    overwrite: bool = False,
    **options: Unpack[_Options],
) -> None:
    """Predicts energies, forces and stress of any number of structures.

    Args:
        model: a model file
        data: structures; labels are not needed
        out: the extxyz file to write
        max_atoms: atoms evaluated at once (default: what is fastest and fits into memory)
        overwrite: replace what is there

    Example: escaip predict example:organic structures.xyz --out predictions.extxyz
    """
    from escaip.evaluate.run import predict_into

    path = Path(out)
    if path.suffix not in (".extxyz", ".xyz"):
        raise UsageError(f"{out} is no extxyz file: give --out a name that ends in .extxyz")
    if path.exists() and not overwrite:
        raise UsageError(f"{out} exists: choose another --out, or replace it with --overwrite")
    potential, structures = _open(model, data, options)
    count = predict_into(path, potential, structures, max_atoms=max_atoms, progress=sys.stderr.isatty())
    print(f"wrote {out}: {count} structures")


def _open(model: str, data: str, options: _Options) -> tuple[Any, Any]:
    """Loads the potential and opens the structures, each with its share of the options."""
    from escaip.data import open_source
    from escaip.files import resolve
    from escaip.potential.loading import load_potential

    names = ModelOptions.__annotations__
    where = {name: value for name, value in options.items() if name in names}
    read = {name: value for name, value in options.items() if name not in names}
    return load_potential(model, **where), open_source(resolve(data), **reading(**read))  # type: ignore[arg-type]
