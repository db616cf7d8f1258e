"""What ``benchmarks/real_data.py`` reports: errors on the test part, learning curves, one table."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown_table
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from escaip import load_potential
from escaip.data import Store
from escaip.evaluate import Records, evaluate
from escaip.evaluate.plots import draw
from escaip.files import write_results
from escaip.types import TARGETS

_PANELS = (
    ("energy_mae_meV_per_atom", "energy MAE (meV/atom)"),
    ("force_mae_meV_per_A", "force MAE (meV/Å)"),
    ("stress_mae_meV_per_A3", "stress MAE (meV/Å³)"),
)


def held_out_errors(
    checkpoint: Path,
    store: Path,
    out: Path,
    *,
    free_atoms_only: bool,
    max_atoms: int | None,
    device: str = "cpu",
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint on a store; parity and error plots go to ``out``.

    Args:
        checkpoint: its averaged weights are evaluated.
        store: with labels.
        out: folder for the plots.
        free_atoms_only: leave forces of constrained atoms out.
        max_atoms: evaluated at once; None for as many as pay.
        device: to evaluate on.
        limit: evaluate so many structures only, evenly spaced.

    Returns:
        Plain values: the report of ``escaip.evaluate``, mean absolute errors in meV/atom, meV/Å and meV/Å³, the energy
        error with the mean error of each group removed (what matters for relaxations within a system), the errors of
        what came of each file, where there are several, and the number of parameters.
    """
    potential = load_potential(checkpoint, device=device)
    stored = Store(store)
    chosen = np.linspace(0, len(stored) - 1, min(limit or len(stored), len(stored))).round().astype(int)
    structures = [stored[int(index)] for index in chosen]
    report, records = evaluate(potential, structures, max_atoms=max_atoms, free_atoms_only=free_atoms_only)
    figures = draw(records, free_atoms_only=free_atoms_only)
    write_results(out, {f"{name}.png": figure for name, figure in figures.items()})
    found = {"energy": report.energy_per_atom, "forces": report.forces, "stress": report.stress}
    mae = {name: 1e3 * quantity.errors.mae for name, quantity in found.items() if quantity is not None}
    mae["energy_within_groups"] = relative_energy_mae(records, [str(data.group) for data in structures])
    return {
        "mae": mae,
        "by_file": errors_by_file(records, free_atoms_only=free_atoms_only),
        "parameters": sum(parameter.numel() for parameter in potential.parameters()),
        "report": report.to_dict(),
    }


def relative_energy_mae(records: Records, groups: list[str]) -> float:
    """Mean absolute energy error in meV/atom after removing the mean error of each group."""
    error = records.per_atom(TARGETS["energy"], records.errors(TARGETS["energy"]))
    codes = np.unique(np.array(groups), return_inverse=True)[1]
    mean = np.bincount(codes, weights=error) / np.bincount(codes)
    return 1e3 * float(np.abs(error - mean[codes]).mean())


def errors_by_file(records: Records, *, free_atoms_only: bool) -> dict[str, dict[str, float]]:
    """Mean absolute errors in meV/atom and meV/Å, and forces of zero, by file; empty where all came of one.

    The names of structures begin with that of their file.
    """
    names = np.array([name.partition(":")[0] for name in records.structure_id])
    found = {}
    for name in np.unique(names) if len(np.unique(names)) > 1 else ():
        chosen, atoms = names == name, (names == name)[records.structure]
        if free_atoms_only:
            atoms &= ~records.fixed
        error = records.errors(TARGETS["energy"])[chosen] / records.num_atoms[chosen]
        found[str(name)] = {
            "structures": int(chosen.sum()),
            "energy": 1e3 * float(np.abs(error).mean()),
            "forces": 1e3 * float(np.abs(records.errors(TARGETS["forces"]))[atoms].mean()),
            "zero_forces": 1e3 * float(np.abs(records.labels["forces"])[atoms].mean()),
        }
    return found


def read_log(runs: Path) -> dict[str, dict[int, float]]:
    """Logged values by name and step; of steps logged by several runs (after a resume) the last counts."""
    values: dict[str, dict[int, float]] = {}
    for path in sorted(runs.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        with path.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                if not row.get("step") or None in row.values():  # left unfinished by a kill
                    continue
                for name, text in row.items():
                    if text and name not in ("step", "epoch"):
                        values.setdefault(name, {})[int(row["step"])] = float(text)
    return values


def draw_curves(log: dict[str, dict[int, float]], title: str) -> bytes:
    """Validation and training errors against the step, with the trivial baseline as a line; PNG."""

    panels = [panel for panel in _PANELS if log.get(f"val/{panel[0]}") or log.get(f"train/{panel[0]}")]
    panels = [("loss", "loss"), *panels]
    figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for part, style in (
            ("train", {"color": "0.7", "linewidth": 0.8}),
            ("val", {"color": "#2a6f97", "marker": "."}),
        ):
            curve = sorted(log.get(f"{part}/{name}", {}).items())
            if curve:
                axis.plot(*zip(*curve, strict=True), label=part, **style)
        trivial = list(log.get(f"val_baseline/{name}", {}).values())
        if trivial:
            axis.axhline(trivial[-1], color="black", linestyle="--", linewidth=0.8, label="references, zero forces")
        axis.set(xlabel="step", ylabel=label, yscale="log")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def draw_runs(runs: dict[str, dict[str, dict[str, list[tuple[int, float]]]]]) -> bytes:
    """Validation errors against the step, a row of panels for each set, a line for each of its runs; PNG.

    Args:
        runs: set to run to name of a figure to its points.
    """
    figure = Figure(figsize=(4.4 * len(_PANELS), 2.6 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, logs) in zip(figure.subplots(len(runs), len(_PANELS), squeeze=False), runs.items(), strict=True):
        for axis, (name, label) in zip(axes, _PANELS, strict=True):
            trivial = [log[f"val_baseline/{name}"][-1][1] for log in logs.values() if log.get(f"val_baseline/{name}")]
            if not trivial:
                axis.set_visible(False)
                continue
            for run, log in logs.items():
                if log.get(f"val/{name}"):
                    axis.plot(*zip(*log[f"val/{name}"], strict=True), marker=".", linewidth=1.0, label=run)
            axis.axhline(trivial[0], color="black", linestyle="--", linewidth=0.8, label="references, zero forces")
            axis.set(xlabel="step", ylabel=label, yscale="log", title=title if axis is axes[0] else "")
            axis.legend(frameon=False, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def results_table(results: dict[str, Any]) -> str:
    """Test errors beside the baselines, Markdown."""
    header = [
        "set", "train / test structures", "parameters", "minutes", "steps", "energy, meV/atom", "linear references",
        "mean", "within groups", "spread within groups", "forces, meV/Å", "zero forces", "ratio",
        "stress, meV/Å³", "zero stress",
    ]  # fmt: skip
    rows = []
    for name, entry in results.items():
        mae, linear, mean = entry["test"]["mae"], entry["baselines"]["linear"], entry["baselines"]["mean"]
        counts = [f"{entry['split'][part]['structures']}" for part in ("train", "test")]
        if entry["split"]["split"] == "group":
            counts = [
                f"{text} ({entry['split'][part]['groups']} groups)" for text, part in zip(counts, ("train", "test"))
            ]
        ratio = linear["forces"] / mae["forces"]
        rows.append([
            name, " / ".join(counts), f"{entry['test']['parameters'] / 1e6:.2f} M", f"{entry['minutes']:.1f}",
            f"{entry['steps']}", _number(mae["energy"]), _number(linear["energy"]), _number(mean["energy"]),
            _number(mae["energy_within_groups"]), _number(linear["energy_within_groups"]),
            _number(mae["forces"]), _number(linear["forces"]), f"{ratio:.1f}",
            _number(mae.get("stress")), _number(linear.get("stress")),
        ])  # fmt: skip
    return markdown_table(header, rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
