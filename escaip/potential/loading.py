"""Potentials from files: model files, Lightning checkpoints and packages of machine code."""

from __future__ import annotations

import os

import torch

from escaip.files import model_file, sha256
from escaip.potential.export import is_package, load_package, read_package
from escaip.potential.model_file import read_model_file
from escaip.potential.potential import Potential, build_potential
from escaip.potential.precision import check_precision, resolve_device, resolve_dtype


def load_potential(
    path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    dataset: str | None = None,
    precision: str = "highest",
) -> Potential:
    """Reads a potential from a ``.escaip`` file or a Lightning ``.ckpt``, weights only, or a package of ours.

    Args:
        path: the file, or ``example:NAME`` for one of md/potentials. A package (``.pt2``) is machine
            code, which is run: load only those you made.
        device: a torch device; ``"auto"`` takes CUDA where there is one, else the CPU.
        dtype: ``float32`` or ``float64``; by default as stored.
        dataset: whose element references to use, for potentials trained on several sets.
        precision: ``highest``, ``tf32``, ``float16`` or ``bfloat16`` (docs/howto/speed.md).

    Returns:
        The potential, in evaluation mode.

    Raises:
        CheckpointError: missing, damaged, unsafe, or of another schema; the message says which.
        ConfigError: no such set, device or dtype, or a precision that they do not have.
    """
    path = model_file(path)
    if is_package(path):
        potential = load_package(path, device, dtype, dataset, precision)
        potential.source = path.name, sha256(path)
        return potential
    potential = read_potential(path)
    potential.source = path.name, sha256(path)
    if dataset is not None:
        potential.choose_dataset(dataset)
    if dtype is not None:
        potential = potential.to(resolve_dtype(dtype))
    potential = potential.to(resolve_device(device)).eval()
    check_precision(precision, potential.dtype, potential.device)
    potential.precision = precision
    return potential


def read_potential(path: str | os.PathLike[str]) -> Potential:
    """Reads a potential as stored, on the CPU, in evaluation mode; of a package its weights: nothing in it is run.

    Raises:
        CheckpointError: as ``load_potential``.
    """
    path = model_file(path)
    description, weights = read_package(path) if is_package(path) else read_model_file(path)
    return build_potential(description, weights, path).eval()
