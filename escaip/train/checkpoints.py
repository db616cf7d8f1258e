"""Checkpoints: the best, the last, and those kept on the way; written aside and renamed, read as plain data only."""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from escaip.errors import CheckpointError, ConfigError

BEST, LAST = "best.ckpt", "last.ckpt"


class PlainCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a kill leaves the old file; reads without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint.

        Raises:
            CheckpointError: the file cannot be written.
        """
        target = Path(path)
        aside = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            aside.unlink(missing_ok=True)
            raise CheckpointError(f"{target} cannot be written ({error}): check permissions and space") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint, always with ``weights_only=True``.

        Raises:
            CheckpointError: missing, damaged, or with anything but plain data.
        """
        return read_checkpoint(path)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the content of a checkpoint to resume from.

    Raises:
        CheckpointError: missing, damaged, or with anything but plain data.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"checkpoint {path} does not exist: pass a .ckpt file, or last or best of an earlier run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is no checkpoint, or holds objects that could run code: not read") from error
    except (RuntimeError, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged ({reason}): resume from another checkpoint") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "loops" not in checkpoint:
        raise CheckpointError(f"{path} holds no training state: resume from best.ckpt or last.ckpt of a run")
    return checkpoint


class BestAndLast(Checkpoint):
    """Keeps ``best.ckpt`` by a monitored figure and ``last.ckpt``, in the folder of the run.

    ``last.ckpt`` is written at the end of every epoch, every ``every_n_steps`` optimizer steps and at the last step.
    Never between an optimizer step and the next while gradients accumulate, since they are not stored.

    Args:
        monitor: figure that ``best`` minimises.
        every_n_steps: optimizer steps between writings of ``last.ckpt`` within an epoch; None for none.
        keep_every_n_steps: also keep ``step-N.ckpt`` at these steps; None for none.
        dirpath: folder; default that of the run's log.

    Raises:
        ConfigError: a number of steps below 1.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        every_n_steps: int | None = 500,
        keep_every_n_steps: int | None = None,
        dirpath: str | None = None,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep_every_n_steps", keep_every_n_steps)):
            if value is not None and value < 1:
                raise ConfigError(f"checkpoint.{name} is {value}: it must be at least 1, or null")
        self.monitor = monitor
        self.every_n_steps, self.keep_every_n_steps = every_n_steps, keep_every_n_steps
        self.dirpath = dirpath
        self.best_model_path, self.last_model_path = "", ""
        self.best_model_score: float | None = None
        self.best_step: int | None = None
        self._saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fixes the folder, the same on every process."""
        folder = self.dirpath or trainer.log_dir or trainer.default_root_dir
        self.dirpath = str(trainer.strategy.broadcast(str(folder)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves within an epoch; the end of an epoch has a hook of its own."""
        step = trainer.global_step
        loop = trainer.fit_loop.epoch_loop
        if not self._may_save(trainer) or step == self._saved_step or loop._should_accumulate():
            return
        if _due(step, self.keep_every_n_steps):
            trainer.save_checkpoint(self._path(f"step-{step}.ckpt"), weights_only=False)
        if loop.batch_progress.is_last_batch:
            return
        if _due(step, self.every_n_steps) or step == trainer.max_steps:
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the best so far.

        Raises:
            ConfigError: the monitored figure is not logged.
        """
        if not self._may_save(trainer):
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ConfigError(f"checkpoint.monitor {self.monitor!r} is not logged: choose {known}")
        score = float(trainer.callback_metrics[self.monitor])
        if self.best_model_score is None or score < self.best_model_score or math.isnan(self.best_model_score):
            self.best_model_score, self.best_step = score, trainer.global_step
            self.best_model_path = self._path(BEST)
            trainer.save_checkpoint(self.best_model_path, weights_only=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after an epoch and its validation."""
        if self._may_save(trainer) and trainer.global_step != self._saved_step:
            self._save_last(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Paths and score, plain values."""
        return {
            "best_model_path": self.best_model_path,
            "best_model_score": self.best_model_score,
            "best_step": self.best_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the search for the best where it was."""
        self.best_model_path = state_dict["best_model_path"]
        self.best_model_score, self.best_step = state_dict["best_model_score"], state_dict["best_step"]

    def _save_last(self, trainer: Trainer) -> None:
        path = self._path(LAST)
        trainer.save_checkpoint(path, weights_only=False)
        self.last_model_path, self._saved_step = path, trainer.global_step

    def _path(self, name: str) -> str:
        assert self.dirpath is not None
        return os.path.join(self.dirpath, name)

    @staticmethod
    def _may_save(trainer: Trainer) -> bool:
        trying = bool(getattr(trainer, "fast_dev_run", False))
        return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trying


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step > 0 and step % interval == 0
