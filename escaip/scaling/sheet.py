"""A study on one sheet: loss against compute, IsoFLOP curves or sizes and data, residuals, learning curves."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from escaip.scaling.isoflop import IsoFlop, budgets
from escaip.scaling.laws import LawFit
from escaip.scaling.records import Record, variants
from escaip.scaling.summary import StudyFit, VariantFit

_LAW = "#303030"
_BAND = 0.15  # opacity
_UNITS = {"energy_mae": "eV/atom", "forces_mae": "eV/Å", "stress_mae": "eV/Å³"}


def draw_sheet(study: StudyFit, records: Iterable[Record]) -> dict[str, bytes]:
    """Returns the sheet as ``png`` and ``pdf``: a row of five panels for each variant.

    Loss against compute with the frontier and its law; losses of each budget against N with their parabolas, then N*
    and D*, or where no budget has a minimum losses against N for each D with the joint law, then against D likewise;
    residuals of the joint law; learning curves. Bands are those of the intervals of the study.
    """
    figure = make_figure(study, records)
    found = {}
    for kind in ("png", "pdf"):
        stream = io.BytesIO()
        # Without a date, so that the same study is the same file.
        figure.savefig(stream, format=kind, dpi=110, metadata={"CreationDate": None} if kind == "pdf" else None)
        found[kind] = stream.getvalue()
    return found


def make_figure(study: StudyFit, records: Iterable[Record]) -> Figure:
    """The sheet before it is written: see :func:`draw_sheet`."""
    groups = {name: group for name, group in variants(records).items() if name in study.variants}
    figure = Figure(figsize=(20.0, 4.0 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(len(groups), 5, squeeze=False)
    for axes, (name, group) in zip(grid, groups.items(), strict=True):
        _row(list(axes), study, name, [one for one in group if study.metric in one.losses])
    return figure


def _row(axes: list[Axes], study: StudyFit, name: str, records: Sequence[Record]) -> None:
    fits, loss = study.variants[name], f"{study.metric} ({_UNITS.get(study.metric, '')})".replace(" ()", "")
    level = study.settings.level
    _compute(axes[0], fits, records, study.metric, level)
    axes[0].set(title=f"{name}: compute", xlabel="training compute C (FLOPs)", ylabel=loss)
    if _has_budgets(fits):
        assert fits.isoflop is not None
        _budgets(axes[1], fits)
        axes[1].set(title="budgets", xlabel="parameters N", ylabel=loss)
        _best(axes[2], fits.isoflop)
        axes[2].set(title="best size and data of a budget", xlabel="C (FLOPs)", ylabel="N*, D*")
    else:
        _slices(axes[1], fits, along="N", level=level)
        axes[1].set(title="size", xlabel="parameters N", ylabel=loss)
        _slices(axes[2], fits, along="D", level=level)
        axes[2].set(title="data", xlabel="training structures D", ylabel=loss)
    if fits.joint is not None:
        _residuals(axes[3], fits)
        axes[3].set(
            title="runs about the law of N and D", xlabel=f"predicted {loss}", ylabel="off by (%)", xscale="log"
        )
    else:
        _empty(axes[3], "no law of N and D:\ntoo few sizes and data")
    _learning(axes[4], records)
    axes[4].set(title="learning curves", xlabel="C so far (FLOPs)", ylabel="validation loss")
    axes[4].set(xscale="log", yscale="log")
    for axis in axes:
        _few_labels(axis)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9, which="both")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)


def _has_budgets(fits: VariantFit) -> bool:
    """Whether budgets tell something. Cells of a grid may happen to cost the same, and are no search for a minimum."""
    if fits.isoflop is None:
        return False
    return fits.joint is None or any(one.best_parameters is not None for one in fits.isoflop.parabolas)


def _empty(axis: Axes, text: str) -> None:
    """A panel that says why there is nothing to see."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=9)
    axis.set(xticks=[], yticks=[])


def _few_labels(axis: Axes) -> None:
    """Labels between decades only where a logarithmic axis is shorter than one, and few of them."""
    for ticks, scale, (low, high) in (
        (axis.xaxis, axis.get_xscale(), axis.get_xlim()),
        (axis.yaxis, axis.get_yscale(), axis.get_ylim()),
    ):
        if scale != "log":
            continue
        short = high / low < 10.0
        ticks.set_minor_locator(LogLocator(subs=[2.0, 3.0, 5.0] if short else [float(x) for x in range(2, 10)]))
        ticks.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:.3g}") if short else NullFormatter())
        if short:
            ticks.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    scale: Colormap = colormaps["viridis"]
    return [scale(0.05 + 0.85 * index / max(1, count - 1)) for index in range(count)]


def _band(axis: Axes, x: np.ndarray, fit: LawFit, level: float, *inputs: Any) -> None:
    value, replicates = fit.predict(*inputs)
    axis.plot(x, value, color=_LAW, linewidth=1.2)
    if len(replicates) > 1:
        low, high = np.quantile(replicates, [0.5 - level / 2, 0.5 + level / 2], axis=0)
        axis.fill_between(x, low, high, color=_LAW, alpha=_BAND, linewidth=0)


def _compute(axis: Axes, fits: VariantFit, records: Sequence[Record], metric: str, level: float) -> None:
    sizes = sorted({one.parameters for one in records})
    for size, color in zip(sizes, _colors(len(sizes)), strict=True):
        mine = [one for one in records if one.parameters == size]
        axis.plot(
            [one.flops for one in mine], [one.losses[metric] for one in mine], ".", color=color, label=f"N = {size:.3g}"
        )
    chosen = fits.on_frontier
    points = fits.points
    axis.plot(
        points.flops[chosen], points.losses[chosen], "o", markersize=8, markerfacecolor="none", color=_LAW,
        label="frontier",
    )  # fmt: skip
    if fits.power is not None:
        x = np.geomspace(points.flops[chosen].min(), points.flops.max(), 100)
        _band(axis, x, fits.power.fit, level, x)
    axis.set(xscale="log", yscale="log")


def _budgets(axis: Axes, fits: VariantFit) -> None:
    assert fits.isoflop is not None
    points = fits.points
    groups = [g for g in budgets(points.flops) if len(np.unique(points.parameters[g])) >= 3]
    for group, parabola, color in zip(groups, fits.isoflop.parabolas, _colors(len(groups)), strict=True):
        axis.plot(points.parameters[group], points.losses[group], ".", color=color, label=f"C = {parabola.flops:.2g}")
        u = np.linspace(np.log(parabola.sizes[0]), np.log(parabola.sizes[1]), 60)
        axis.plot(np.exp(u), np.exp(np.polyval(parabola.coefficients, u - parabola.center)), color=color, linewidth=1)
        if parabola.best_parameters is not None and parabola.best_loss is not None:
            axis.plot(parabola.best_parameters.value, parabola.best_loss.value, "*", markersize=11, color=color)
    axis.set(xscale="log", yscale="log")


def _best(axis: Axes, found: IsoFlop) -> None:
    if all(one.best_parameters is None for one in found.parabolas):
        _empty(axis, "no budget has a minimum\nwithin its sizes")
        return
    for name, color, marker in (("best_parameters", "#2a6f97", "o"), ("best_structures", "#c8553d", "s")):
        ones = [(one.flops, getattr(one, name)) for one in found.parabolas if getattr(one, name) is not None]
        if not ones:
            continue
        x = np.array([flops for flops, _ in ones])
        y = np.array([interval.value for _, interval in ones])
        ends = np.array([[max(i.value - i.low, 0.0), max(i.high - i.value, 0.0)] for _, i in ones])
        exponent = found.size_exponent if name == "best_parameters" else found.data_exponent
        label = "N*" if name == "best_parameters" else "D*"
        if exponent is not None:
            label = f"{label} ∝ C^{exponent.value:.2f}"
        axis.errorbar(x, y, np.nan_to_num(ends).T, fmt=marker, color=color, label=label, capsize=3)
        if len(x) > 1:
            axis.plot(x, np.exp(np.polyval(np.polyfit(np.log(x), np.log(y), 1), np.log(x))), color=color, linewidth=1)
    axis.set(xscale="log", yscale="log")


def _slices(axis: Axes, fits: VariantFit, along: str, level: float) -> None:
    """Losses along one input, a color for each value of the other."""
    points = fits.points
    x, other = points.parameters, points.structures
    if along == "D":
        x, other = other, x
    label = "D" if along == "N" else "N"
    values = np.unique(other)
    for value, color in zip(values, _colors(len(values)), strict=True):
        here = other == value
        axis.plot(x[here], points.losses[here], ".", color=color, label=f"{label} = {value:.3g}")
        if fits.joint is None or x.min() == x.max():
            continue
        dense = np.geomspace(x.min(), x.max(), 60)
        constant = np.full_like(dense, value)
        inputs = (dense, constant) if along == "N" else (constant, dense)
        if value in (values[0], values[-1]):
            _band(axis, dense, fits.joint.fit, level, *inputs)
        else:
            axis.plot(dense, fits.joint.fit.predict(*inputs)[0], color=color, linewidth=0.8)
    axis.set(xscale="log", yscale="log")


def _residuals(axis: Axes, fits: VariantFit) -> None:
    assert fits.joint is not None
    points = fits.points
    predicted = fits.joint.fit.predict(points.parameters, points.structures)[0]
    sizes = np.unique(points.parameters)
    for size, color in zip(sizes, _colors(len(sizes)), strict=True):
        here = points.parameters == size
        axis.plot(predicted[here], 100 * np.log(points.losses[here] / predicted[here]), ".", color=color)
    axis.axhline(0.0, color=_LAW, linewidth=0.8)


def _learning(axis: Axes, records: Sequence[Record]) -> None:
    sizes = sorted({one.parameters for one in records})
    for size, color in zip(sizes, _colors(len(sizes)), strict=True):
        for one in records:
            if one.parameters == size and one.curve:
                _, flops, values = np.array(one.curve).T
                axis.plot(flops, values, color=color, linewidth=0.8)
