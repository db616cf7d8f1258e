"""What a run prints and writes at its end: the table of errors, and predictions as a structure file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_only

from escaip.train.metrics import format_table
from escaip.types import Prediction

BASELINE = "references, zero forces"


def folder_of_run(trainer: Trainer) -> Path:
    """Where a run is kept, as this process knows it.

    ``trainer.log_dir`` asks the first process, and waits forever where not all of them ask.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    return Path(getattr(logger, "log_dir", None) or trainer.default_root_dir)


class RunReport(Callback):
    """Prints what a run is at its start, and at its end its validation errors beside those of a baseline.

    The baseline predicts the sum of element references (a linear fit in the composition) and forces of zero.
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
        where = f"{trainer.world_size} x {pl_module.device}, precision {trainer.precision}"
        print(f"model: {count:,} parameters on {where}")
        print(f"run: {os.path.relpath(folder_of_run(trainer))}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the errors while training; prints them for ``escaip validate``."""
        errors = getattr(pl_module, "last_errors", None)
        if not errors or trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._history[trainer.global_step] = errors
        else:
            self._print(_columns(errors, "model"))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the errors for ``escaip test``."""
        errors = getattr(pl_module, "last_errors", None)
        if errors:
            self._print(_columns(errors, "model"), part="test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table and where the checkpoints are."""
        if not self._history:
            return
        last = max(self._history)
        best = getattr(trainer.checkpoint_callback, "best_step", None)
        columns = {}
        if best in self._history and best != last:
            columns[f"best (step {best})"] = self._history[best]["model"]
        self._print({**columns, **_columns(self._history[last], f"step {last}")}, trainer)

    @rank_zero_only
    def _print(
        self, columns: dict[str, dict[str, float]], trainer: Trainer | None = None, part: str = "validation"
    ) -> None:
        print(f"\n{format_table(columns, part)}")
        if trainer is None:
            return
        for name in ("best", "last"):
            path = getattr(trainer.checkpoint_callback, f"{name}_model_path", "")
            if path:
                print(f"{name}: {os.path.relpath(path)}")


class PredictionFile(BasePredictionWriter):
    """Writes ``predictions.extxyz`` into the folder of the run, one frame per structure, in the order predicted.

    With several processes each writes its own, ``predictions-RANK.extxyz``.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self._stream: TextIO | None = None
        self._target = Path()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the file beside its final name."""
        suffix = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._target = folder / f"predictions{suffix}.extxyz"
        self._stream = self._aside.open("w", encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: dict[str, Any],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Adds the structures of a batch."""
        from ase.io import write

        assert self._stream is not None
        for atoms in predicted_structures(Prediction(**prediction), batch):
            write(self._stream, atoms, format="extxyz")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the file its name."""
        if self._stream is not None:
            self._stream.close()
            os.replace(self._aside, self._target)
            print(f"wrote {os.path.relpath(self._target)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves no half file."""
        if self._stream is not None and not self._stream.closed:
            self._stream.close()
            self._aside.unlink(missing_ok=True)

    @property
    def _aside(self) -> Path:
        return self._target.with_name(f".{self._target.name}.{os.getpid()}.part")


def predicted_structures(prediction: Prediction, batch: Any) -> list[Any]:
    """Returns :class:`ase.Atoms` of a batch with predicted energy, forces and stress instead of the labels."""
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator

    host = {name: getattr(batch, name).cpu().numpy() for name in ("positions", "atomic_numbers", "cell", "pbc", "ptr")}
    energies = prediction.energy.double().cpu().numpy()
    forces = None if prediction.forces is None else prediction.forces.double().cpu().numpy()
    stresses = None if prediction.stress is None else prediction.stress.double().cpu().numpy()
    frames = []
    for index, (start, stop) in enumerate(zip(host["ptr"][:-1], host["ptr"][1:], strict=True)):
        cell, pbc = host["cell"][index], host["pbc"][index]
        atoms = Atoms(host["atomic_numbers"][start:stop], host["positions"][start:stop], cell=cell, pbc=pbc)
        results: dict[str, Any] = {"energy": float(energies[index])}
        if forces is not None:
            results["forces"] = forces[start:stop]
        if stresses is not None and np.isfinite(stresses[index]).all():
            results["stress"] = stresses[index].ravel()[[0, 4, 8, 5, 2, 1]]
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info["structure_id"] = str(batch.structure_id[index])
        frames.append(atoms)
    return frames


def _columns(errors: dict[str, dict[str, float]], name: str) -> dict[str, dict[str, float]]:
    """The model, the sets of a mixture, the baseline."""
    sets = {key: value for key, value in errors.items() if key not in ("model", "baseline")}
    return {name: errors["model"], **sets, BASELINE: errors["baseline"]}
