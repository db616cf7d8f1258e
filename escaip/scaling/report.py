"""Fits of a study as plain JSON values and as Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from escaip.scaling.isoflop import IsoFlop
from escaip.scaling.laws import Interval, LawFit

if TYPE_CHECKING:
    from escaip.scaling.summary import Law, StudyFit, VariantFit

_FORMULAS = {"joint": "L = E + A N^-alpha + B D^-beta", "power": "L = E + F C^-gamma, on the frontier"}
_ORDER = {"joint": ("alpha", "beta", "gamma", "E", "A", "B"), "power": ("gamma", "E", "F")}
_MEANING = {"gamma": {"joint": "gamma = alpha beta / (alpha + beta)", "power": "gamma"}}


def shown(one: Interval | None) -> str:
    """``value (low to high)``."""
    if one is None:
        return ""
    if not one.known:
        return f"{one.value:.3g} (unknown)"
    return f"{one.value:.3g} ({one.low:.3g} to {one.high:.3g})"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def render(study: StudyFit) -> str:
    """The report: a table over variants, what tells them apart, and the details of each."""
    settings = study.settings
    ends = "" if settings.floor else ", E fixed to 0"
    parts = [
        f"# Scaling of {study.metric}",
        f"Intervals hold {100 * settings.level:g} % ({settings.bootstrap} refits), Huber δ = {settings.huber:g}{ends}.",
        _overview(study),
    ]
    if study.differences:
        parts += ["## Variants beside each other", _differences(study)]
        parts.append("Where an interval of a difference covers zero, these data do not tell the two apart.")
        parts.append("\n".join(f"- {one.text}" for one in study.ratios))
    for name, fits in study.variants.items():
        parts += [f"## {name}", *_variant(fits)]
    return "\n\n".join(parts)


def _overview(study: StudyFit) -> str:
    rows = []
    for name, fits in study.variants.items():
        joint = {} if fits.joint is None else fits.joint.fit.estimates
        power = {} if fits.power is None else fits.power.fit.estimates
        law = fits.joint or fits.power
        verdict = "no law" if law is None else "NO" if law.lack.flagged else "yes"
        if law is not None and law.lack.method == "none":
            verdict = "not tested"
        rows.append([
            name, str(len(fits.points.losses)), shown(power.get("gamma")),
            *(shown(joint.get(one)) for one in ("gamma", "alpha", "beta", "E")), verdict,
        ])  # fmt: skip
    head = ["variant", "runs", "gamma (frontier)", "alpha beta/(alpha+beta)", "alpha", "beta", "E", "law fits"]
    return markdown_table(head, rows)


def _differences(study: StudyFit) -> str:
    rows = []
    for one in study.differences:
        law = "N, D" if one.law == "joint" else "frontier"
        told = "yes" if one.distinct else "no"
        steeper = "" if math.isnan(one.steeper) else f"{100 * one.steeper:.0f} %"
        rows.append([one.first, one.second, law, one.exponent, shown(one.difference), steeper, told])
    head = ["first", "second", "law", "exponent", "first − second", "first steeper in", "told apart"]
    return markdown_table(head, rows)


def _variant(fits: VariantFit) -> list[str]:
    parts = []
    for law in (fits.joint, fits.power):
        if law is not None:
            parts += _law(law)
    if fits.gamma_difference is not None:
        parts.append(f"γ of the frontier less αβ/(α+β): {shown(fits.gamma_difference)}")
    if fits.isoflop is not None:
        parts += _isoflop(fits.isoflop)
    if fits.notes:
        parts.append("\n".join(f"- {note}" for note in fits.notes))
    return parts


def _law(law: Law) -> list[str]:
    fit = law.fit
    percent = f"{100 * fit.settings.level:g} % interval"
    rows = []
    for name in _ORDER[fit.kind]:
        one = fit.estimates[name]
        if name == "E" and not fit.settings.floor:
            continue
        ends = f"{one.low:.3g} to {one.high:.3g}" if one.known else "unknown"
        bare = f"{fit.without_floor[name]:.3g}" if name in fit.without_floor else ""
        rows.append([_MEANING.get(name, {}).get(fit.kind, name), f"{one.value:.4g}", ends, bare])
    seeds = "one seed each" if fit.noise.seeds is None else f"seeds differ by {100 * fit.noise.seeds:.2g} %"
    ranges = ", ".join(f"{axis} {low:.3g} to {high:.3g}" for axis, (low, high) in fit.ranges.items())
    head = (
        f"`{_FORMULAS[fit.kind]}`: {fit.num_runs} runs at {fit.num_cells} points ({ranges}), {fit.num_parameters} "
        f"parameters; {seeds}, runs lie {100 * fit.noise.run:.2g} % about the law."
    )
    words = [law.lack.text, *(one.text for one in law.left_out), *fit.warnings]
    return [head, markdown_table(["", "value", percent, "with E = 0"], rows), "\n".join(f"- {one}" for one in words)]


def _isoflop(found: IsoFlop) -> list[str]:
    rows = [
        [
            f"{one.flops:.3g}",
            str(one.num_runs),
            shown(one.best_parameters) or "refused",
            shown(one.best_structures),
            shown(one.best_loss),
        ]
        for one in found.parabolas
    ]
    parts = ["IsoFLOP parabolas:", markdown_table(["FLOPs", "runs", "N*", "D*", "loss"], rows)]
    if found.size_exponent is not None:
        parts.append(f"N* ∝ C^a, a = {shown(found.size_exponent)}; D* ∝ C^b, b = {shown(found.data_exponent)}")
    if found.warnings:
        parts.append("\n".join(f"- {one}" for one in found.warnings))
    return parts


def to_dict(study: StudyFit) -> dict[str, Any]:
    """Plain JSON values; an interval is ``[value, low, high]``."""
    settings = study.settings
    return {
        "metric": study.metric,
        "settings": {
            "huber": settings.huber, "bootstrap": settings.bootstrap, "level": settings.level, "seed": settings.seed,
            "floor": settings.floor,
        },
        "variants": {name: _variant_dict(fits) for name, fits in study.variants.items()},
        "differences": [
            {
                "first": one.first, "second": one.second, "law": one.law, "exponent": one.exponent,
                "difference": one.difference.to_list(), "first_steeper": _number(one.steeper), "distinct": one.distinct,
                "text": one.text,
            }
            for one in study.differences
        ],
        "loss_ratios": [
            {
                "first": one.first, "second": one.second, "law": one.law, "at": list(one.inputs),
                "ratio": one.ratio.to_list(), "text": one.text,
            }
            for one in study.ratios
        ],
    }  # fmt: skip


def _variant_dict(fits: VariantFit) -> dict[str, Any]:
    return {
        "num_runs": len(fits.points.losses),
        "joint": None if fits.joint is None else _law_dict(fits.joint),
        "power": None if fits.power is None else _law_dict(fits.power),
        "isoflop": None if fits.isoflop is None else _isoflop_dict(fits.isoflop),
        "gamma_difference": None if fits.gamma_difference is None else fits.gamma_difference.to_list(),
        "notes": list(fits.notes),
    }


def _law_dict(law: Law) -> dict[str, Any]:
    fit: LawFit = law.fit
    return {
        "formula": _FORMULAS[fit.kind],
        "num_runs": fit.num_runs, "num_points": fit.num_cells, "num_parameters": fit.num_parameters,
        "ranges": {axis: list(ends) for axis, ends in fit.ranges.items()},
        "estimates": {name: fit.estimates[name].to_list() for name in _ORDER[fit.kind]},
        "with_E_0": dict(fit.without_floor), "E_0_p_value": _number(fit.floor_p_value),
        "noise_run": fit.noise.run, "noise_freedom": fit.noise.freedom, "noise_seeds": fit.noise.seeds,
        "lack_of_fit": {
            "method": law.lack.method, "p_value": _number(law.lack.p_value), "flagged": law.lack.flagged,
            "text": law.lack.text,
        },
        "left_out": [
            {
                "axis": one.axis, "value": one.value,
                "predicted": [_number(x) for x in (one.predicted, one.low, one.high)],
                "observed": one.observed, "error_percent": _number(one.error), "holds": one.holds, "text": one.text,
            }
            for one in law.left_out
        ],
        "warnings": list(fit.warnings),
    }  # fmt: skip


def _isoflop_dict(found: IsoFlop) -> dict[str, Any]:
    def of(one: Interval | None) -> list[float | None] | None:
        return None if one is None else one.to_list()

    return {
        "budgets": [
            {
                "flops": one.flops, "num_runs": one.num_runs, "sizes": list(one.sizes), "N": of(one.best_parameters),
                "D": of(one.best_structures), "loss": of(one.best_loss), "text": one.text,
            }
            for one in found.parabolas
        ],
        "a": of(found.size_exponent),
        "b": of(found.data_exponent),
        "warnings": list(found.warnings),
    }  # fmt: skip


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
