"""The best model of a run on what was held out: errors by element, worst structures, parity plots."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from escaip.evaluate.report import EvaluationReport

FOLDER = "evaluation"


class FinalEvaluation(Callback):
    """Writes ``evaluation/{report.json, parity.png, errors.png}`` into the folder of a run when it has ended.

    It loads the best checkpoint as a user would, so what it reports is what the file does.

    Args:
        max_structures: of the validation set, taken in order; 0 leaves the evaluation out.
        max_atoms: in a batch.
    """

    def __init__(self, max_structures: int = 1000, max_atoms: int = 500) -> None:
        self.max_structures = max_structures
        self.max_atoms = max_atoms
        self.report: EvaluationReport | None = None

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates; a run without a checkpoint or a validation set has nothing to evaluate."""
        best = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        if self.max_structures < 1 or not os.path.isfile(best) or "val" not in datasets:
            return
        from escaip.evaluate.command import evaluate_into
        from escaip.potential.loading import load_potential

        held_out = datasets["val"]
        folder = Path(best).parent / FOLDER
        potential = load_potential(best, device=pl_module.device)
        structures = islice((held_out[index] for index in range(len(held_out))), self.max_structures)
        count = min(len(held_out), self.max_structures)
        origin = {"model": os.path.relpath(best), "data": f"validation set of the run, {count} of {len(held_out)}"}
        # Fixed atoms are flagged only where the run leaves them out.
        self.report = evaluate_into(
            folder, potential, structures, origin, max_atoms=self.max_atoms, free_atoms_only=True
        )
        print(f"parity plots: {os.path.relpath(folder)}")
