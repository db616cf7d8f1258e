"""Everything that the records of a study allow to be fitted, as JSON and as a report in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from escaip.errors import DataError
from escaip.scaling.checks import LackOfFit, LeftOut, lack_of_fit, leave_largest_out
from escaip.scaling.compare import Difference, LossRatio, compare
from escaip.scaling.files import write_whole
from escaip.scaling.frontier import frontier
from escaip.scaling.isoflop import IsoFlop, fit_isoflop, is_isoflop
from escaip.scaling.laws import FitSettings, Interval, LawFit, fit_law
from escaip.scaling.records import Record, read_records, variants
from escaip.scaling.report import render, to_dict
from escaip.scaling.solver import Array

FIT = "fit.json"
"""The file of a study's folder that its fits are written to."""


@dataclass(frozen=True)
class Points:
    """What is fitted, one value for each run.

    Attributes:
        parameters, structures, flops: N, D, C ``(n,)``.
        losses: ``(n,)`` of one metric.
    """

    parameters: Array
    structures: Array
    flops: Array
    losses: Array

    @classmethod
    def of(cls, records: tuple[Record, ...], metric: str) -> Points:
        """From the records that hold the metric."""
        rows = [
            (one.parameters, one.structures, one.flops, one.losses[metric]) for one in records if metric in one.losses
        ]
        return cls(*np.array(rows, dtype=np.float64).reshape(-1, 4).T)


@dataclass(frozen=True)
class Law:
    """A fitted law and what speaks against it."""

    fit: LawFit
    lack: LackOfFit
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class VariantFit:
    """One variant of a study.

    Attributes:
        points: that were fitted.
        on_frontier: ``(n,)`` which of them the law of compute was fitted to.
        joint: L = E + A N^-α + B D^-β, where there are points enough.
        power: L = E + F C^-γ on the frontier, where there are points enough.
        isoflop: where a budget was spent on three sizes or more.
        gamma_difference: γ of the frontier less αβ/(α+β); None without both.
        notes: what was not fitted and why, and what to be careful with.
    """

    points: Points
    on_frontier: np.ndarray
    joint: Law | None
    power: Law | None
    isoflop: IsoFlop | None
    gamma_difference: Interval | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class StudyFit:
    """Result of :func:`fit_study`.

    Attributes:
        metric: that was fitted.
        settings: of the fits.
        variants: name to fits, in the order of the records.
        differences, ratios: of every pair of variants.
    """

    metric: str
    settings: FitSettings
    variants: Mapping[str, VariantFit]
    differences: tuple[Difference, ...]
    ratios: tuple[LossRatio, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; what is unknown is None."""
        return to_dict(self)

    def summary(self) -> str:
        """Returns a report in Markdown: numbers with intervals, warnings in words."""
        return render(self)


def fit_study(
    folder: str | Path, metric: str = "forces_mae", settings: FitSettings | None = None, write: bool = True
) -> StudyFit:
    """Fits every law that the records of a study allow and writes ``fit.json`` beside them.

    Args:
        folder: of the study, holding ``records.jsonl``.
        metric: of the records, such as ``forces_mae``, ``energy_mae`` or ``loss``.
        settings: by default δ = 1e-3, 1000 refits, 90 %.
        write: whether to write ``fit.json``.

    Raises:
        DataError: records that cannot be read, a metric that none holds, or too few points for any law.
    """
    settings = settings or FitSettings()
    records = read_records(folder)
    known = sorted({name for record in records for name in record.losses})
    if metric not in known:
        raise DataError(f"{folder}: no record holds {metric!r}: use --metric with one of {', '.join(known) or 'none'}")
    fits: dict[str, VariantFit] = {}
    for number, (name, group) in enumerate(variants(records).items()):
        fits[name] = fit_variant(group, metric, replace(settings, seed=settings.seed + number))
    if all(one.joint is None and one.power is None and one.isoflop is None for one in fits.values()):
        reasons = "; ".join(dict.fromkeys(note for one in fits.values() for note in one.notes))
        raise DataError(f"{folder}: nothing can be fitted: {reasons}")
    joint = {name: one.joint.fit for name, one in fits.items() if one.joint is not None}
    power = {name: one.power.fit for name, one in fits.items() if one.power is not None}
    compared = [compare(group, settings.level) for group in (joint, power)]
    study = StudyFit(
        metric=metric, settings=settings, variants=fits,
        differences=tuple(one for found, _ in compared for one in found),
        ratios=tuple(one for _, found in compared for one in found),
    )  # fmt: skip
    if write:
        target = Path(folder)
        write_whole(
            (target if target.is_dir() else target.parent) / FIT,
            json.dumps(study.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        )
    return study


def fit_variant(records: tuple[Record, ...], metric: str, settings: FitSettings) -> VariantFit:
    """Fits every law that the records of one variant allow; what they do not allow is in the notes."""
    points = Points.of(records, metric)
    notes = []
    if len(points.losses) < len(records):
        notes.append(f"{len(records) - len(points.losses)} of {len(records)} runs have no {metric} and are left out")
    n, d, c, losses = points.parameters, points.structures, points.flops, points.losses
    joint = _law("joint", [n, d], losses, settings, notes)
    chosen = frontier(c, n, d, losses) if len(losses) else np.zeros(0, dtype=bool)
    power = _law("power", [c[chosen]], losses[chosen], settings, notes)
    isoflop = None
    if len(losses) and is_isoflop(c, n):
        isoflop = fit_isoflop(c, n, d, losses, settings)
    difference = None
    if joint is not None and power is not None:
        difference = _gamma_difference(joint.fit, power.fit, settings, notes)
    return VariantFit(points, chosen, joint, power, isoflop, difference, tuple(notes))


def _law(kind: str, inputs: list[Any], losses: Array, settings: FitSettings, notes: list[str]) -> Law | None:
    try:
        fit = fit_law(kind, inputs, losses, settings)
    except DataError as error:
        notes.append(f"{'law of N and D' if kind == 'joint' else 'law of compute'} not fitted: {error}")
        return None
    lack = lack_of_fit(kind, inputs, losses, settings.floor)
    if kind == "power" and lack.flagged:  # a frontier is chosen, so that a misfit does not condemn the law itself
        text = (
            f"points of the frontier lie off the law by more than the noise ({lack.method} test, p = "
            f"{lack.p_value:.2g}): their sizes and data are not all the best for their compute (a grid gives a "
            "staircase), or the law does not hold"
        )
        lack = replace(lack, text=text)
    return Law(fit, lack, leave_largest_out(kind, inputs, losses, settings))


def _gamma_difference(joint: LawFit, power: LawFit, settings: FitSettings, notes: list[str]) -> Interval:
    rng = np.random.default_rng([settings.seed, 4])
    a, b = (rng.permutation(fit.replicates["gamma"]) for fit in (power, joint))
    number = min(len(a), len(b))
    value = power.estimates["gamma"].value - joint.estimates["gamma"].value
    found = Interval.of(value, a[:number] - b[:number], settings.level)
    if found.known and not found.covers(0.0):
        notes.append(
            "γ of the frontier and αβ/(α+β) differ: sizes and data on the frontier are not the best for their compute, "
            "compute is not proportional to N D, or a law does not hold"
        )
    return found
