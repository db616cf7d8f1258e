"""What a resumed run shares with the run that it continues, and what a validation set shares with the training set."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from lightning.pytorch import Callback, Trainer

from escaip.data import AtomicDataModule
from escaip.data.dataset import MixedDataset, StructureSet
from escaip.data.statistics import TrainingSums
from escaip.errors import ConfigError, DataError, UnsupportedElementError
from escaip.train.module import PotentialModule

TRAINER = "trainer_settings"
# Entries of a checkpoint with settings, and what these are called on the command line.
_KEYS = {"hyper_parameters": "model", "datamodule_hyper_parameters": "data", TRAINER: "trainer"}
# The architecture and the structures have checks of their own; the others do not change what is computed.
_FREE = (
    "model.architecture", "model.compile", "model.recompute", "data.train", "data.val", "data.test", "data.replay",
    "data.neighbor_cutoff", "data.num_workers", "data.start_method", "data.cache_dir", "data.verify",
)  # fmt: skip
_LIMITS = ("trainer.max_epochs", "trainer.max_steps")


class DataCheck(Callback):
    """Refuses to resume a run with other data, and to start one whose validation set has elements of its own."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the settings of the trainer."""
        checkpoint[TRAINER] = trainer_settings(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Compares structures and level of theory; earlier checkpoints do not have them.

        Raises:
            ConfigError: they differ.
        """
        if trainer.state.fn != "fit":
            return
        stored: dict[str, Any] = checkpoint.get(AtomicDataModule.__qualname__, {})
        now = trainer.datamodule.state_dict()  # type: ignore[attr-defined]
        for name in {**stored, **now} if stored else ():
            if stored.get(name) != now.get(name):
                raise other_settings(trainer.ckpt_path, f"data.{name}", stored.get(name), now.get(name))

    def on_fit_start(self, trainer: Trainer, pl_module: PotentialModule) -> None:  # type: ignore[override]
        """Compares elements of the validation set, and charges of all structures, with what the model will know.

        Raises:
            UnsupportedElementError: some elements are unknown.
            DataError: structures are charged and the model is not conditioned on it.
        """
        potential, sets = pl_module.potential, trainer.datamodule.datasets  # type: ignore[attr-defined]
        if not potential.config.charge:
            for part in ("train", "val"):
                if part in sets:
                    _check_neutral(f"data.{part}", sets[part])
        data = sets.get("val")
        members = data.members if isinstance(data, MixedDataset) and potential.datasets else {"": data}
        for name, member in members.items() if data is not None else ():
            known = potential.supported
            if name:
                known = ~torch.isnan(potential.element_references[potential.datasets.index(name)])
            sums = TrainingSums()
            member.accumulate(sums)
            unknown = ", ".join(chemical_symbols[z] for z in sums.elements if not known[z])
            if unknown:
                place = f".{name}" if name else ""
                raise UnsupportedElementError(
                    f"data.val{place} holds {unknown}, which data.train{place} does not: train on structures with it, "
                    "or leave them out; data.split divides otherwise with another data.seed"
                )


def _check_neutral(place: str, data: StructureSet) -> None:
    """Raises DataError where a set has charged structures; names the first."""
    charged = np.flatnonzero(data.charges)
    if len(charged):
        raise DataError(
            f"{place}: {len(charged)} of {len(data)} structures are charged, {data.structure_id(int(charged[0]))} the "
            "first, and the model is not told: set model.architecture.charge to true, or leave them out"
        )


def trainer_settings(trainer: Trainer) -> dict[str, Any]:
    """Returns the settings of a trainer that the schedule of the learning rate depends on."""
    names = ("max_epochs", "max_steps", "accumulate_grad_batches")
    return {name: getattr(trainer, name) for name in names}


def check_settings(path: str, checkpoint: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Makes sure that a run continues the one in a checkpoint; entries that the checkpoint lacks are not compared.

    Args:
        path: of the checkpoint.
        checkpoint: its content.
        given: the settings of this run under the same keys.

    Raises:
        ConfigError: a setting differs; a limit of the trainer may be raised.
    """
    for key, group in _KEYS.items():
        stored, now = (dict(_flat(values.get(key) or {}, group)) for values in (checkpoint, given))
        for name, was in stored.items():
            value = now.get(name, was)
            if value != was and (name not in _LIMITS or 0 <= _limit(value) < _limit(was)):
                raise other_settings(path, name, was, value)


def other_settings(path: object, name: str, was: object, value: object) -> ConfigError:
    """Returns the error for a setting that differs from that of the run in a checkpoint."""
    return ConfigError(
        f"{path} was trained with {name} {_shown(was)}, this run has {_shown(value)}: resume with the same, or start a "
        f"new run from its weights with --model.init_from {path}"
    )


def _limit(value: int | None) -> float:
    """Returns a limit of the trainer, where None and -1 stand for none."""
    return math.inf if value in (None, -1) else float(value)


def _flat(values: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    """Yields the settings by their names on the command line, as JSON values."""
    for name, value in values.items():
        if name.startswith("_") or (full := f"{place}.{name}") in _FREE:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, full)
        else:
            yield full, json.loads(json.dumps(value, default=str))


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
