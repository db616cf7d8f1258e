"""Fits of all that the records of a study allow: laws, IsoFLOP parabolas, and differences of variants."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from escaip.errors import DataError
from escaip.scaling.laws import Array, Cells, FitSettings, Interval, LawFit, fit_law
from escaip.scaling.study import Record, read_records, variants

BINS_PER_DECADE = 3
"""Bins of compute from each of which the frontier takes at most one cell."""
BUDGET_TOLERANCE = 0.08
"""Budgets count as equal if C differs by no more than this fraction from the middle of their group."""


class Points(NamedTuple):
    """Runs that are fitted: parameters N, structures D, operations C and the loss of one metric, each ``(n,)``."""

    N: Array
    D: Array
    C: Array
    loss: Array

    def take(self, chosen: NDArray[Any]) -> Points:
        """Returns the runs of an index or a mask."""
        return Points(*(values[chosen] for values in self))


def frontier(points: Points) -> Points:
    """Returns the runs that are best for their compute.

    In each bin of log C this is the cell (N, D) of the lowest geometric mean loss over its seeds, unless a cell of a
    cheaper bin is as good. The choice makes the best of several noisy cells look better than it is, by less than the
    noise of their means; intervals of a law fitted to the frontier do not contain that.
    """
    if not len(points.loss):
        return points
    cells = Cells.of(np.stack([points.N, points.D]))
    means, cost = cells.means(np.log(points.loss)), cells.means(np.log10(points.C))
    bin_of = np.floor((cost - cost.min()) * BINS_PER_DECADE + 1e-9)
    chosen, lowest = [], np.inf
    for one in np.unique(bin_of):
        members = np.nonzero(bin_of == one)[0]
        best = members[np.argmin(means[members])]
        if means[best] < lowest:
            chosen.append(best)
            lowest = means[best]
    return points.take(np.isin(cells.index, chosen))


@dataclass(frozen=True)
class Parabola:
    """Parabola ``log L = a + b u + c u²``, ``u = log N``, through the runs of one budget.

    Attributes:
        flops: geometric mean C of the runs.
        sizes: lowest and highest N.
        N, D, loss: values at the minimum; None where it does not lie inside the sizes.
        coefficients: ``(c, b, a)`` in ``u − center``, with the mean of u.
        text: the result in words.
    """

    runs: Points = field(repr=False)
    flops: float
    num_runs: int
    sizes: tuple[float, float]
    N: Interval | None
    D: Interval | None
    loss: Interval | None
    coefficients: tuple[float, ...]
    center: float
    text: str


@dataclass(frozen=True)
class IsoFlop:
    """Parabolas of all budgets by rising C, and the exponents of ``N* ∝ C^a``, ``D* ∝ C^b`` through their minima.

    With fewer than two minima the exponents are None.
    """

    budgets: tuple[Parabola, ...]
    a: Interval | None
    b: Interval | None
    warnings: tuple[str, ...]


def group_budgets(flops: Array) -> list[NDArray[np.int64]]:
    """Returns indices of runs of nearly equal C, by rising C; no two of a group differ by more than twice 8 %."""
    logs = np.log(np.asarray(flops, dtype=np.float64))
    found: list[list[int]] = []
    for index in np.argsort(logs, kind="stable"):
        if found and logs[index] - logs[found[-1][0]] <= 2 * np.log1p(BUDGET_TOLERANCE):
            found[-1].append(int(index))
        else:
            found.append([int(index)])
    return [np.array(group) for group in found]


def fit_isoflop(points: Points, settings: FitSettings) -> IsoFlop | None:
    """Fits the parabola of every budget with three sizes or more; None where no budget has them.

    Least squares in log L (Hoffmann et al., arXiv:2203.15556, approach 2). Intervals are percentiles of fits to the
    parabolas plus normal residuals, whose spread is that of all budgets together, divided by the root of a drawn
    ``χ²_ν/ν``. D* is the value at N* of the line of log D over log N through the runs of the budget.
    """
    rng = np.random.default_rng([settings.seed, 2])
    budgets = [points.take(group) for group in group_budgets(points.C)]
    budgets = [runs for runs in budgets if len(np.unique(np.round(np.log(runs.N), 6))) >= 3]
    if not budgets:
        return None
    freedom = sum(len(runs.N) - 3 for runs in budgets)
    scale, squares = np.zeros(0), 0.0
    for runs in budgets:
        design = np.vander(np.log(runs.N / runs.N.mean()), 3)
        y = np.log(runs.loss)
        squares += float(np.square(y - design @ np.linalg.pinv(design) @ y).sum())
    if freedom > 0:
        scale = np.sqrt(squares / rng.chisquare(freedom, size=settings.bootstrap))
    fitted = [_parabola(runs, scale, settings, rng) for runs in budgets]
    parabolas = tuple(one for one, _ in fitted)
    warnings = [one.text for one in parabolas if one.N is None]
    if freedom == 0:
        warnings.append("three runs in each budget: the noise is not known, no intervals")
    usable = [(np.log(one.flops), minima) for one, minima in fitted if one.N is not None]
    if len(usable) < 2:
        warnings.append("fewer than two budgets have a minimum inside their sizes: no exponents of N* and D*")
        return IsoFlop(parabolas, None, None, tuple(warnings))
    if len(usable) == 2:
        warnings.append("two budgets only: N* and D* need not follow a power law")
    logs = np.array([one for one, _ in usable])
    line = np.linalg.pinv(np.vander(logs - logs.mean(), 2))[0]
    slopes = np.einsum("b,bkr->kr", line, np.stack([minima for _, minima in usable]))
    lost = float(np.isnan(slopes[0, 1:]).mean()) if freedom else 0.0
    if lost > 0.05:
        warnings.append(
            f"{100 * lost:.0f} % of the refits have a budget without a minimum: a and b are hardly determined"
        )
    a, b = (Interval.of(float(row[0]), row[1:], settings) for row in slopes)
    for name, one, axis in (("a", a, "N*"), ("b", b, "D*")):
        if one.covers(0.0):
            level = f"{100 * settings.level:g} %"
            warnings.append(f"the {level} interval of {name} covers zero: not shown that {axis} grows with compute")
    return IsoFlop(parabolas, a, b, tuple(warnings))


def _parabola(runs: Points, scale: Array, settings: FitSettings, rng: np.random.Generator) -> tuple[Parabola, Array]:
    """Returns the fit, and ``(2, 1 + R)`` log N* and log D* of fit and refits, NaN where there is no minimum."""
    u = np.log(runs.N)
    center = float(u.mean())
    design = np.vander(u - center, 3)
    inverse = np.linalg.pinv(design)
    best = inverse @ np.log(runs.loss)
    drawn = design @ best + scale[:, None] * rng.standard_normal((len(scale), len(u)))
    curvature, slope, constant = np.vstack([best, drawn @ inverse.T]).T
    curvature = np.where(curvature > 0, curvature, np.nan)
    minima = np.stack([center - slope / (2 * curvature)] * 2)
    minima[1] = np.polyval(np.polyfit(u - center, np.log(runs.D), 1), minima[0] - center)
    depth = constant - slope**2 / (4 * curvature)
    flops, sizes = float(np.exp(np.log(runs.C).mean())), (float(runs.N.min()), float(runs.N.max()))
    best_n, best_d, lowest = None, None, None
    if u.min() < minima[0, 0] < u.max():
        best_n, best_d, lowest = (
            Interval.of(float(np.exp(row[0])), np.exp(row[1:]), settings) for row in (*minima, depth)
        )
        text = f"best size {np.exp(minima[0, 0]):.3g} of {sizes[0]:.3g} to {sizes[1]:.3g}"
    else:
        low, high = (float(np.polyval(best, end - center)) for end in (u.min(), u.max()))
        outside = f"its minimum lies outside of N {sizes[0]:.3g} to {sizes[1]:.3g}"
        why = "the curve has no minimum" if np.isnan(minima[0, 0]) else outside
        text = f"refused, {why}: add {'larger' if high < low else 'smaller'} models at this budget"
    text = f"budget {flops:.3g} FLOPs: {text}"
    return Parabola(runs, flops, len(u), sizes, best_n, best_d, lowest, tuple(best.tolist()), center, text), minima


@dataclass(frozen=True)
class Comparison:
    """Comparison of a law, ``joint`` or ``power``, of two variants that were fitted apart.

    Attributes:
        quantity: ``alpha``, ``beta`` or ``gamma``, or ``loss``.
        value: first less second; of ``loss`` first over second.
        distinct: whether the interval leaves out zero, or one for a ratio.
        at: for the ratio, the largest C, or N and D, that both variants have.
        extrapolated: variants outside of whose range ``at`` lies.
    """

    first: str
    second: str
    law: str
    quantity: str
    value: Interval
    distinct: bool
    at: tuple[float, ...] = ()
    extrapolated: tuple[str, ...] = ()


def compare(fits: Mapping[str, LawFit]) -> list[Comparison]:
    """Compares the same law of every pair of variants.

    Refits of different variants are independent: they are paired at random, and intervals are percentiles of the pairs.
    Of ten pairs that are equal, one seems different at a level of 90 %.
    """
    found = []
    for number, (first, second) in enumerate(combinations(fits, 2)):
        rng = np.random.default_rng([number, 3])
        one, other = fits[first], fits[second]
        for exponent in ("gamma",) if one.kind == "power" else ("alpha", "beta", "gamma"):
            difference = _difference(one, other, exponent, rng)
            found.append(Comparison(first, second, one.kind, exponent, difference, difference.excludes(0.0)))
        at = tuple(min(one.ranges[axis][1], other.ranges[axis][1]) for axis in one.ranges)
        (value, drawn), (value2, drawn2) = one.predict(*at), other.predict(*at)
        a, b = _paired(drawn[:, 0], drawn2[:, 0], rng)
        ratio = Interval.of(float(value[0] / value2[0]), a / b, one.settings)
        below = tuple(
            name
            for name, fit in ((first, one), (second, other))
            if any(x < low for x, (low, _) in zip(at, fit.ranges.values(), strict=True))
        )
        found.append(Comparison(first, second, one.kind, "loss", ratio, ratio.excludes(1.0), at, below))
    return found


def _paired(one: Array, other: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    number = min(len(one), len(other))
    return rng.permutation(one)[:number], rng.permutation(other)[:number]


def _difference(one: LawFit, other: LawFit, exponent: str, rng: np.random.Generator) -> Interval:
    a, b = _paired(one.replicates[exponent], other.replicates[exponent], rng)
    return Interval.of(one.estimates[exponent].value - other.estimates[exponent].value, a - b, one.settings)


@dataclass(frozen=True)
class VariantFit:
    """Fits of one variant of a study.

    Attributes:
        points: the runs fitted.
        frontier: those that the law of compute was fitted to.
        joint, power: L = E + A N^-α + B D^-β, and L = E + F C^-γ on the frontier, where there are points enough.
        isoflop: where a budget was spent on three sizes or more.
        gamma_difference: γ of the frontier less αβ/(α+β); None without both.
        notes: which fits are missing and why, and caveats.
    """

    points: Points = field(repr=False)
    frontier: Points = field(repr=False)
    joint: LawFit | None
    power: LawFit | None
    isoflop: IsoFlop | None
    gamma_difference: Interval | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class StudyFit:
    """Fits of each variant of a study, in the order of the records, and comparisons of every pair of variants."""

    records: tuple[Record, ...] = field(repr=False)
    metric: str
    settings: FitSettings
    variants: Mapping[str, VariantFit]
    comparisons: tuple[Comparison, ...]


def fit_study(
    folder: str | os.PathLike[str], metric: str = "forces_mae", settings: FitSettings | None = None
) -> StudyFit:
    """Fits every law that the records in the folder of a study allow, to one of their metrics.

    Raises:
        DataError: records that cannot be read, a metric that none holds, or too few points for any law.
    """
    settings = settings or FitSettings()
    records = read_records(folder)
    known = sorted({name for record in records for name in record.losses})
    if metric not in known:
        raise DataError(f"{folder}: no record holds {metric!r}: use --metric with one of {', '.join(known) or 'none'}")
    fits = {
        name: fit_variant(group, metric, replace(settings, seed=settings.seed + number))
        for number, (name, group) in enumerate(variants(records).items())
    }
    if all(one.joint is None and one.power is None and one.isoflop is None for one in fits.values()):
        reasons = "; ".join(dict.fromkeys(note for one in fits.values() for note in one.notes))
        raise DataError(f"{folder}: nothing can be fitted: {reasons}")
    joint = compare({name: one.joint for name, one in fits.items() if one.joint is not None})
    power = compare({name: one.power for name, one in fits.items() if one.power is not None})
    return StudyFit(records, metric, settings, fits, (*joint, *power))


def fit_variant(records: Sequence[Record], metric: str, settings: FitSettings) -> VariantFit:
    """Fits every law that the records of one variant allow; notes give the reasons for those that are missing."""
    rows = [(one.parameters, one.structures, one.flops, one.losses[metric]) for one in records if metric in one.losses]
    points = Points(*np.array(rows, dtype=np.float64).reshape(-1, 4).T)
    notes = []
    if len(rows) < len(records):
        notes.append(f"{len(records) - len(rows)} of {len(records)} runs have no {metric} and are left out")
    best = frontier(points)
    joint = _law("joint", [points.N, points.D], points.loss, settings, notes)
    power = _law("power", [best.C], best.loss, settings, notes)
    difference = None
    if joint is not None and power is not None:
        difference = _difference(power, joint, "gamma", np.random.default_rng([settings.seed, 4]))
        if difference.excludes(0.0):
            notes.append(
                "γ of the frontier and αβ/(α+β) differ: sizes and data on the frontier are not the best for their "
                "compute, compute is not proportional to N D, or a law does not hold"
            )
    return VariantFit(points, best, joint, power, fit_isoflop(points, settings), difference, tuple(notes))


def _law(kind: str, inputs: list[Array], losses: Array, settings: FitSettings, notes: list[str]) -> LawFit | None:
    try:
        fit = fit_law(kind, inputs, losses, settings, leave_out=True)
    except DataError as error:
        notes.append(f"{'law of N and D' if kind == 'joint' else 'law of compute'} not fitted: {error}")
        return None
    if kind == "joint" or not fit.lack_of_fit.flagged:
        return fit
    text = (  # a frontier is chosen, so that a misfit does not condemn the law itself
        f"points of the frontier lie off the law by more than the noise (F test, p = {fit.lack_of_fit.p_value:.2g}): "
        "their sizes and data are not all the best for their compute (a grid gives a staircase), or the law does not "
        "hold"
    )
    return replace(fit, lack_of_fit=replace(fit.lack_of_fit, text=text))
