"""Plots of an analysis as PNG, drawn without matplotlib's global state."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from escaip.analysis.radial import RadialDistribution
from escaip.analysis.report import Analysis, shown, thinned
from escaip.analysis.spectra import Vibrations
from escaip.analysis.thermo import RunLog
from escaip.analysis.transport import Transport

_COLORS = ("#2a6f97", "#c8553d", "#588157", "#8d5a97", "#d4a017", "#4a4e69", "#3a9e9e", "#a44a3f")
_ALL = "#303030"
_LOG_PANELS = (
    ("temperature_K", "temperature (K)"),
    ("pressure_GPa", "pressure (GPa)"),
    ("conserved_energy_eV", "conserved energy (eV)"),
)


def draw(analysis: Analysis) -> dict[str, bytes]:
    """Returns a PNG by name for each quantity that was found."""
    images: dict[str, bytes] = {}
    if analysis.radial is not None:
        images["rdf"] = _draw_radial(analysis.radial)
    if analysis.transport is not None:
        images["msd"] = _draw_transport(analysis.transport)
    if analysis.vibrations is not None:
        images["vacf"] = _draw_vibrations(analysis.vibrations)
    if analysis.log is not None and any(_has(analysis.log, column) for column, _ in _LOG_PANELS):
        images["log"] = _draw_log(analysis.log)
    return images


def _draw_radial(found: RadialDistribution) -> bytes:
    figure, (left, right) = _figure(2)
    seen: set[frozenset[str]] = set()
    color = _color_by_name()
    for pair in shown(found.g):
        g = found.g[pair]
        members = frozenset(pair.split("-"))
        right.plot(found.edges, found.neighbors[pair], label=pair, color=color(pair), linewidth=1.2)
        if members not in seen:  # g(r) of A-B is that of B-A
            seen.add(members)
            left.plot(found.distance, g, label=pair, color=color(pair), linewidth=1.2)
    left.axhline(1.0, color="0.7", linewidth=0.8, zorder=0)
    left.set(title="Radial distribution", xlabel="r (Å)", ylabel="g(r)", ylim=(0, None))
    shells = [shell for pair in found.g if (shell := found.first_shell(pair)) is not None]
    top = 2.5 * max(shell.coordination for shell in shells) if shells else None
    right.set(title="Neighbors of an atom of the first element", xlabel="r (Å)", ylabel="within r", ylim=(0, top))
    return _png(figure, left, right)


def _draw_transport(found: Transport) -> bytes:
    figure, (axis,) = _figure(1)
    color = _color_by_name()
    chosen = thinned(len(found.lag))
    chosen = chosen[chosen > 0]
    picoseconds = found.lag * 1e-3
    axis.axvspan(found.window[0] * 1e-3, found.window[1] * 1e-3, color="0.93", zorder=0, label="fit")
    for name in shown(found.msd):
        curve = found.msd[name]
        axis.plot(picoseconds[chosen], curve[chosen], label=name, color=color(name), linewidth=1.2)
    if all((curve[chosen] > 0).all() for curve in found.msd.values()):
        axis.set(xscale="log", yscale="log")
    axis.set(title="Mean-square displacement", xlabel="lag (ps)", ylabel="MSD (Å²)")
    return _png(figure, axis)


def _draw_vibrations(found: Vibrations) -> bytes:
    figure, (left, right) = _figure(2)
    color = _color_by_name()
    for name in shown(found.vacf):
        curve = found.vacf[name]
        left.plot(found.lag * 1e-3, curve / curve[0], label=name, color=color(name), linewidth=1.0)
        right.plot(found.frequency, found.spectrum[name], label=name, color=color(name), linewidth=1.0)
    left.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
    left.set(title="Velocity autocorrelation", xlabel="lag (ps)", ylabel="⟨v(0)·v(t)⟩ / ⟨v²⟩")
    total = np.cumsum(found.spectrum["all"])
    reach = found.frequency[min(int(np.searchsorted(total, 0.999 * total[-1])), len(total) - 1)]
    title = "Vibrational density of states" if found.mass_weighted else "Spectrum of velocities"
    right.set(title=title, xlabel="wavenumber (cm⁻¹)", ylabel="per cm⁻¹")
    right.set_xlim(0, min(float(found.frequency[-1]), 1.15 * float(reach) + 2 * found.resolution))
    return _png(figure, left, right)


def _draw_log(log: RunLog) -> bytes:
    panels = [(column, label) for column, label in _LOG_PANELS if _has(log, column)]
    figure, axes = _figure(len(panels))
    for axis, (column, label) in zip(axes, panels, strict=True):
        time, values = log.series(column)
        axis.plot(time, values, color=_COLORS[0], linewidth=0.8)
        axis.axhline(float(np.nanmean(values)), color="0.5", linewidth=0.8, linestyle="--")
        axis.set(xlabel="time (ps)", ylabel=label)
        axis.ticklabel_format(axis="y", useOffset=False)
    return _png(figure, *axes, legend=False)


def _has(log: RunLog, column: str) -> bool:
    return bool(np.isfinite(log.columns[column]).any())


def _color_by_name() -> Callable[[str], str]:
    given: dict[str, str] = {}

    def color(name: str) -> str:
        if name == "all":
            return _ALL
        return given.setdefault(name, _COLORS[len(given) % len(_COLORS)])

    return color


def _figure(num_panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.8 * num_panels, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(1, num_panels, squeeze=False)
    return figure, list(grid[0])


def _png(figure: Figure, *axes: Axes, legend: bool = True) -> bytes:
    for axis in axes:
        if legend:
            axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()
