"""Normalizers and element references of fairchem-core's tasks.

fairchem-core predicts ``rmsd · output + mean`` for each task, and adds the references of all atoms to energies. We
predict ``scale · output`` plus references, with one scale for energy, forces and stress.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from escaip.errors import CheckpointError
from escaip.models import MAX_ATOMIC_NUMBER

_REMEDY = "use fairchem-core for this model"
# Largest relative difference of two scales that are the same number, rounded differently.
_SAME = 1e-6
_DTYPES = {"DoubleTensor": torch.float64, "FloatTensor": torch.float32, "tensor": torch.float32}


@dataclass(frozen=True)
class Normalization:
    """Scale and references of one data set.

    Attributes:
        scale: eV for each unit of output.
        force_factor: ratio of the scale of direct forces to that of energies.
        references: ``(119,)`` float64 eV by atomic number, NaN for elements without one.
    """

    scale: float
    force_factor: float
    references: Tensor


def read_tasks(tasks: Sequence[Mapping[str, Any]], *, conservative: bool) -> dict[str, Normalization]:
    """Returns the normalization of each data set, in the order of the energy tasks.

    Args:
        tasks: configurations of fairchem-core's ``Task``.
        conservative: whether forces are the gradient of the energy.

    Raises:
        CheckpointError: a task that a potential here cannot represent exactly; the message names it.
    """
    found: dict[str, Normalization] = {}
    for task in tasks:
        if _property(task) == "energy":
            for name in _datasets(task):
                if name in found:
                    raise CheckpointError(
                        f"fairchem tasks give the data set {name} two energies: pass the tasks of one"
                    )
                found[name] = _normalization(task, name, tasks, conservative)
    if not found:
        raise CheckpointError("no fairchem task has the property energy: pass the tasks that the model was trained on")
    return found


def _normalization(
    task: Mapping[str, Any], dataset: str, tasks: Sequence[Mapping[str, Any]], conservative: bool
) -> Normalization:
    scale = _scale(task)
    factor = 1.0
    for other in tasks:
        kind = _property(other)
        if kind not in ("forces", "stress") or dataset not in _datasets(other):
            continue
        ratio = _scale(other) / scale
        if kind == "forces" and not conservative:
            factor = ratio
        elif abs(ratio - 1.0) > _SAME:
            raise _refused(
                other,
                f"scales {kind} by {_scale(other):g} but energies by {scale:g}, so that they are no derivatives of the "
                f"energy: {_REMEDY}",
            )
    return Normalization(scale, factor, _references(task))


def _scale(task: Mapping[str, Any]) -> float:
    """Returns ``rmsd`` of the normalizer, whose mean must be zero."""
    normalizer = task.get("normalizer") or {}
    if not isinstance(normalizer, Mapping):
        raise _refused(task, f"has a normalizer that is no mapping: {_REMEDY}")
    unread = sorted(set(normalizer) - {"_target_", "mean", "rmsd"})
    if unread:
        raise _refused(task, f"has a normalizer given by {unread[0]}: pass tasks with its mean and rmsd")
    mean, rmsd = (_number(task, normalizer.get(key, default)) for key, default in (("mean", 0.0), ("rmsd", 1.0)))
    if mean != 0.0:
        what = "energy, whatever its size" if _property(task) == "energy" else "component"
        raise _refused(
            task,
            f"adds its mean {mean:g} to each {what}, which no sum over atoms can: pass tasks with mean 0 and add it "
            "yourself",
        )
    if not rmsd > 0:
        raise _refused(task, f"has rmsd {rmsd:g}, expected a positive number: {_REMEDY}")
    return rmsd


def _references(task: Mapping[str, Any]) -> Tensor:
    """Returns the element references of a task, ``(119,)`` float64 eV."""
    values, dtype = task.get("element_references"), torch.float64
    if values is None:
        return torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
    if isinstance(values, Mapping):
        values = values.get("element_references")
    try:
        if isinstance(values, Mapping):  # a tensor to be made, as Hydra writes it
            dtype = _DTYPES[str(values.get("_target_", "")).rpartition(".")[2]]
            values = values["_args_"][0]
        read = torch.as_tensor(values, dtype=dtype).to(torch.float64).flatten()[: MAX_ATOMIC_NUMBER + 1]
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise _refused(task, "has element references that are no numbers: pass tasks with the values") from error
    references = torch.full((MAX_ATOMIC_NUMBER + 1,), torch.nan, dtype=torch.float64)
    references[: len(read)] = read
    return references


def _property(task: Mapping[str, Any]) -> str:
    if not isinstance(task, Mapping):
        raise CheckpointError(f"a fairchem task is a {type(task).__name__}, expected a mapping of options")
    return str(task.get("property", ""))


def _refused(task: Mapping[str, Any], reason: str) -> CheckpointError:
    return CheckpointError(f"fairchem task {task.get('name', 'without a name')} {reason}")


def _datasets(task: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in task.get("datasets") or ["default"]]


def _number(task: Mapping[str, Any], value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise _refused(task, f"has a normalizer of {type(value).__name__}: pass tasks with numbers") from error
