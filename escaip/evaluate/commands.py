"""The ``evaluate`` and ``predict`` commands."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from escaip.data.commands import reading
from escaip.options import DataPath, ModelFile, ModelOptions, ReadOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ase import Atoms


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
    from escaip.data.readers import ReadReport
    from escaip.evaluate.run import evaluate_into

    read = ReadReport()
    (potential,), structures = _open([model], data, options, read)
    report = evaluate_into(
        Path(out), potential, structures, {"model": model, "data": data}, free_atoms_only=free_atoms,
        max_atoms=max_atoms, plots=plots, progress=sys.stderr.isatty(),
    )  # fmt: skip
    print(report.table())
    if read.absent:
        print(read.summary())
    print(f"wrote {out}")


def predict(
    model: ModelFile,
    data: DataPath,
    *,
    out: str,
    committee: list[ModelFile] | None = None,
    max_atoms: int | None = None,
    overwrite: bool = False,
    **options: Unpack[_Options],
) -> None:
    """Predicts energies, forces and stress of any number of structures; the same command continues after a kill.

    Args:
        model: a model file
        data: structures; labels are not needed
        out: the extxyz file to write
        committee: further members beside MODEL; their mean and their spread are written
        max_atoms: atoms evaluated at once (default: what is fastest and fits into memory)
        overwrite: replace what is there

    Example: escaip predict example:organic structures.xyz --out predictions.extxyz
    """
    from escaip.data.readers import data_sha256
    from escaip.evaluate.frames import check_out, write_frames
    from escaip.evaluate.predictions import predict_frames
    from escaip.files import model_file, sha256
    from escaip.signals import continued_by_same_command

    check_out(Path(out), overwrite)
    models = [model, *(committee or [])]
    potentials, structures = _open(models, data, options)
    run = {
        "command": "predict", "model": [sha256(model_file(name)) for name in models],
        "data": data_sha256(data, options.get("format")), **options,
    }  # fmt: skip
    run.pop("device", None)

    def remaining(count: int) -> Iterator[Atoms]:
        rest = islice(structures, count, None)
        return predict_frames(potentials, rest, first=count, max_atoms=max_atoms, progress=sys.stderr.isatty())

    with continued_by_same_command():
        count = write_frames(Path(out), run, remaining, overwrite=overwrite)
    print(f"wrote {out}: {count} structures")


def _open(models: list[str], data: str, options: _Options, report: Any = None) -> tuple[list[Any], Any]:
    """Loads the potentials and opens the structures, each with its share of the options."""
    from escaip.data import open_source
    from escaip.potential.loading import load_potential

    names = ModelOptions.__annotations__
    where = {name: value for name, value in options.items() if name in names}
    read = {name: value for name, value in options.items() if name not in names}
    potentials = [load_potential(model, **where) for model in models]  # type: ignore[arg-type]
    return potentials, open_source(data, report=report, **reading(**read))
