"""Inference checkpoints of fairchem-core, read without running code from them.

The file is a pickle of ``MLIPInferenceCheckpoint`` with configurations of omegaconf. ``torch.load`` reads it with
``weights_only=True``, which accepts tensors, plain values and the few classes listed below. Instances of those classes
are replaced by inert records of their state.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from escaip.errors import CheckpointError
from escaip.files import first_line

_MAX_DEPTH = 50


@dataclass(frozen=True)
class FairchemCheckpoint:
    """Contents of an inference checkpoint.

    Attributes:
        weights: the averaged ones if present.
        config: of the model, plain values.
        tasks: their configurations, plain values.
    """

    weights: dict[str, Tensor]
    config: dict[str, Any]
    tasks: list[dict[str, Any]]


class _Record:
    """Inert replacement of any object or class in a checkpoint: it keeps the state and does nothing."""

    __slots__ = ("state",)
    state: dict[str, Any]

    def __new__(cls, *args: Any) -> _Record:
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise pickle.UnpicklingError(f"an object has a {type(state).__name__} for a state")
        self.state = state


class _Checkpoint(_Record):
    """Replaces ``MLIPInferenceCheckpoint``."""

    __slots__ = ()


class _Node(_Record):
    """Replaces a value, a mapping or a list of omegaconf, with what it holds in ``_val`` or ``_content``."""

    __slots__ = ()


def _mapping(*_: Any) -> dict[Any, Any]:
    """Replaces ``defaultdict``, without its factory."""
    return {}


_STAND_INS: dict[str, Callable[..., Any]] = {
    "fairchem.core.units.mlip_unit.api.inference.MLIPInferenceCheckpoint": _Checkpoint,
    "fairchem.core.units.mlip_unit.mlip_unit.MLIPInferenceCheckpoint": _Checkpoint,
    "omegaconf.dictconfig.DictConfig": _Node,
    "omegaconf.listconfig.ListConfig": _Node,
    "omegaconf.base.ContainerMetadata": _Record,
    "omegaconf.base.Metadata": _Record,
    "typing.Any": _Record,
    "collections.defaultdict": _mapping,
    **{
        f"omegaconf.nodes.{name}": _Node
        for name in ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode")
    },
    **{
        f"{module}.{name}": _Record for module in ("builtins", "__builtin__") for name in ("dict", "list", "int", "str")
    },
}


def read_checkpoint(path: Path) -> FairchemCheckpoint:
    """Reads the file.

    Raises:
        CheckpointError: missing, damaged, unsafe, or no inference checkpoint.
    """
    record = _load(path)
    if not isinstance(record, _Checkpoint):
        raise CheckpointError(
            f"{path} is no inference checkpoint of fairchem-core: pass the inference_ckpt.pt that its training writes"
        )
    weights = record.state.get("ema_state_dict") or record.state.get("model_state_dict")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds no weights: pass the inference_ckpt.pt that the training wrote")
    try:
        config, tasks = (plain(record.state.get(name)) for name in ("model_config", "tasks_config"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(config, dict) or not isinstance(tasks or [], list):
        raise CheckpointError(f"{path} holds no configuration of a model: pass the file that the training wrote")
    return FairchemCheckpoint(dict(weights), config, tasks or [])


def plain(value: Any, depth: int = 0) -> Any:
    """Converts a configuration of omegaconf to dicts, lists and values.

    Raises:
        CheckpointError: nested too deeply, or not a configuration.
    """
    if depth > _MAX_DEPTH:
        raise CheckpointError("its configuration is nested too deeply: the file is damaged, or no checkpoint")
    if isinstance(value, _Node):
        return plain(value.state.get("_val", value.state.get("_content")), depth + 1)
    if isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, str) and value.startswith("${"):
        raise CheckpointError(f"its configuration refers to {value} outside of itself: resolve it before saving")
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    raise CheckpointError(f"its configuration holds a {type(value).__name__.strip('_')}: pass plain values")


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist: pass an inference checkpoint of fairchem-core")
    stand_ins: list[Any] = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects that could run code, and was not read: pass an inference checkpoint of fairchem-core"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} is damaged, or no checkpoint ({first_line(error)})") from error
