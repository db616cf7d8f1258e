"""Predictions of a model file for a data file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ase.io
import torch
from tqdm import tqdm

from escaip.data import AtomicData, open_source
from escaip.errors import UsageError
from escaip.files import resolve, write_aside
from escaip.potential.loading import load_potential
from escaip.potential.predict import StructurePrediction, predict_pairs
from escaip.types import TARGETS


def predict_file(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_atoms: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
    model_options: dict[str, Any] | None = None,
    read_options: dict[str, Any] | None = None,
) -> int:
    """Writes the structures of a data file with every predicted target instead of its labels.

    Args:
        model: ``.ckpt`` or ``.escaip``.
        data: see :func:`escaip.data.open_source`; labels in it are left out of the result.
        out: extxyz file to write; energies in eV, forces in eV/Å, stress in eV/Å³.
        max_atoms: atoms evaluated at once; by default what is fastest and fits into memory.
        overwrite: replace a file that exists.
        progress: show a bar.
        model_options: of :func:`escaip.load_potential`.
        read_options: of :func:`escaip.data.open_source`.

    Returns:
        The number of structures written.

    Raises:
        UsageError: the name does not end in ``.extxyz`` or ``.xyz``, or the file exists.
        EscaipError: the model or the data cannot be used, or the file cannot be written.
    """
    path = Path(out)
    if path.suffix not in (".extxyz", ".xyz"):
        raise UsageError(f"{out} is no extxyz file: give --out a name that ends in .extxyz")
    if path.exists() and not overwrite:
        raise UsageError(f"{out} exists: choose another --out, or replace it with --overwrite")
    potential = load_potential(model, **(model_options or {}))
    structures = open_source(resolve(data), **(read_options or {}))
    stress = potential.config.is_conservative
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside, aside.open("w", encoding="utf-8") as stream:
        pairs = predict_pairs(potential, structures, compute_stress=stress, max_atoms=max_atoms)
        for structure, predicted in tqdm(pairs, disable=not progress, unit="structure"):
            ase.io.write(stream, _with_predictions(structure, predicted).to_ase(), format="extxyz")
            count += 1
    return count


def _with_predictions(structure: AtomicData, predicted: StructurePrediction) -> AtomicData:
    """Returns the structure with predictions instead of its labels."""
    fields = dict(structure._store)
    for target in TARGETS.values():
        shape = (structure.num_nodes if target.per_atom else 1, *target.shape)
        value = predicted.properties.get(target.name, getattr(predicted, target.name, None))
        fields[target.name] = torch.full(shape, torch.nan) if value is None else torch.as_tensor(value).reshape(shape)
    return AtomicData.from_fields(fields)
