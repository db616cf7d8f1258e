"""Model files: safetensors with a JSON header, and Lightning checkpoints read without running code.

A ``.escaip`` file is a safetensors file whose metadata entry ``escaip`` is the JSON description of the potential
(schema version, architecture, config, metadata, units); its tensors are the weights. Neither format can carry code:
``torch.load`` is called with ``weights_only=True`` and nothing else.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip.errors import CheckpointError
from escaip.files import first_line, write_aside

if TYPE_CHECKING:  # importing this module is cheap, so that a file is described within a second
    from torch import Tensor

    from escaip.models import ModelConfig

SCHEMA_VERSION = 8
UNITS = {"length": "angstrom", "energy": "eV", "force": "eV/angstrom", "stress": "eV/angstrom^3, positive in tension"}


@dataclass(frozen=True)
class PotentialMetadata:
    """Origin of a potential, stored with it.

    Attributes:
        elements: atomic numbers it has seen; empty accepts every element (untrained models).
        level_of_theory: of the labels, in words.
        datasets: names of the training sets.
        provenance: anything else worth keeping: versions, seeds, command lines; plain JSON values.
    """

    elements: tuple[int, ...] = ()
    level_of_theory: str = "unknown"
    datasets: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {**asdict(self), "elements": list(self.elements), "datasets": list(self.datasets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PotentialMetadata:
        """Inverse of ``to_dict``."""
        return cls(
            elements=tuple(int(z) for z in values["elements"]),
            level_of_theory=str(values["level_of_theory"]),
            datasets=tuple(str(name) for name in values["datasets"]),
            provenance=dict(values["provenance"]),
        )


def describe(architecture: str, config: ModelConfig, metadata: PotentialMetadata) -> dict[str, Any]:
    """Returns the description of a potential: everything but its weights, as plain JSON values."""
    return {
        "schema": SCHEMA_VERSION,
        "architecture": architecture,
        "config": config.to_dict(),
        "metadata": metadata.to_dict(),
        "units": dict(UNITS),
        "cutoff": config.graph.cutoff,
    }


def write_model_file(
    path: str | os.PathLike[str], description: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Writes a ``.escaip`` file whole or not at all, so that an old file survives a failure.

    Args:
        path: of the file.
        description: of ``describe``.
        weights: by name.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with write_aside(path, CheckpointError) as aside:
        aside.write_bytes(save(tensors, metadata={"escaip": json.dumps(description)}))


def read_model_file(path: Path, framework: str = "pt") -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the description, of any schema, and the weights in an ``.escaip`` file or a Lightning checkpoint.

    Args:
        path: of the file.
        framework: ``"pt"`` for tensors; ``"np"`` for arrays from an ``.escaip`` file, read without torch.

    Raises:
        CheckpointError: damaged, unsafe or of another program.
    """
    return _read_lightning(path) if is_archive(path) else _read_safetensors(path, framework)


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
        upgrade = _MIGRATIONS.get(version, dict)
        version += 1
        description = {**upgrade(description), "schema": version}
    return description


def _from_version_1(description: dict[str, Any]) -> dict[str, Any]:
    """Version 1 kept elements and level of theory at the top, and its units had no stress."""
    upgraded = {key: value for key, value in description.items() if key not in ("elements", "level_of_theory")}
    upgraded["metadata"] = {
        "elements": description.get("elements", []),
        "level_of_theory": description.get("level_of_theory", "unknown"),
        "datasets": [],
        "provenance": {},
    }
    upgraded["units"] = dict(UNITS)
    return upgraded


def _from_version_3(description: dict[str, Any]) -> dict[str, Any]:
    """Version 3 had one floor of the orientational order."""
    return {**description, "config": {"boo_floor": 1e-6, **description["config"]}}


# The others only lacked arrays, which are zero or empty then: shifts of the element references (2), the repulsion (4),
# the core guard (5), energies of charges (6), the bond guard (7).
_MIGRATIONS = {1: _from_version_1, 3: _from_version_3}


def is_archive(path: Path) -> bool:
    """Returns whether a file is an archive of ``torch.save``; truncated ones still begin like one."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _read_safetensors(path: Path, framework: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as stream:
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
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects that could run code, and was not read: export it with the program that wrote it"
        ) from error
    except (RuntimeError, OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}): copy or train it again") from error
    if not isinstance(checkpoint, dict) or "escaip" not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is a checkpoint of another program: pass a .ckpt or .escaip file")
    prefix = "potential."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    return checkpoint["escaip"], weights
