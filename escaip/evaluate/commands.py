"""The ``evaluate`` and ``predict`` commands."""

from __future__ import annotations

import sys
from typing import Any

from typing_extensions import Unpack

from escaip.data.commands import reading
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
    from escaip.evaluate.run import evaluate_files

    where, read = _divided(options)
    report = evaluate_files(
        model, data, out, free_atoms_only=free_atoms, max_atoms=max_atoms, plots=plots,
        progress=sys.stderr.isatty(), model_options=where, read_options=reading(**read),
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
    from escaip.evaluate.run import predict_file

    where, read = _divided(options)
    count = predict_file(
        model, data, out, max_atoms=max_atoms, overwrite=overwrite, progress=sys.stderr.isatty(),
        model_options=where, read_options=reading(**read),
    )  # fmt: skip
    print(f"wrote {out}: {count} structures")


def _divided(options: _Options) -> tuple[dict[str, Any], dict[str, Any]]:
    names = ModelOptions.__annotations__
    model = {name: value for name, value in options.items() if name in names}
    return model, {name: value for name, value in options.items() if name not in names}
