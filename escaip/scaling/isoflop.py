"""IsoFLOP curves: the best size and data for each compute budget, and how they grow with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from escaip.errors import DataError, UsageError
from escaip.scaling.laws import FitSettings, Interval
from escaip.scaling.solver import Array

TOLERANCE = 0.08
"""Budgets count as equal if C differs by no more than this much from the mean of their group."""


@dataclass(frozen=True)
class Parabola:
    """``log L = a + b u + c u²``, ``u = log N``, through the runs of one budget.

    Attributes:
        flops: geometric mean C of the runs.
        sizes: lowest and highest N.
        num_runs: runs.
        best_parameters, best_structures, best_loss: N*, D* and L* at the minimum; None where it is refused.
        coefficients: ``(c, b, a)`` of the parabola in ``u − mean u``; empty where there is none.
        center: mean of u.
        text: in words.
    """

    flops: float
    sizes: tuple[float, float]
    num_runs: int
    best_parameters: Interval | None
    best_structures: Interval | None
    best_loss: Interval | None
    coefficients: tuple[float, ...]
    center: float
    text: str


@dataclass(frozen=True)
class IsoFlop:
    """Parabolas of all budgets, and ``N* ∝ C^a``, ``D* ∝ C^b`` through their minima.

    Attributes:
        parabolas: by rising C.
        size_exponent, data_exponent: a and b; None with fewer than two minima.
        warnings: in words.
    """

    parabolas: tuple[Parabola, ...]
    size_exponent: Interval | None
    data_exponent: Interval | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Group:
    """Runs of one budget."""

    flops: float
    u: Array
    v: Array
    y: Array
    center: float

    @property
    def levels(self) -> int:
        return len(np.unique(np.round(self.u, 6)))

    def design(self) -> Array:
        """``(n, 3)``: u², u, 1."""
        return np.vander(self.u - self.center, 3)

    def data_at(self, u: Array) -> Array:
        """Logarithms of D at log N, along the line that the runs of the budget lie on."""
        slope, constant = np.polyfit(self.u - self.center, self.v, 1)
        found: Array = slope * (u - self.center) + constant
        return found


def budgets(flops: ArrayLike, tolerance: float = TOLERANCE) -> list[np.ndarray]:
    """Returns indices of runs of nearly equal C, by rising C; a chain of small differences is not followed.

    Raises:
        UsageError: a tolerance that is not between 0 and 0.5.
    """
    if not 0 < tolerance < 0.5:
        raise UsageError(f"tolerance is {tolerance}: give a fraction of C, such as {TOLERANCE}")
    logs = np.log(np.asarray(flops, dtype=np.float64))
    order = np.argsort(logs, kind="stable")
    found: list[list[int]] = []
    for index in order:
        # Every run of a group lies within the tolerance of its middle, so no two differ by more than twice that.
        if found and logs[index] - logs[found[-1][0]] <= 2 * np.log1p(tolerance):
            found[-1].append(int(index))
        else:
            found.append([int(index)])
    return [np.array(group) for group in found]


def is_isoflop(flops: ArrayLike, parameters: ArrayLike, tolerance: float = TOLERANCE) -> bool:
    """Whether some budget was spent on three sizes or more."""
    sizes = np.asarray(parameters, dtype=np.float64)
    return any(len(np.unique(sizes[group])) >= 3 for group in budgets(flops, tolerance))


def fit_isoflop(
    flops: ArrayLike,
    parameters: ArrayLike,
    structures: ArrayLike,
    losses: ArrayLike,
    settings: FitSettings | None = None,
    tolerance: float = TOLERANCE,
) -> IsoFlop:
    """Fits the parabola of every budget that holds three sizes or more (Hoffmann et al., arXiv:2203.15556, approach 2).

    Least squares in log L. Intervals are percentiles of fits to the parabolas plus normal residuals; their scale is
    that of the residuals of all budgets together, divided by a root of ``χ²_ν/ν`` as in
    :mod:`escaip.scaling.resampling`. D* is what the runs of the budget have at N*, on their line of log D over log N.
    The exponents are slopes of straight lines through the minima, which must lie inside the sampled sizes.

    Args:
        flops: ``(n,)`` C of each run.
        parameters: ``(n,)`` N.
        structures: ``(n,)`` D.
        losses: ``(n,)`` positive.
        settings: number of refits, level and seed.
        tolerance: by which C of a budget may differ from its mean, as a fraction.

    Raises:
        DataError: no budget holds three sizes.
        UsageError: the tolerance.
    """
    settings = settings or FitSettings()
    c, n, d, loss = (np.asarray(one, dtype=np.float64) for one in (flops, parameters, structures, losses))
    groups = []
    for chosen in budgets(c, tolerance):
        u = np.log(n[chosen])
        group = _Group(
            float(np.exp(np.log(c[chosen]).mean())), u, np.log(d[chosen]), np.log(loss[chosen]), float(u.mean())
        )
        if group.levels >= 3:
            groups.append(group)
    if not groups:
        raise DataError(
            f"no budget holds three sizes within {100 * tolerance:g} %: plan IsoFLOP runs, or widen the tolerance"
        )
    rng = np.random.default_rng([settings.seed, 2])
    freedom = sum(len(group.y) - 3 for group in groups)
    scale = np.zeros(settings.bootstrap)
    if freedom > 0:
        squares = sum(float((_residuals(group) ** 2).sum()) for group in groups)
        scale = np.sqrt(squares / rng.chisquare(freedom, size=settings.bootstrap))
    fitted = [_parabola(group, scale, freedom > 0, settings.level, rng) for group in groups]
    return _exponents(fitted, freedom, settings.level)


def _residuals(group: _Group) -> Array:
    design = group.design()
    found: Array = group.y - design @ np.linalg.lstsq(design, group.y, rcond=None)[0]
    return found


def _parabola(
    group: _Group, scale: Array, known: bool, level: float, rng: np.random.Generator
) -> tuple[Parabola, Array, Array]:
    """The fit, and ``(R,)`` log N* and log D* of the refits, NaN where these have no minimum."""
    design = group.design()
    inverse = np.linalg.pinv(design)
    best = inverse @ group.y
    drawn = design @ best + scale[:, None] * rng.standard_normal((len(scale), len(group.y)))
    refitted = drawn @ inverse.T if known else np.empty((0, 3))
    sizes = (float(np.exp(group.u.min())), float(np.exp(group.u.max())))
    name = f"budget {group.flops:.3g} FLOPs"
    at = group.center - best[1] / (2 * best[0]) if best[0] > 0 else np.nan
    nothing = np.full(len(refitted), np.nan)
    common = {
        "flops": group.flops, "sizes": sizes, "num_runs": len(group.y), "center": group.center,
        "coefficients": tuple(float(one) for one in best),
    }  # fmt: skip
    if not group.u.min() < at < group.u.max():
        side = "larger" if _falls_at_the_end(best, group) else "smaller"
        why = (
            "the curve has no minimum"
            if not best[0] > 0
            else f"its minimum lies outside of N {sizes[0]:.3g} to {sizes[1]:.3g}"
        )
        text = f"{name}: refused, {why}: add {side} models at this budget"
        none = Parabola(best_parameters=None, best_structures=None, best_loss=None, text=text, **common)  # type: ignore[arg-type]
        return none, nothing, nothing
    with np.errstate(divide="ignore", invalid="ignore"):
        places = np.where(refitted[:, 0] > 0, group.center - refitted[:, 1] / (2 * refitted[:, 0]), np.nan)
        depths = refitted[:, 2] - refitted[:, 1] ** 2 / (4 * refitted[:, 0])
    depth = best[2] - best[1] ** 2 / (4 * best[0])
    data = group.data_at(places)
    size = Interval.of(float(np.exp(at)), np.exp(places), level)
    parabola = Parabola(
        best_parameters=size,
        best_structures=Interval.of(float(np.exp(group.data_at(np.array([at]))[0])), np.exp(data), level),
        best_loss=Interval.of(float(np.exp(depth)), np.where(refitted[:, 0] > 0, np.exp(depths), np.nan), level),
        text=f"{name}: best size {size.value:.3g} of {sizes[0]:.3g} to {sizes[1]:.3g}",
        **common,  # type: ignore[arg-type]
    )
    return parabola, places, data


def _falls_at_the_end(best: Array, group: _Group) -> bool:
    low, high = (float(np.polyval(best, u - group.center)) for u in (group.u.min(), group.u.max()))
    return high < low


def _exponents(fitted: list[tuple[Parabola, Array, Array]], freedom: int, level: float) -> IsoFlop:
    warnings = [one.text for one, _, _ in fitted if one.best_parameters is None]
    if freedom == 0:
        warnings.append("three runs in each budget: nothing is left to tell the noise from, no intervals")
    usable = [each for each in fitted if each[0].best_parameters is not None]
    parabolas = tuple(one for one, _, _ in fitted)
    if len(usable) < 2:
        warnings.append("fewer than two budgets have a minimum inside their sizes: no exponents of N* and D*")
        return IsoFlop(parabolas, None, None, tuple(warnings))
    logs = np.log([one.flops for one, _, _ in usable])
    line = np.linalg.pinv(np.vander(logs - logs.mean(), 2))[0]
    sizes, data = [one for _, one, _ in usable], [one for _, _, one in usable]
    found = []
    for attribute, drawn in (("best_parameters", sizes), ("best_structures", data)):
        values = np.log([getattr(one, attribute).value for one, _, _ in usable])
        slopes = line @ np.stack(drawn)
        found.append(Interval.of(float(line @ values), slopes, level))
        lost = float(np.mean(~np.isfinite(slopes))) if len(slopes) else 0.0
    if lost > 0.05:
        warnings.append(
            f"{100 * lost:.0f} % of the refits have a budget without a minimum: a and b are hardly determined"
        )
    if len(usable) == 2:
        warnings.append("two budgets only: N* and D* need not follow a power law")
    for name, one, axis in (("a", found[0], "N*"), ("b", found[1], "D*")):
        if one.low <= 0 <= one.high:
            warnings.append(
                f"the {100 * level:g} % interval of {name} covers zero: not shown that {axis} grows with compute"
            )
    return IsoFlop(parabolas, found[0], found[1], tuple(warnings))
