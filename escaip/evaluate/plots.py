"""Parity plots and error histograms, drawn without matplotlib's global state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from escaip.evaluate.report import FloatArray, Records, baselines_of, shown_unit
from escaip.types import TARGETS

_MODEL, _BASELINE = "#2a6f97", "#b0b0b0"
_MAX_POINTS = 50_000
_BINS = 120


_TITLES = {"energy": "Energy above references", "forces": "Force components", "stress": "Stress components"}


@dataclass(frozen=True)
class _Panel:
    """Labels and predictions of one quantity as flat arrays, and the unit of its errors."""

    title: str
    unit: str
    error_unit: str
    error_factor: float
    label: FloatArray
    found: FloatArray
    trivial_name: str


def draw(records: Records, *, free_atoms_only: bool = False) -> dict[str, Figure]:
    """Returns two figures by name, with a panel for each quantity that has labels.

    ``parity`` shows predictions against labels, colored by the density of points, and ``errors`` histograms of absolute
    errors on a logarithmic axis, beside those of the trivial predictor.
    """
    panels = _panels(records, free_atoms_only)
    figures: dict[str, Figure] = {}
    for name, draw_panel in (("parity", _draw_parity), ("errors", _draw_errors)):
        figures[name] = Figure(figsize=(4.6 * max(len(panels), 1), 4.4), layout="constrained")
        grid: Any = figures[name].subplots(1, max(len(panels), 1), squeeze=False)
        for axis, panel in zip(grid[0], panels, strict=False):
            draw_panel(axis, panel)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=9)
    return figures


def _panels(records: Records, free_atoms_only: bool) -> list[_Panel]:
    panels = []
    for target in TARGETS.values():
        name, trivial = next(iter(baselines_of(records, target).items()))
        offset = trivial if target.name == "energy" else 0.0
        label = records.per_atom(target, records.labels[target.name] - offset)
        found = label + records.per_atom(target, records.errors(target, free_atoms_only=free_atoms_only))
        valid = np.isfinite(found)
        if not valid.any():
            continue
        error_unit, factor = shown_unit(target)
        unit = f"{target.unit}/atom" if target.extensive else target.unit
        if target.name == "stress":  # shown as its errors are
            unit, label, found, factor = error_unit, factor * label, factor * found, 1.0
        title = _TITLES.get(target.name, target.name.replace("_", " ").capitalize())
        trivial_name = {"references": "references alone", "mean": "mean energy"}.get(name, name)
        panels.append(_Panel(title, unit, error_unit, factor, label[valid], found[valid], trivial_name))
    return panels


def _draw_parity(axis: Axes, panel: _Panel) -> None:
    low = float(min(panel.label.min(), panel.found.min()))
    high = float(max(panel.label.max(), panel.found.max()))
    margin = 0.04 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    axis.plot(limits, limits, color="0.6", linewidth=0.8, zorder=1)
    label, found, density = _with_density(panel, limits)
    axis.scatter(
        label, found, c=density, s=max(2.0, min(14.0, 4000.0 / len(label))), cmap="viridis", linewidths=0,
        norm=LogNorm(vmin=1, vmax=max(float(density.max()), 2.0)), rasterized=True, zorder=2,
    )  # fmt: skip
    axis.set(xlim=limits, ylim=limits, aspect="equal", title=panel.title)
    axis.set_xlabel(f"label ({panel.unit})")
    axis.set_ylabel(f"prediction ({panel.unit})")
    error = np.abs(panel.found - panel.label) * panel.error_factor
    values = (("MAE", error.mean()), ("RMSE", np.sqrt((error**2).mean())))
    lines = [f"{name} {value:.3g} {panel.error_unit}" for name, value in values]
    text = "\n".join([*lines, f"n = {len(panel.label):,}"])
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "0.8", "alpha": 0.9}
    axis.text(0.04, 0.96, text, transform=axis.transAxes, va="top", ha="left", fontsize=9, bbox=box)


def _with_density(panel: _Panel, limits: tuple[float, float]) -> tuple[FloatArray, ...]:
    """Returns at most fifty thousand points, those in the densest bins last, and the count in the bin of each."""
    edges = np.linspace(*limits, _BINS + 1)
    counts, _, _ = np.histogram2d(panel.label, panel.found, bins=(edges, edges))
    chosen = np.random.default_rng(0).permutation(len(panel.label))[:_MAX_POINTS]
    label, found = panel.label[chosen], panel.found[chosen]
    density = counts[np.digitize(label, edges) - 1, np.digitize(found, edges) - 1]  # the limits hold every point
    order = np.argsort(density)
    return label[order], found[order], density[order]


def _draw_errors(axis: Axes, panel: _Panel) -> None:
    error = np.abs(panel.found - panel.label) * panel.error_factor
    trivial = np.abs(panel.label) * panel.error_factor
    positive = np.concatenate([error[error > 0], trivial[trivial > 0]])
    if len(positive) == 0:
        positive = np.array([1.0])
    floor = max(float(np.quantile(positive, 0.002)), float(positive.max()) * 1e-9)
    edges = np.geomspace(floor, float(positive.max()) * 1.0001, 61)
    for values, color, name in ((trivial, _BASELINE, f"predicting {panel.trivial_name}"), (error, _MODEL, "model")):
        clipped = np.maximum(values, floor)
        weights = np.full(len(clipped), 100.0 / len(clipped))
        axis.hist(clipped, bins=edges.tolist(), weights=weights, color=color, alpha=0.75, label=name)
        axis.axvline(values.mean(), ymax=0.78, color=color, linewidth=1.4, linestyle="--")
    axis.set_xscale("log")
    axis.set(title=panel.title, ylabel="share of entries (%)")
    axis.set_xlabel(f"absolute error ({panel.error_unit}); dashed: mean")
    axis.set_ylim(top=axis.get_ylim()[1] * 1.25)
    axis.legend(frameon=False, fontsize=9, loc="upper left")
