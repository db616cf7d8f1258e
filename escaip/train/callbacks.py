"""Callbacks of a run: checkpoints, progress, the table of errors and the final evaluation."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from escaip.errors import CheckpointError, ConfigError
from escaip.files import first_line, write_aside
from escaip.signals import StopSignals
from escaip.train.arguments import BEST, LAST
from escaip.train.metrics import figure_name, format_table
from escaip.types import TARGETS

if TYPE_CHECKING:
    from escaip.evaluate import EvaluationReport


BASELINE = "references, zero forces"
EVALUATION = "evaluation"
_NUM_LINES = 20


def run_folder(trainer: Trainer) -> Path:
    """Returns the folder of a run, as this process knows it.

    ``trainer.log_dir`` broadcasts from the first process, and waits forever unless all processes ask.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    return Path(getattr(logger, "log_dir", None) or trainer.default_root_dir)


class PlainCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a kill leaves the old file; reads without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint.

        Raises:
            CheckpointError: the file cannot be written.
        """
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with write_aside(path, CheckpointError) as aside, aside.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = first_line(error)
            raise CheckpointError(f"{path} cannot be written ({reason}): check permissions and space") from error

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
        raise CheckpointError(f"{path} is damaged ({first_line(error)}): resume from another checkpoint") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "loops" not in checkpoint:
        raise CheckpointError(f"{path} holds no training state: resume from best.ckpt or last.ckpt of a run")
    return checkpoint


class Stopped(SystemExit):
    """A run ended at a signal after saving its state; the exit status is 128 and the number of the signal."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(128 + received)
        self.received = received


class BestAndLast(Checkpoint):
    """Keeps ``best.ckpt`` by a monitored figure and ``last.ckpt``, in the folder of the run.

    ``last.ckpt`` is written at the end of every epoch, every ``every_n_steps`` optimizer steps and at the last step,
    but never while gradients accumulate, since they are not stored. Ctrl-C, SIGTERM and SIGUSR1 write it after the step
    or validation in progress and end the run with ``Stopped``; a second Ctrl-C ends it at once. A resumed run begins
    with a copy of the best checkpoint beside the one that it resumes.

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
        self.monitor, self.dirpath = monitor, dirpath
        self.every_n_steps, self.keep_every_n_steps = every_n_steps, keep_every_n_steps
        self.best_model_path, self.last_model_path = "", ""
        self.best_model_score: float | None = None
        self.best_step: int | None = None
        self._saved_step, self._stops = -1, False
        self._signals = StopSignals(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fixes the folder, the same on every process."""
        folder = self.dirpath or trainer.log_dir or trainer.default_root_dir
        self.dirpath = str(trainer.strategy.broadcast(str(folder)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the best checkpoint so far, also where nothing is left to train.

        Raises:
            ConfigError: the folder holds checkpoints of another run.
        """
        folder = Path(str(self.dirpath))
        is_own = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve().parent == folder.resolve()
        if not is_own and not self.last_model_path and any((folder / name).exists() for name in (BEST, LAST)):
            raise ConfigError(
                f"{folder} holds the checkpoints of another run: choose another --name or checkpoint.dirpath"
            )
        self._take_over_best(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to note signals."""
        self._signals.__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves signals to others."""
        self._signals.__exit__()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves signals to others."""
        self._signals.__exit__()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ends a run that a signal has let save, once loggers have the figures of its last step.

        Raises:
            Stopped: after a signal.
        """
        if self._stops:
            raise self._stopped()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves within an epoch; the end of an epoch, and a validation within it, have hooks of their own."""
        loop = trainer.fit_loop
        if not self._may_save(trainer) or loop.epoch_loop._should_accumulate():
            return
        if trainer.global_step != self._saved_step and _is_due(trainer.global_step, self.keep_every_n_steps):
            self._save(trainer, f"step-{trainer.global_step}.ckpt")
        assert loop._data_fetcher is not None
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._save_within_epoch(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves the best so far, for which direct forces of a first stage do not compete, and the last within an epoch.

        Raises:
            ConfigError: the monitored figure is not logged.
        """
        if not self._may_save(trainer):
            return
        if not pl_module.stages.is_first:
            self._save_best(trainer)
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._save_within_epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after an epoch and its validation.

        Raises:
            Stopped: after a signal.
        """
        if not self._may_save(trainer):
            return
        if trainer.global_step != self._saved_step:
            self._save_last(trainer)
        if self._must_stop(trainer):
            raise self._stopped()

    def state_dict(self) -> dict[str, Any]:
        """Returns path, score and step of the best checkpoint."""
        return {name: getattr(self, name) for name in ("best_model_path", "best_model_score", "best_step")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores ``state_dict``."""
        for name in self.state_dict():
            setattr(self, name, state_dict[name])

    def _save_best(self, trainer: Trainer) -> None:
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ConfigError(f"checkpoint.monitor {self.monitor!r} is not logged: choose {known}")
        score = float(trainer.callback_metrics[self.monitor])
        if self.best_model_score is None or score < self.best_model_score or math.isnan(self.best_model_score):
            self.best_model_score, self.best_step = score, trainer.global_step
            self.best_model_path = os.path.join(str(self.dirpath), BEST)
            self._save(trainer, BEST)

    def _save_within_epoch(self, trainer: Trainer) -> None:
        """Writes ``last.ckpt`` where it is due or the run is to end; the end of an epoch writes it anyway."""
        step = trainer.global_step
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        self._stops = self._must_stop(trainer)
        due = self._stops or _is_due(step, self.every_n_steps) or step == trainer.max_steps
        if due and step != self._saved_step:
            self._save_last(trainer)

    def _stopped(self) -> Stopped:
        return Stopped(self._signals.received or signal.SIGTERM)  # the signal of another process

    def _must_stop(self, trainer: Trainer) -> bool:
        """Whether any process has received a signal; all processes ask."""
        received = self._signals.received is not None or trainer.received_sigterm
        return bool(trainer.strategy.reduce_boolean_decision(received, all=False))

    def _take_over_best(self, trainer: Trainer) -> None:
        """Copies the best checkpoint of the run that is resumed; the best of another state is not taken."""
        if not self.best_model_path or trainer.ckpt_path is None:
            return
        found, own = Path(trainer.ckpt_path).with_name(BEST), Path(str(self.dirpath)) / BEST
        taken = False
        if trainer.is_global_zero and found.is_file():
            taken = read_checkpoint(found)["global_step"] == self.best_step
            if taken and found.resolve() != own.resolve():
                own.parent.mkdir(parents=True, exist_ok=True)
                with write_aside(own, CheckpointError) as aside:
                    shutil.copyfile(found, aside)
        if trainer.strategy.broadcast(taken):
            self.best_model_path = str(own)
        else:
            self.best_model_path, self.best_model_score, self.best_step = "", None, None

    def _save_last(self, trainer: Trainer) -> None:
        self.last_model_path = self._save(trainer, LAST)
        self._saved_step = trainer.global_step

    def _save(self, trainer: Trainer, name: str) -> str:
        path = os.path.join(str(self.dirpath), name)
        trainer.save_checkpoint(path, weights_only=False)
        return path

    @staticmethod
    def _may_save(trainer: Trainer) -> bool:
        trying = bool(getattr(trainer, "fast_dev_run", False))
        return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trying


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step > 0 and step % interval == 0


class TrainingProgress(ProgressBar):
    """One bar over the optimizer steps of the whole run, and one line per validation.

    Without a terminal (a log file, CI) it writes about twenty lines per run instead of a bar.

    Args:
        terminal: whether to draw a bar; default, whether standard error is a terminal.
    """

    def __init__(self, terminal: bool | None = None) -> None:
        super().__init__()
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._enabled = True
        self._bar: Any = None
        self._total: int | None = None
        self._started = (0.0, 0)

    def disable(self) -> None:
        """Hides the bar on other processes."""
        self._enabled = False

    def enable(self) -> None:
        """Shows the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar at the step of the run."""
        total = trainer.estimated_stepping_batches
        self._total = int(total) if math.isfinite(total) else None
        self._started = (time.monotonic(), trainer.global_step)
        if self._enabled and self._terminal:
            self._bar = tqdm(total=self._total, initial=trainer.global_step, unit="step", dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advances the bar."""
        if not self._enabled or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        step = trainer.global_step
        if self._bar is not None:
            self._bar.set_description(f"epoch {trainer.current_epoch}", refresh=False)
            self._bar.set_postfix_str(_figures(trainer, "train"), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._total is None or step % max(1, self._total // _NUM_LINES) == 0 or step == self._total:
            speed = (step - self._started[1]) / max(time.monotonic() - self._started[0], 1e-9)
            self._print(f"step {self._place(step)}  {_figures(trainer, 'train')}  {speed:.2f} steps/s")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints one line per validation during training."""
        if self._enabled and trainer.state.fn == "fit" and not trainer.sanity_checking:
            place = f"epoch {trainer.current_epoch}  step {self._place(trainer.global_step)}"
            self._print(f"{place}  validation: {_figures(trainer, 'val')}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the message stands on a line of its own."""
        self.on_train_end(trainer, pl_module)

    def _print(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def _place(self, step: int) -> str:
        return f"{step}/{self._total}" if self._total else str(step)


def _figures(trainer: Trainer, stage: str) -> str:
    """Formats the loss and the errors of a stage that are logged."""
    metrics = trainer.callback_metrics
    shown = [f"loss {float(metrics[f'{stage}/loss']):.4g}"] if f"{stage}/loss" in metrics else []
    for target in TARGETS.values():
        name = f"{stage}/{figure_name(target, 'mae')}"
        if name in metrics:
            shown.append(f"{target.name} {float(metrics[name]):.1f} {target.reported_unit}")
    return "  ".join(shown)


class RunReport(Callback):
    """Prints data, model and device at the start of a run, and at its end its errors beside those of a baseline.

    The baseline predicts the sum of element references (a linear fit in the composition) and zero for everything else.
    """

    def __init__(self) -> None:
        self._history: dict[int, dict[str, dict[str, float]]] = {}

    @property
    def steps(self) -> list[int]:
        """Steps at which the run validated."""
        return list(self._history)

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints data, model and device."""
        summary = getattr(getattr(trainer, "datamodule", None), "summary", None)
        if summary is not None:
            print(summary())
        count = sum(parameter.numel() for parameter in pl_module.parameters())
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        learning = sum(parameter.numel() for group in groups for parameter in group["params"])
        share = "" if learning == count else f", of which {learning:,} learn,"
        where = f"{trainer.world_size} x {pl_module.device}, precision {trainer.precision}"
        print(f"model: {count:,} parameters{share} on {where}")
        print(f"run: {os.path.relpath(run_folder(trainer))}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the errors while training; prints them for ``escaip validate``."""
        errors = getattr(pl_module, "last_errors", None)
        if not errors or trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._history[trainer.global_step] = errors
        else:
            _print_table(_columns(errors, "model"))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the errors for ``escaip test``."""
        errors = getattr(pl_module, "last_errors", None)
        if errors:
            _print_table(_columns(errors, "model"), "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints why the run ended early, the table and the paths of the checkpoints."""
        for callback in trainer.early_stopping_callbacks if trainer.should_stop and trainer.is_global_zero else ():
            reason = (callback.stopping_reason_message or "").removesuffix(" Signaling Trainer to stop.")
            if reason:
                print(f"stopped early at step {trainer.global_step}: {reason}")
        if not self._history:
            return
        last, best = max(self._history), getattr(trainer.checkpoint_callback, "best_step", None)
        columns = {}
        if best in self._history and best != last:
            columns[f"best (step {best})"] = self._history[best]["model"]
        _print_table({**columns, **_columns(self._history[last], f"step {last}")})
        for name in ("best", "last"):
            path = getattr(trainer.checkpoint_callback, f"{name}_model_path", "")
            if path and trainer.is_global_zero:
                print(f"{name}: {os.path.relpath(path)}")


@rank_zero_only
def _print_table(columns: dict[str, dict[str, float]], part: str = "validation") -> None:
    print(f"\n{format_table(columns, part)}")


def _columns(errors: dict[str, dict[str, float]], name: str) -> dict[str, dict[str, float]]:
    """Returns the columns of a table: the model under ``name``, the sets of a mixture, the baseline."""
    sets = {key: value for key, value in errors.items() if key not in ("model", "baseline")}
    return {name: errors["model"], **sets, BASELINE: errors["baseline"]}


class FinalEvaluation(Callback):
    """Writes ``evaluation/{report.json, parity.png, errors.png}`` into the folder of a run when it has ended.

    It loads the best checkpoint as a user would, so that the report describes the file.

    Args:
        max_structures: number of structures of the validation set, taken in order; 0 leaves the evaluation out.
        max_atoms: atoms evaluated at once.
    """

    def __init__(self, max_structures: int = 1000, max_atoms: int = 500) -> None:
        self.max_structures, self.max_atoms = max_structures, max_atoms
        self.report: EvaluationReport | None = None

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates, where the run has a checkpoint and a validation set."""
        best = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        if self.max_structures < 1 or not os.path.isfile(best) or "val" not in datasets:
            return
        from escaip.evaluate import evaluate_into
        from escaip.potential.loading import load_potential

        held_out, folder = datasets["val"], Path(best).parent / EVALUATION
        potential = load_potential(best, device=pl_module.device)
        structures = islice((held_out[index] for index in range(len(held_out))), self.max_structures)
        count = min(len(held_out), self.max_structures)
        origin = {"model": os.path.relpath(best), "data": f"validation set of the run, {count} of {len(held_out)}"}
        # Fixed atoms are flagged only where the run leaves them out.
        self.report = evaluate_into(
            folder, potential, structures, origin, max_atoms=self.max_atoms, free_atoms_only=True
        )
        print(f"parity plots: {os.path.relpath(folder)}")
