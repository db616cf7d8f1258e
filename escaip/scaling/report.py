"""The report of a study: its fits as JSON, numbers, protocol and limits in Markdown, and one sheet of plots."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from escaip.files import plain, write_aside, write_file, write_json
from escaip.scaling.fits import IsoFlop, StudyFit, VariantFit
from escaip.scaling.laws import Interval, LawFit
from escaip.scaling.study import Record, variants

FIT, REPORT, SHEET = "fit.json", "report.md", "scaling"
_FORMULAS = {"joint": "L = E + A N^-alpha + B D^-beta", "power": "L = E + F C^-gamma, on the frontier"}
_ORDER = {"joint": ("alpha", "beta", "gamma", "E", "A", "B"), "power": ("gamma", "E", "F")}
_UNITS = {"energy_mae": "eV/atom", "forces_mae": "eV/Å", "stress_mae": "eV/Å³"}
_LAW = "#303030"
_LIMITS = """## Limits

- The laws hold inside the ranges above. Outside nothing was measured: a law that fits says how steep the next factor of
  two is, not where it ends.
- They belong to these data, this recipe and this length of training. Another schedule, mixture or level of theory has
  other exponents, and E depends on the labels and the validation set as much as on the models.
- Compute counts matrix and attention products of training (docs/howto/scaling.md), not time.
- Seeds change weights and order of the data. The effect of another split is not in the intervals.
"""


def write_fit(study: StudyFit, folder: str | os.PathLike[str]) -> Path:
    """Writes ``fit.json`` into the folder of a study and returns its path; intervals are ``[value, low, high]``.

    Raises:
        DataError: the file cannot be written.
    """
    place = Path(folder)
    file = (place if place.is_dir() else place.parent) / FIT
    write_json(file, plain(study))
    return file


def write_report(study: StudyFit, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes ``fit.json``, ``report.md``, ``scaling.png`` and ``scaling.pdf`` into the folder of a study.

    Raises:
        DataError: a file cannot be written.
    """
    place = Path(folder)
    figure = draw_sheet(study)
    files = [write_fit(study, place)]
    for kind in ("png", "pdf"):
        files.append(place / f"{SHEET}.{kind}")
        with write_aside(files[-1]) as aside:  # without a date, so that the same study is the same file
            figure.savefig(aside, dpi=110, metadata={"CreationDate": None} if kind == "pdf" else None)
    text = "\n\n".join([markdown(study), f"![sheet]({SHEET}.png)", _protocol(place, study.records), _LIMITS])
    write_file(place / REPORT, text)
    return [*files, place / REPORT]


def markdown(study: StudyFit) -> str:
    """Returns a table over variants, their differences, and the laws of each with warnings in words."""
    settings = study.settings
    ends = "" if settings.floor else ", E fixed to 0"
    parts = [
        f"# Scaling of {study.metric}",
        f"Intervals hold {100 * settings.level:g} % ({settings.bootstrap} refits), Huber δ = {settings.huber:g}{ends}.",
        _overview(study),
    ]
    if study.comparisons:
        head = ["first", "second", "law", "quantity", "first − second, or ratio of losses", "told apart"]
        rows = [
            [
                one.first, one.second, "N, D" if one.law == "joint" else "frontier",
                " at ".join([one.quantity, ", ".join(f"{x:.3g}" for x in one.at)]) if one.at else one.quantity,
                _shown(one.value) + "".join(f", beyond the range of {name}" for name in one.extrapolated),
                "yes" if one.distinct else "no",
            ]
            for one in study.comparisons
        ]  # fmt: skip
        parts += ["## Variants beside each other", _table(head, rows)]
        parts.append("Where an interval holds 0 (or 1, of a ratio), these data do not tell the two apart.")
    for name, fits in study.variants.items():
        parts.append(f"## {name}")
        for law in (fits.joint, fits.power):
            parts += [] if law is None else _law(law)
        if fits.gamma_difference is not None:
            parts.append(f"γ of the frontier less αβ/(α+β): {_shown(fits.gamma_difference)}")
        parts += [] if fits.isoflop is None else _isoflop(fits.isoflop)
        parts += [_bullets(fits.notes)] if fits.notes else []
    return "\n\n".join(parts)


def _ends(one: Interval) -> str:
    return f"{one.low:.3g} to {one.high:.3g}" if one.known else "unknown"


def _shown(one: Interval | None) -> str:
    return "" if one is None else f"{one.value:.3g} ({_ends(one)})"


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {one}" for one in texts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _overview(study: StudyFit) -> str:
    rows = []
    for name, fits in study.variants.items():
        joint = {} if fits.joint is None else fits.joint.estimates
        power = {} if fits.power is None else fits.power.estimates
        law = fits.joint or fits.power
        if law is None:
            verdict = "no law"
        elif math.isnan(law.lack_of_fit.p_value):
            verdict = "not tested"
        else:
            verdict = "NO" if law.lack_of_fit.flagged else "yes"
        shown = [_shown(power.get("gamma")), *(_shown(joint.get(one)) for one in ("gamma", "alpha", "beta", "E"))]
        rows.append([name, str(len(fits.points.loss)), *shown, verdict])
    head = ["variant", "runs", "gamma (frontier)", "alpha beta/(alpha+beta)", "alpha", "beta", "E", "law fits"]
    return _table(head, rows)


def _law(fit: LawFit) -> list[str]:
    rows = []
    for name in _ORDER[fit.kind]:
        one = fit.estimates[name]
        if name == "E" and not fit.settings.floor:
            continue
        bare = f"{fit.without_floor[name]:.3g}" if name in fit.without_floor else ""
        of_both = name == "gamma" and fit.kind == "joint"
        rows.append(["gamma = alpha beta / (alpha + beta)" if of_both else name, f"{one.value:.4g}", _ends(one), bare])
    seeds = "one seed each" if fit.noise.seeds is None else f"seeds differ by {100 * fit.noise.seeds:.2g} %"
    ranges = ", ".join(f"{axis} {low:.3g} to {high:.3g}" for axis, (low, high) in fit.ranges.items())
    head = (
        f"`{_FORMULAS[fit.kind]}`: {fit.num_runs} runs at {fit.num_points} points ({ranges}); {seeds}, runs lie "
        f"{100 * fit.noise.run:.2g} % about the law."
    )
    words = [fit.lack_of_fit.text, *(one.text for one in fit.left_out), *fit.warnings]
    return [
        head, _table(["", "value", f"{100 * fit.settings.level:g} % interval", "with E = 0"], rows), _bullets(words)
    ]  # fmt: skip


def _isoflop(found: IsoFlop) -> list[str]:
    rows = [
        [f"{one.flops:.3g}", str(one.num_runs), _shown(one.N) or "refused", _shown(one.D), _shown(one.loss)]
        for one in found.budgets
    ]
    parts = ["IsoFLOP parabolas:", _table(["FLOPs", "runs", "N*", "D*", "loss"], rows)]
    if found.a is not None:
        parts.append(f"N* ∝ C^a, a = {_shown(found.a)}; D* ∝ C^b, b = {_shown(found.b)}")
    return [*parts, _bullets(found.warnings)] if found.warnings else parts


def _protocol(folder: Path, records: Sequence[Record]) -> str:
    """Describes the runs, from ``study.json`` and the records."""
    parts = ["## Protocol"]
    file = folder / "study.json"
    if file.is_file():
        plan = json.loads(file.read_text(encoding="utf-8"))["study"]
        parts.append(f"```yaml\n{yaml.safe_dump(plan, sort_keys=False, allow_unicode=True).strip()}\n```")
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.variant, record.size), []).append(record)
    rows = [
        [
            *key, f"{mine[0].parameters:,}", f"{mine[0].parameters_total:,}", str(len(mine)),
            _span([one.structures for one in mine], "d"), _span([one.flops for one in mine], ".2g"),
            _span([one.learning_rate for one in mine], ".3g"), f"{sum(one.seconds for one in mine) / 60:.0f}",
        ]
        for key, mine in groups.items()
    ]  # fmt: skip
    header = ["variant", "size", "N", "with embeddings", "runs", "D", "C (FLOPs)", "learning rate", "minutes"]
    parts.append(_table(header, rows))
    lost = [one.id for one in records if not one.losses]
    if lost:
        parts.append(f"Diverged, and in no fit: {', '.join(lost)}.")
    measured = [one.profiled for one in records if one.profiled is not None]
    if measured:
        parts.append(
            "C is by formula; a training step on two structures, run under PyTorch's counter, had "
            f"{_span(measured, '.5g')} times the formula's operations ({len(measured)} runs)."
        )
    commits = ", ".join(sorted({one.commit for one in records if one.commit})) or "unknown"
    parts.append(
        "N counts no embeddings. Losses are of the last validation, of averaged weights where the recipe has them. "
        f"{len(records)} runs, {sum(one.seconds for one in records) / 3600:.2f} hours in all; code: {commits}."
    )
    return "\n\n".join(parts)


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def draw_sheet(study: StudyFit) -> Figure:
    """Draws a row of five panels for each variant; bands are intervals at the level of the study.

    The panels show loss against compute with the frontier and its law; losses of each budget against N with their
    parabolas, then N* and D*, or where no budget has a minimum losses against N and against D with the joint law;
    residuals of the joint law; learning curves.
    """
    groups = variants(study.records)
    figure = Figure(figsize=(20.0, 4.0 * len(groups)), layout="constrained")
    loss = f"{study.metric} ({_UNITS[study.metric]})" if study.metric in _UNITS else study.metric
    rows: Any = figure.subplots(len(groups), 5, squeeze=False)
    for axes, (name, group) in zip(rows, groups.items(), strict=True):
        fits = study.variants[name]
        _compute(axes[0], fits, f"{name}: compute", loss)
        isoflop = fits.isoflop
        # Cells of a grid may happen to cost the same, and are then no search for a minimum.
        if isoflop is not None and (fits.joint is None or any(one.N is not None for one in isoflop.budgets)):
            _budgets(axes[1], isoflop, loss)
            _best(axes[2], isoflop)
        else:
            _slices(axes[1], fits, "N", loss)
            _slices(axes[2], fits, "D", loss)
        _residuals(axes[3], fits, loss)
        _learning(axes[4], [one for one in group if study.metric in one.losses])
        for axis in axes:
            _few_labels(axis)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=9, which="both")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=8)
    return figure


def _few_labels(axis: Axes) -> None:
    """Labels logarithmic axes that are shorter than a decade between its powers of ten, too."""
    for ticks in (axis.xaxis, axis.yaxis):
        if ticks.get_scale() == "log":
            low, high = ticks.get_view_interval()
            short = high / low < 10.0
            ticks.set_minor_locator(LogLocator(subs=[2.0, 3.0, 5.0] if short else [float(x) for x in range(2, 10)]))
            ticks.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:.3g}") if short else NullFormatter())


def _colored(values: Iterable[float]) -> list[tuple[float, Any]]:
    """Pairs each distinct value with a color."""
    distinct = sorted(set(values))
    return [(x, colormaps["viridis"](0.05 + 0.85 * i / max(1, len(distinct) - 1))) for i, x in enumerate(distinct)]


def _empty(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=9)
    axis.set(xticks=[], yticks=[])


def _band(axis: Axes, x: np.ndarray, fit: LawFit, *inputs: Any) -> None:
    value, refits = fit.predict(*inputs)
    axis.plot(x, value, color=_LAW, linewidth=1.2)
    if len(refits) > 1:
        low, high = np.quantile(refits, fit.settings.percentiles, axis=0)
        axis.fill_between(x, low, high, color=_LAW, alpha=0.15, linewidth=0)


def _compute(axis: Axes, fits: VariantFit, title: str, loss: str) -> None:
    points, best = fits.points, fits.frontier
    for size, color in _colored(points.N):
        mine = points.take(np.equal(points.N, size))
        axis.plot(mine.C, mine.loss, ".", color=color, label=f"N = {size:.3g}")
    axis.plot(best.C, best.loss, "o", label="frontier", markersize=8, markerfacecolor="none", color=_LAW)
    if fits.power is not None:
        x = np.geomspace(best.C.min(), points.C.max(), 100)
        _band(axis, x, fits.power, x)
    axis.set(title=title, xlabel="training compute C (FLOPs)", ylabel=loss, xscale="log", yscale="log")


def _budgets(axis: Axes, found: IsoFlop, loss: str) -> None:
    for parabola, (_, color) in zip(found.budgets, _colored(range(len(found.budgets))), strict=True):
        axis.plot(parabola.runs.N, parabola.runs.loss, ".", color=color, label=f"C = {parabola.flops:.2g}")
        u = np.log(np.geomspace(*parabola.sizes, 60))
        axis.plot(np.exp(u), np.exp(np.polyval(parabola.coefficients, u - parabola.center)), color=color, linewidth=1)
        if parabola.N is not None and parabola.loss is not None:
            axis.plot(parabola.N.value, parabola.loss.value, "*", markersize=11, color=color)
    axis.set(title="budgets", xlabel="parameters N", ylabel=loss, xscale="log", yscale="log")


def _best(axis: Axes, found: IsoFlop) -> None:
    axis.set(title="best size and data of a budget", xlabel="C (FLOPs)", ylabel="N*, D*")
    usable = [one for one in found.budgets if one.N is not None]
    if not usable:
        _empty(axis, "no budget has a minimum\nwithin its sizes")
        return
    x = np.array([one.flops for one in usable])
    for name, exponent, color, marker in (("N", found.a, "#2a6f97", "o"), ("D", found.b, "#c8553d", "s")):
        best: list[Interval] = [getattr(one, name) for one in usable]
        y = np.array([one.value for one in best])
        ends = np.maximum([[one.value - one.low for one in best], [one.high - one.value for one in best]], 0.0)
        label = f"{name}*" if exponent is None else f"{name}* ∝ C^{exponent.value:.2f}"
        axis.errorbar(x, y, np.nan_to_num(ends), fmt=marker, color=color, label=label, capsize=3)
        if len(x) > 1:
            axis.plot(x, np.exp(np.polyval(np.polyfit(np.log(x), np.log(y), 1), np.log(x))), color=color, linewidth=1)
    axis.set(xscale="log", yscale="log")


def _slices(axis: Axes, fits: VariantFit, along: str, loss: str) -> None:
    """Plots losses along one input in a color for each value of the other."""
    other, title, label = {"N": ("D", "size", "parameters N"), "D": ("N", "data", "training structures D")}[along]
    x, fixed = getattr(fits.points, along), getattr(fits.points, other)
    for value, color in _colored(fixed):
        here = fixed == value
        axis.plot(x[here], fits.points.loss[here], ".", color=color, label=f"{other} = {value:.3g}")
        if fits.joint is None or x.min() == x.max():
            continue
        dense = np.geomspace(x.min(), x.max(), 60)
        inputs = (dense, np.full_like(dense, value))[:: 1 if along == "N" else -1]
        if value in (fixed.min(), fixed.max()):
            _band(axis, dense, fits.joint, *inputs)
        else:
            axis.plot(dense, fits.joint.predict(*inputs)[0], color=color, linewidth=0.8)
    axis.set(title=title, xlabel=label, ylabel=loss, xscale="log", yscale="log")


def _residuals(axis: Axes, fits: VariantFit, loss: str) -> None:
    if fits.joint is None:
        _empty(axis, "no law of N and D:\ntoo few sizes and data")
        return
    sizes, data, _, losses = fits.points
    predicted = fits.joint.predict(sizes, data)[0]
    for size, color in _colored(sizes):
        here = sizes == size
        axis.plot(predicted[here], 100 * np.log(losses[here] / predicted[here]), ".", color=color)
    axis.axhline(0.0, color=_LAW, linewidth=0.8)
    title = "runs about the law of N and D"
    axis.set(title=title, xlabel=f"predicted {loss}", ylabel="off by (%)", xscale="log")


def _learning(axis: Axes, records: Sequence[Record]) -> None:
    for size, color in _colored(one.parameters for one in records):
        for one in records:
            if one.parameters == size and one.curve:
                _, flops, values = np.array(one.curve).T
                axis.plot(flops, values, color=color, linewidth=0.8)
    labels = {"xlabel": "C so far (FLOPs)", "ylabel": "validation loss"}
    axis.set(title="learning curves", xscale="log", yscale="log", **labels)
