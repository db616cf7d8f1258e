"""Plots of an analysis."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from escaip.simulate.analysis import Array
from escaip.simulate.report import Analysis, shown, thinned

_COLORS = ("#2a6f97", "#c8553d", "#588157", "#8d5a97", "#d4a017", "#4a4e69", "#3a9e9e", "#a44a3f")


def draw(analysis: Analysis) -> dict[str, Figure]:
    """Returns a figure by name for each quantity that was found: ``rdf``, ``msd``, ``vacf``, ``log``."""
    images: dict[str, Figure] = {}
    if (radial := analysis.radial) is not None:
        unique = {frozenset(pair.split("-")): pair for pair in reversed(shown(radial.g))}  # g of A-B is that of B-A
        shells = [shell for pair in radial.g if (shell := radial.first_shell(pair)) is not None]
        top = 2.5 * max(shell.coordination for shell in shells) if shells else None
        images["rdf"] = _plot(
            ({pair: (radial.distance, radial.g[pair]) for pair in reversed(unique.values())},
             {"title": "Radial distribution", "xlabel": "r (Å)", "ylabel": "g(r)", "ylim": (0, None)}),
            ({pair: (radial.edges, radial.neighbors[pair]) for pair in shown(radial.g)},
             {"title": "Neighbors of an atom of the first element", "xlabel": "r (Å)", "ylabel": "within r",
              "ylim": (0, top)}),
        )  # fmt: skip
    if (transport := analysis.transport) is not None:
        chosen = thinned(len(transport.lag))[1:]
        curves = {name: (transport.lag[chosen] * 1e-3, transport.msd[name][chosen]) for name in shown(transport.msd)}
        look = {"title": "Mean-square displacement", "xlabel": "lag (ps)", "ylabel": "MSD (Å²)"}
        if all((values > 0).all() for _, values in curves.values()):
            look |= {"xscale": "log", "yscale": "log"}
        images["msd"] = _plot((curves, look), span=(transport.window[0] * 1e-3, transport.window[1] * 1e-3))
    if (found := analysis.vibrations) is not None:
        total = np.cumsum(found.spectrum["all"])
        reach = float(found.frequency[min(int(np.searchsorted(total, 0.999 * total[-1])), len(total) - 1)])
        right = min(float(found.frequency[-1]), 1.15 * reach + 2 * found.resolution)
        images["vacf"] = _plot(
            ({name: (found.lag * 1e-3, found.vacf[name] / found.vacf[name][0]) for name in shown(found.vacf)},
             {"title": "Velocity autocorrelation", "xlabel": "lag (ps)", "ylabel": "⟨v(0)·v(t)⟩ / ⟨v²⟩"}),
            ({name: (found.frequency, found.spectrum[name]) for name in shown(found.spectrum)},
             {"title": "Vibrational density of states", "xlabel": "wavenumber (cm⁻¹)", "ylabel": "per cm⁻¹",
              "xlim": (0, right)}),
        )  # fmt: skip
    names = {"temperature_K": "temperature (K)", "pressure_GPa": "pressure (GPa)",
             "conserved_energy_eV": "conserved energy (eV)"}  # fmt: skip
    log = analysis.log or {}
    present = [name for name in names if name in log and np.isfinite(log[name]).any()]
    if present:
        images["log"] = _plot(*(
            ({"": (log["time_fs"] * 1e-3, log[name])}, {"xlabel": "time (ps)", "ylabel": names[name]})
            for name in present
        ))  # fmt: skip
    return images


def _plot(
    *panels: tuple[dict[str, tuple[Array, Array]], dict[str, Any]], span: tuple[float, float] | None = None
) -> Figure:
    """Draws panels of named curves side by side, without matplotlib's global state."""
    figure = Figure(figsize=(4.8 * len(panels), 4.0), layout="constrained")
    grid: Any = figure.subplots(1, len(panels), squeeze=False)
    colors: dict[str, str] = {"all": "#303030"}
    for axis, (curves, look) in zip(grid[0], panels, strict=True):
        if span is not None:
            axis.axvspan(*span, color="0.93", zorder=0, label="fit")
        for name, (x, y) in curves.items():
            color = colors.setdefault(name, _COLORS[(len(colors) - 1) % len(_COLORS)])
            axis.plot(x, y, label=name, color=color, linewidth=1.1)
        axis.set(**look)
        if any(curves):
            axis.legend(frameon=False, fontsize=9)
        else:
            axis.ticklabel_format(axis="y", useOffset=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure
