"""Model files: safetensors with a JSON header, and Lightning checkpoints read without running code.

A ``.escaip`` file is a safetensors file whose metadata entry ``escaip`` is the JSON description of
the potential (schema version, config, metadata, units); its tensors are the weights. Neither
format can carry code; ``torch.load`` is called with ``weights_only=True`` and nothing else. Packages of machine code
(:mod:`escaip.potential.export`) are run by :func:`load_potential` alone, and only from files named ``.pt2``.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from escaip.errors import CheckpointError, ConfigError, EscaipError
from escaip.files import resolve
from escaip.graph.features import PUBLISHED_FLOOR
from escaip.models import kind_named, kind_of
from escaip.potential import Potential, PotentialMetadata
from escaip.potential.potential import ENERGY_BUFFERS
from escaip.potential.precision import PRECISIONS, check_precision

PotentialKind = TypeVar("PotentialKind", bound=Potential)
SCHEMA_VERSION = 5
UNITS = {"length": "angstrom", "energy": "eV", "force": "eV/angstrom", "stress": "eV/angstrom^3, positive in tension"}


def describe_potential(potential: Potential) -> dict[str, Any]:
    """Returns everything but the weights as plain JSON values."""
    return {
        "schema": SCHEMA_VERSION,
        "architecture": kind_of(potential.config).name,
        "config": potential.config.to_dict(),
        "metadata": potential.metadata.to_dict(),
        "units": dict(UNITS),
        "cutoff": potential.cutoff,
    }


def save_potential(potential: Potential, path: str | os.PathLike[str]) -> None:
    """Writes a ``.escaip`` file aside and renames it, so that an old file survives a failure.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in potential.state_dict().items()}
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(save(tensors, metadata={"escaip": json.dumps(describe_potential(potential))}))
        os.replace(aside, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}: choose another --out") from error
    finally:
        aside.unlink(missing_ok=True)


def load_potential(
    path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    dataset: str | None = None,
    precision: str = "highest",
) -> Potential:
    """Reads a potential from a ``.escaip`` file or a Lightning ``.ckpt``, weights only, or a package of ours.

    Args:
        path: the file, or ``example:NAME`` for one of md/potentials. A package (``.pt2``, docs/export.md) is machine
            code, which is run: load only those you made.
        device: a torch device; ``"auto"`` takes CUDA where there is one, else the CPU.
        dtype: ``float32`` or ``float64``; by default as stored.
        dataset: whose element references to use, for potentials trained on several sets.
        precision: ``highest``, ``tf32``, ``float16`` or ``bfloat16`` (docs/precision.md).

    Returns:
        The potential, in evaluation mode.

    Raises:
        CheckpointError: missing, damaged, unsafe, or of another schema; the message says which.
        ConfigError: no such set, device or dtype, or a precision that they do not have.
    """
    from escaip.potential.export import is_package, load_package

    path = resolve(path)
    _check_exists(path)
    if is_package(path):
        return load_package(path, device, dtype, dataset, precision)
    potential = read_potential(path)
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
        CheckpointError: as :func:`load_potential`.
    """
    path = resolve(path)
    return build_potential(*_read(path), path, Potential).eval()


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the migrated description in a model file, without building the model."""
    path = resolve(path)
    return migrate(_read(path)[0], path)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights."""
    from escaip.potential.export import is_package, read_package

    _check_exists(path)
    path = Path(path)
    if is_package(path):
        return read_package(path)
    return _read_lightning(path) if _is_zip(path) else _read_safetensors(path)


def _check_exists(path: str | os.PathLike[str]) -> None:
    if not os.path.isfile(path):
        raise CheckpointError(f"model file {os.fspath(path)} does not exist: pass a .ckpt or .escaip file")


def migrate(description: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Brings a description to the present schema, one version at a time.

    Raises:
        CheckpointError: written by a newer version, or without a schema.
    """
    version = description.get("schema")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path} names no valid schema version: it is not a model of this package")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema {version}, this version reads up to {SCHEMA_VERSION}: install a newer escaip"
        )
    while version < SCHEMA_VERSION:
        description = _MIGRATIONS[version](description)
        version += 1
    return description


def _from_version_1(description: dict[str, Any]) -> dict[str, Any]:
    """Version 1 kept elements and level of theory at the top, and its units had no stress."""
    upgraded = {key: value for key, value in description.items() if key not in ("elements", "level_of_theory")}
    upgraded["schema"] = 2
    upgraded["metadata"] = {
        "elements": description.get("elements", []),
        "level_of_theory": description.get("level_of_theory", "unknown"),
        "datasets": [],
        "provenance": {},
    }
    upgraded["units"] = dict(UNITS)
    return upgraded


def _from_version_2(description: dict[str, Any]) -> dict[str, Any]:
    """Version 2 had no shifts of the element references: they are zero (see :func:`build_potential`)."""
    return {**description, "schema": 3}


def _from_version_3(description: dict[str, Any]) -> dict[str, Any]:
    """Version 3 had one floor of the orientational order."""
    return {**description, "schema": 4, "config": {"boo_floor": PUBLISHED_FLOOR, **description["config"]}}


def _from_version_4(description: dict[str, Any]) -> dict[str, Any]:
    """Version 4 had no repulsion: there is none (see :class:`escaip.potential.zbl.Repulsion`)."""
    return {**description, "schema": 5}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _from_version_1, 2: _from_version_2, 3: _from_version_3, 4: _from_version_4,
}  # fmt: skip


def _is_zip(path: Path) -> bool:
    """Whether the file is an archive of ``torch.save``; truncated ones still begin like one."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            header = stream.metadata() or {}
            weights = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no model file, or is damaged ({error}): copy or train it again") from error
    if "escaip" not in header:
        raise CheckpointError(f"{path} is a safetensors file of another program: pass a .ckpt or .escaip file")
    try:
        description = json.loads(header["escaip"])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} has a damaged header ({error}): copy or train it again") from error
    return description, weights


def _read_lightning(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects that could run code, and was not read: export it with the program that wrote it"
        ) from error
    except (RuntimeError, OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged ({first_line}): copy or train it again") from error
    if not isinstance(checkpoint, dict) or "escaip" not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is a checkpoint of another program: pass a .ckpt or .escaip file")
    prefix = "potential."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    return checkpoint["escaip"], weights


def build_potential(
    description: dict[str, Any], weights: dict[str, Tensor], path: Path, kind: type[PotentialKind]
) -> PotentialKind:
    """A potential from what a file holds, on the CPU, in training mode as any new module.

    Args:
        description: of any schema.
        weights: by name.
        path: of the file, for messages.
        kind: class of the potential.

    Raises:
        CheckpointError: they do not fit each other.
    """
    description = migrate(description, path)
    try:
        potential = kind(
            kind_named(description["architecture"]).config.from_dict(description["config"]),
            metadata=PotentialMetadata.from_dict(description["metadata"]),
        )
        floating = [tensor.dtype for name, tensor in weights.items() if name.startswith("model.")]
        if floating:
            potential = potential.to(floating[0])
        # One set of references, or one for each of several: the file says.
        shifts = torch.zeros_like(weights["element_references"], dtype=torch.float64)
        weights = {"element_shifts": shifts, **weights}  # before version 3 there were none
        for name in ENERGY_BUFFERS:
            setattr(potential, name, torch.zeros_like(weights[name], dtype=torch.float64))
        potential.load_state_dict(weights)
    except EscaipError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} does not describe a whole potential ({first_line})") from error
    return potential


def resolve_device(device: str | torch.device) -> torch.device:
    """Returns the device meant; ``"auto"`` takes CUDA where there is one.

    Raises:
        ConfigError: it does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} does not exist: choose auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but this machine has no usable CUDA: choose auto or cpu")
    return chosen


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Returns the precision meant, ``float32`` or ``float64``.

    Raises:
        ConfigError: another one.
    """
    choices = {"float32": torch.float32, "float64": torch.float64}
    name = str(dtype).removeprefix("torch.")
    if name not in choices:
        hint = f", with precision {name} for the products" if name in PRECISIONS else ""
        raise ConfigError(f"dtype {name!r} is not supported: choose {' or '.join(choices)}{hint}")
    return choices[name]
