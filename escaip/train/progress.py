"""One progress bar for the whole run, with the figures a scientist looks at; plain lines where there is no terminal."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

_FIGURES = {"energy_mae_meV_per_atom": "energy {:.1f} meV/atom", "force_mae_meV_per_A": "forces {:.1f} meV/Å"}
_LINES = 20


class TrainingProgress(ProgressBar):
    """Counts optimizer steps of the whole run; prints one line per validation.

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
        """Shows nothing: other processes, the learning-rate finder."""
        self._enabled = False

    def enable(self) -> None:
        """Shows again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar at the step where the run is."""
        total = trainer.estimated_stepping_batches
        self._total = int(total) if math.isfinite(total) else None
        self._started = (time.monotonic(), trainer.global_step)
        if self._enabled and self._terminal:
            self._bar = tqdm(total=self._total, initial=trainer.global_step, unit="step", dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves on."""
        if not self._enabled or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        step = trainer.global_step
        if self._bar is not None:
            self._bar.set_description(f"epoch {trainer.current_epoch}", refresh=False)
            self._bar.set_postfix_str(self._figures(trainer, "train"), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._total is None or step % max(1, self._total // _LINES) == 0 or step == self._total:
            self._print(f"step {self._place(step)}  {self._figures(trainer, 'train')}  {self._speed(step)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One line per validation during training."""
        if self._enabled and trainer.state.fn == "fit" and not trainer.sanity_checking:
            place = f"epoch {trainer.current_epoch}  step {self._place(trainer.global_step)}"
            self._print(f"{place}  validation: {self._figures(trainer, 'val')}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the message stands on a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def _place(self, step: int) -> str:
        return f"{step}/{self._total}" if self._total else str(step)

    def _speed(self, step: int) -> str:
        seconds = time.monotonic() - self._started[0]
        return f"{(step - self._started[1]) / max(seconds, 1e-9):.2f} steps/s"

    @staticmethod
    def _figures(trainer: Trainer, stage: str) -> str:
        metrics = trainer.callback_metrics
        shown = [f"loss {float(metrics[f'{stage}/loss']):.4g}"] if f"{stage}/loss" in metrics else []
        for name, text in _FIGURES.items():
            if f"{stage}/{name}" in metrics:
                shown.append(text.format(float(metrics[f"{stage}/{name}"])))
        return "  ".join(shown)
