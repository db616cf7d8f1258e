"""What came of the runs of gpu/training.py: rows, learning curves, and what travels back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown_table, provenance, write_json
from gpu.fitting import BASE, ERRORS, REPORT, TRAINED, Job
from gpu.pack import Limits, write_archives
from real_data_report import draw_runs, read_log
from real_data_sets import PARTS, SETS, SPLIT, baselines, divided

from escaip.files import write_file

CURVE_POINTS = 60
# Of a row, in their order; ms and seconds as they say, errors in meV/atom, meV/Å and meV/Å³.
COLUMNS = (
    "parameters", "max_atoms", "learning_rate", "steps", "steps_planned", "best_step", "minutes", "train_s",
    "planned_ms", "step_ms", "atoms_per_s", "peak_MiB", "val_energy", "val_forces", "energy", "references_energy",
    "energy_within_groups", "spread_within_groups", "forces",
    "zero_forces", "forces_rmse", "zero_forces_rmse", "stress", "zero_stress", "model",
)  # fmt: skip
Curve = dict[str, list[tuple[int, float]]]
Row = dict[str, Any]


class Results:
    """Rows and curves of what has ended, written after each.

    Args:
        data: folder of the divided data.
        out: folder for the files.
        work: folder for the figure.
    """

    def __init__(self, data: Path, out: Path, work: Path) -> None:
        self._data, self._out, self._figure = data, out, work / "training.png"
        self._provenance = provenance()
        self._jobs: dict[str, Job] = {}
        self._rows: dict[str, Row] = {}
        self._trivial: dict[str, dict[str, dict[str, float]]] = {}
        self._splits: dict[str, dict[str, Any]] = {}

    def compare(self, name: str) -> None:
        """Errors of trivial predictors for a set, kept: they take seconds, in which runs go on."""
        if name in self._trivial:
            return
        chosen = SETS[name]
        stores = divided(chosen, self._data)
        assert stores is not None
        self._trivial[name] = baselines(stores, chosen.free_atoms_only)
        self._splits[name] = json.loads((stores["test"].parent / SPLIT).read_text(encoding="utf-8"))

    def add(self, job: Job, failed: str | None, seconds: float) -> Row:
        """A run that has ended; ``failed`` says why, if not of itself."""
        self.compare(job.set)
        linear, split = self._trivial[job.set]["linear"], self._splits[job.set]
        row = {
            "run": job.name, "set": job.set, "size": job.size,
            "structures": " / ".join(str(split[part]["structures"]) for part in PARTS),
            "test_groups": split["test"].get("groups"),
            **dict.fromkeys(COLUMNS),
            "minutes": seconds / 60, "references_energy": linear["energy"],
            "spread_within_groups": linear["energy_within_groups"], "zero_forces": linear["forces"],
            "zero_stress": linear.get("stress"), "failed": failed,
        }  # fmt: skip
        self._jobs[job.name], self._rows[job.name] = job, row
        self.update(job)
        return row

    def update(self, job: Job) -> None:
        """Takes what the files of a run hold, and writes everything."""
        row = self._rows[job.name]
        trained = _read(job.path / TRAINED)
        # What ended the process says more than what it had noted before.
        row |= {key: value for key, value in trained.items() if key != "failed" or row["failed"] is None}
        row |= _read(job.path / ERRORS)
        log = read_log(job.path / "runs")
        if not row["steps"]:  # killed: it could not say how far it came
            row["steps"] = max(log.get("train/loss", ()), default=-1) + 1
        losses = log.get("val/loss")
        if losses:
            best = min(losses, key=losses.__getitem__)
            row["best_step"] = best + 1
            row["val_energy"] = log["val/energy_mae_meV_per_atom"][best]
            row["val_forces"] = log["val/force_mae_meV_per_A"][best]
        if row["failed"] is None and row["energy"] is None:
            row["failed"] = "no errors: it has no checkpoint"
        self.write()

    def without_errors(self) -> list[Job]:
        """Runs with a checkpoint that was not evaluated."""
        return [
            job
            for name, job in self._jobs.items()
            if self._rows[name]["energy"] is None and any((job.path / "runs").glob("version_*/best.ckpt"))
        ]

    def write(self, figure: bool = False) -> None:
        """Writes ``training.json`` and the archives; the figure of all learning curves takes seconds."""
        curves = {name: read_curve(job.path / "runs") for name, job in self._jobs.items()}
        if figure:
            self._draw(curves)
        archives = write_archives(self._wanted(), self._out, "training", Limits())
        for name, row in self._rows.items():
            row["model"] = archives.get(self._jobs[name].checkpoint.name)
        reports = {name: _read(job.path / REPORT) for name, job in self._jobs.items()}
        content = {
            "provenance": self._provenance,
            "rows": list(self._rows.values()),
            "by_file": {name: report["by_file"] for name, report in reports.items() if report.get("by_file")},
            "baselines": self._trivial,
            "curves": curves,
        }
        write_json(self._out / "training.json", content)

    def _draw(self, curves: Mapping[str, Curve]) -> None:
        by_set: dict[str, dict[str, Curve]] = {}
        for name, curve in curves.items():
            if any(key.startswith("val/") for key in curve):
                by_set.setdefault(self._jobs[name].set, {})[name] = curve
        if by_set:
            write_file(self._figure, draw_runs(by_set))

    def _wanted(self) -> dict[str, Path]:
        """Plots, then models: all of the base size, then those that improve most on it in their forces."""
        found = {self._figure.name: self._figure} if self._figure.is_file() else {}
        for name, job in self._jobs.items():
            if (job.path / "parity.png").is_file():
                found[f"{name}-parity.png"] = job.path / "parity.png"
        base = {row["set"]: row["forces"] for row in self._rows.values() if row["size"] == BASE}
        models = [name for name, job in self._jobs.items() if job.checkpoint.is_file()]

        def rank(name: str) -> tuple[bool, float]:
            row = self._rows[name]
            return row["size"] != BASE, (row["forces"] or 0.0) / (base.get(row["set"]) or row["zero_forces"])

        return found | {
            self._jobs[name].checkpoint.name: self._jobs[name].checkpoint for name in sorted(models, key=rank)
        }


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def read_curve(runs: Path) -> Curve:
    """Logged losses, errors and learning rate, thinned, with those of the trivial predictor."""
    kept = ("loss", "energy_mae_meV_per_atom", "force_mae_meV_per_A", "stress_mae_meV_per_A3", "lr")
    log = read_log(runs)
    return {name: thin(sorted(log[name].items())) for name in sorted(log) if name.split("/")[-1] in kept}


def thin(points: Sequence[tuple[int, float]], most: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """At most so many points: means of equal runs of them, at their last step; what is not finite is left out."""
    finite = np.array([point for point in points if math.isfinite(point[1])], dtype=float).reshape(-1, 2)
    parts = np.array_split(finite, min(most, max(1, len(finite))))
    return [(int(part[-1, 0]), float(f"{part[:, 1].mean():.5g}")) for part in parts if len(part)]


def table(rows: Sequence[Row]) -> str:
    """Errors on the test part beside those of trivial predictors, Markdown."""
    columns = {
        "run": "run", "structures": "train / val / test", "parameters": "parameters", "minutes": "minutes",
        "steps": "steps", "atoms_per_s": "atoms/s", "peak_MiB": "MiB", "val_energy": "validation energy",
        "val_forces": "validation forces", "energy": "energy, meV/atom",
        "references_energy": "references", "energy_within_groups": "within groups",
        "spread_within_groups": "spread within groups", "forces": "forces, meV/Å", "zero_forces": "zero",
        "forces_rmse": "RMSE", "zero_forces_rmse": "zero RMSE", "stress": "stress, meV/Å³",
        "zero_stress": "zero stress", "failed": "failed",
    }  # fmt: skip

    def show(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return "–" if value is None else str(value)

    return markdown_table(list(columns.values()), [[show(row[key]) for key in columns] for row in rows])
