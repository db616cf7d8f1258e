"""Fits of scaling laws: L = E + A N^-α + B D^-β over sizes and data, L = E + F C^-γ over compute.

log L is fitted with Huber's loss (δ = 1e-3, Hoffmann et al., arXiv:2203.15556, section 3.3) from a grid of starts.
Where seeds differ by more than δ this is close to the fit of least absolute residuals: an outlier has little effect,
and intervals are about a quarter wider than those of least squares (``huber=1`` or more).

Intervals are percentiles of refits (parametric bootstrap; Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13). Each refit is made to the fitted law plus a normal displacement of log L of every cell, the runs of equal N
and D. The displacements have the spread of the mean residuals of cells over ``ν = cells − parameters`` degrees of
freedom, divided by the root of a drawn ``χ²_ν/ν``: percentiles are then those of Student's t where the law is linear in
its parameters. The spread contains what all seeds of a cell share, such as a learning rate that suits one size less
well. Where E = 0 is not refuted (F test, 5 %) the law with E = 0 is refitted as well, and intervals hold both sets of
refits: a fit whose E is above zero by chance has exponents that are too large. benchmarks/scaling_recovery.py measures
how often intervals hold the truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeResult, least_squares
from scipy.special import huber
from scipy.stats import f as f_distribution

from escaip.errors import DataError, UsageError

Array = NDArray[np.float64]

AXES = {"joint": ("N", "D"), "power": ("C",)}
"""Inputs of each law."""
_EXPONENTS = {"joint": ("alpha", "beta"), "power": ("gamma",)}
_HEADS = {"joint": ("A", "B"), "power": ("F",)}
_BOUNDS = (-1.0, 3.0)  # of exponents: below zero, so that an interval can cover zero
_ZERO_FLOOR = 0.01  # an E below this fraction of the lowest loss counts as zero
_SIGNIFICANT = 0.05
_LEAST_SQUARES = 1e3  # δ that no residual reaches
_FEWEST_FREE = 3  # degrees of freedom below which the noise of cells is taken from their seeds as well


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Attributes:
        huber: δ of Huber's loss in log L.
        bootstrap: number of refits that intervals are taken from.
        level: probability with which an interval is to hold the truth.
        floor: whether losses end at an E ≥ 0; without it E = 0.

    Raises:
        UsageError: a value is out of its range.
    """

    huber: float = 1e-3
    bootstrap: int = 1000
    level: float = 0.9
    seed: int = 0
    floor: bool = True

    def __post_init__(self) -> None:
        for name, usable, remedy in (
            ("huber", math.isfinite(self.huber) and self.huber > 0, "a number above 0, such as 1e-3"),
            ("bootstrap", self.bootstrap >= 50, "at least 50, better 1000"),
            ("level", 0.5 <= self.level < 1, "a probability from 0.5 to below 1, such as 0.9"),
            ("seed", self.seed >= 0, "a number from 0 on"),
        ):
            if not usable:
                raise UsageError(f"{name} is {getattr(self, name)}: give {remedy}")

    @property
    def percentiles(self) -> tuple[float, float]:
        """Lower and upper end of an interval as fractions."""
        return 0.5 - self.level / 2, 0.5 + self.level / 2


class Interval(NamedTuple):
    """A best fit and the ends of its interval, NaN where the noise is not known."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, replicates: Array, settings: FitSettings, groups: int = 1) -> Interval:
        """Takes percentiles of the finite ``replicates (R,)``, of each of several equal groups, and their union."""
        parts = [part[np.isfinite(part)] for part in np.split(replicates, groups)]
        if any(len(part) == 0 for part in parts):
            return cls(value, math.nan, math.nan)
        low, high = np.array([np.quantile(part, settings.percentiles) for part in parts]).T
        return cls(value, float(low.min()), float(high.max()))

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    def covers(self, value: float) -> bool:
        return self.low <= value <= self.high

    def excludes(self, value: float) -> bool:
        return value < self.low or value > self.high  # neither where there is no interval


@dataclass(frozen=True)
class Cells:
    """Runs grouped by equal inputs: ``index (n,)`` cell of each run, ``first (C,)`` a run of each, ``counts (C,)``."""

    index: NDArray[np.int64]
    first: NDArray[np.int64]
    counts: Array

    @classmethod
    def of(cls, inputs: Array) -> Cells:
        """Groups ``inputs (K, n)``; values that differ by less than a millionth are equal."""
        keys = np.round(np.log(inputs), 6)
        _, first, index = np.unique(keys, axis=1, return_index=True, return_inverse=True)
        index = index.reshape(-1)
        return cls(index, first, np.bincount(index).astype(np.float64))

    def means(self, values: Array) -> Array:
        """Returns the means ``(C,)`` of ``values (n,)`` over the runs of each cell."""
        return np.bincount(self.index, weights=values) / self.counts

    def sums_of_squares(self, residuals: Array) -> tuple[float, float]:
        """Splits the squares of ``residuals (n,)`` into those of cell means and those of runs about them."""
        means = self.means(residuals)
        return float((self.counts * means**2).sum()), float(((residuals - means[self.index]) ** 2).sum())


@dataclass(frozen=True)
class Noise:
    """Noise of log L about a law.

    Attributes:
        run: standard deviation of a single run; that of the mean of m seeds is ``run/√m``.
        freedom: degrees of freedom of ``run``; 0 where the noise is not known.
        seeds: standard deviation between seeds of the same cell; None where each cell has one seed.
    """

    run: float
    freedom: int
    seeds: float | None

    @classmethod
    def of(cls, residuals: Array, cells: Cells, num_parameters: int) -> Noise:
        """Estimates the noise from ``residuals (n,)`` of all runs."""
        num_runs, num_cells = len(residuals), len(cells.first)
        between, within = cells.sums_of_squares(residuals)
        seeds = math.sqrt(within / (num_runs - num_cells)) if num_runs > num_cells else None
        freedom = num_cells - num_parameters
        if freedom < _FEWEST_FREE:
            between, freedom = between + within, num_runs - num_parameters
        return cls(math.sqrt(between / freedom) if freedom > 0 else 0.0, freedom, seeds)

    def draw(self, number: int, counts: Array, rng: np.random.Generator) -> Array:
        """Returns ``number`` displacements ``(number, C)`` of means of ``counts (C,)`` seeds."""
        inflation = np.sqrt(self.freedom / rng.chisquare(self.freedom, size=(number, 1)))
        return self.run * inflation * rng.standard_normal((number, len(counts))) / np.sqrt(counts)


@dataclass(frozen=True)
class SumOfPowers:
    """The law ``L = e L_min + Σ_k exp(h_k − p_k (log x_k − m_k))``, with ``m_k`` the mean of ``log x_k``.

    A vector of parameters is ``(h_1 … h_K, p_1 … p_K[, e])``.

    Attributes:
        center: ``(K, 1)`` ``m_k``.
        lowest: ``L_min``, the lowest loss.
        floor: whether the law has an E.
        lower, upper: ``(P,)`` bounds of the parameters.
    """

    center: Array
    lowest: float
    floor: bool
    lower: Array
    upper: Array

    @classmethod
    def of(cls, x: Array, y: Array, floor: bool) -> SumOfPowers:
        """Makes the law for inputs ``x (K, n)`` and ``y = log L (n,)``, which set center and bounds."""
        heads = np.array([[y.min() - 8.0] * len(x), [y.max() + 1.0] * len(x)])
        powers = np.repeat(np.array(_BOUNDS)[:, None], len(x), axis=1)
        ends = np.array([[0.0], [1.0]])[:, : int(floor)]
        lower, upper = np.concatenate([heads, powers, ends], axis=1)
        return cls(np.log(x).mean(axis=1, keepdims=True), float(np.exp(y.min())), floor, lower, upper)

    @property
    def num_parameters(self) -> int:
        return len(self.lower)

    def value(self, parameters: Array, logs: Array) -> Array:
        """Returns log L ``(…, n)`` of ``parameters (…, P)`` at ``logs = log x − center (K, n)``."""
        return np.logaddexp.reduce(self._terms(parameters, logs), axis=-2)

    def jacobian(self, parameters: Array, logs: Array) -> Array:
        """Returns the derivatives ``(…, n, P)`` of log L by ``parameters (…, P)``."""
        terms, num_inputs = self._terms(parameters, logs), len(logs)
        value = np.logaddexp.reduce(terms, axis=-2)[..., None, :]
        shares = np.exp(terms[..., :num_inputs, :] - value)
        floor = self.lowest * np.exp(-value)[..., : int(self.floor), :]
        return np.concatenate([shares, -shares * logs, floor], axis=-2).swapaxes(-1, -2)

    def _terms(self, parameters: Array, logs: Array) -> Array:
        """Logarithms ``(…, K[+1], n)`` of the terms of the sum."""
        num_inputs = len(logs)
        terms = parameters[..., :num_inputs, None] - parameters[..., num_inputs : 2 * num_inputs, None] * logs
        if not self.floor:
            return terms
        constant = np.log(np.maximum(parameters[..., -1:, None] * self.lowest, 1e-300))
        return np.concatenate([terms, np.broadcast_to(constant, (*terms.shape[:-2], 1, logs.shape[1]))], axis=-2)

    def starts(self, y: Array) -> Array:
        """Returns a grid of parameters ``(S, P)`` over exponents, E, and shares of the terms in the median loss."""
        num_inputs, middle = len(self.center), float(np.exp(np.median(y)))
        constants = (0.05, 0.5, 0.9) if self.floor else (0.0,)
        firsts = (0.25, 0.75) if num_inputs == 2 else (1.0,)
        found = []
        for constant, first, *powers in product(constants, firsts, *[(0.15, 0.5)] * num_inputs):
            shares = np.array([first, 1.0 - first][:num_inputs])
            heads = np.log(shares * (middle - constant * self.lowest) + 1e-3 * middle)
            found.append([*heads, *powers[::-1], *[constant] * self.floor])
        return np.clip(np.array(found), self.lower, self.upper)

    def best(self, logs: Array, y: Array, delta: float) -> Array:
        """Fits ``y (n,)`` from the grid: roughly from all starts, then to the end from the best few that differ."""

        def minimize(start: Array, delta: float, tolerance: float) -> OptimizeResult:
            return least_squares(
                lambda one: self.value(one, logs) - y, start, lambda one: self.jacobian(one, logs), loss="huber",
                bounds=(self.lower, self.upper), f_scale=delta, ftol=tolerance, xtol=tolerance, gtol=None, max_nfev=300,
            )  # fmt: skip

        wide = max(delta, 0.3)
        rough = self.descend(logs, y, self.starts(y), wide)
        kept: list[Array] = []
        for one in rough[np.argsort(huber(wide, self.value(rough, logs) - y).sum(axis=1))]:
            if all(np.abs(one - other).max() > 0.05 for other in kept):
                kept.append(one)
        fine = [minimize(minimize(start, max(delta, 0.05), 1e-3).x, delta, 1e-9) for start in kept[:3]]
        return min(fine, key=lambda result: float(result.cost)).x

    def descend(self, logs: Array, y: Array, start: Array, delta: float) -> Array:
        """Fits ``y (R or 1, n)`` from ``start (R, P)`` side by side, twenty times as fast as one after the other.

        Levenberg-Marquardt steps are taken on the parabola that bounds Huber's loss from above at the present
        residuals, with weights ``min(1, δ/|r|)``; a parameter that pushes against its bound is held.
        """
        at, damping = start.copy(), np.full(len(start), 1e-3)
        residuals = self.value(at, logs) - y
        cost, quiet = huber(delta, residuals).sum(axis=1), np.zeros(len(start))
        for _ in range(60):
            jacobian, weights = self.jacobian(at, logs), np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
            gradient = np.einsum("rnp,rn->rp", jacobian, weights * residuals)
            free = ~(((at <= self.lower) & (gradient > 0)) | ((at >= self.upper) & (gradient < 0)))
            jacobian *= free[:, None, :]
            normal = (jacobian * weights[:, :, None]).swapaxes(1, 2) @ jacobian
            diagonal = np.einsum("rpp->rp", normal)  # a view
            diagonal += damping[:, None] * np.maximum(diagonal, 1e-6 * diagonal.max(axis=1, keepdims=True) + 1e-12)
            diagonal += ~free
            step = np.linalg.solve(normal, (gradient * free)[:, :, None])[:, :, 0]
            trial = np.clip(at - step, self.lower, self.upper)
            reached = self.value(trial, logs) - y
            gain = cost - huber(delta, reached).sum(axis=1)
            better = gain > 0
            quiet = np.where(gain > 1e-7 * cost, 0, quiet + 1)
            at[better], residuals[better], cost[better] = trial[better], reached[better], (cost - gain)[better]
            damping = np.where(better, np.maximum(0.2 * damping, 1e-9), np.minimum(6.0 * damping, 1e8))
            if (quiet > 2).all():
                break
        return at

    def refit(self, logs: Array, best: Array, cells: Cells, noise: Noise, settings: FitSettings, seed: int) -> Array:
        """Returns the parameters ``(R, P)`` of refits to the law with drawn noise; R = 0 where it is not known."""
        if noise.freedom == 0:
            return np.empty((0, self.num_parameters))
        drawn = noise.draw(settings.bootstrap, cells.counts, np.random.default_rng(seed))
        y = (self.value(best, logs[:, cells.first]) + drawn)[:, cells.index]
        return self.descend(logs, y, np.repeat(best[None], len(y), axis=0), settings.huber)


@dataclass(frozen=True)
class LackOfFit:
    """Test of a law against the noise of seeds, flagged where the law does not describe the points (5 %).

    Attributes:
        p_value: probability of a misfit as large if the law were true; NaN where the test is not possible.
        misfit: standard deviation of log L of cells about the law, less the noise of seeds.
    """

    p_value: float
    misfit: float
    flagged: bool
    text: str


@dataclass(frozen=True)
class LeftOut:
    """Prediction of the runs at the largest N, D or C by the law fitted to all other runs.

    Geometric means of their losses, the predicted one with noise; NaN where the others are too few.
    """

    axis: str
    predicted: Interval
    observed: float
    text: str


@dataclass(frozen=True)
class LawFit:
    """A fitted law.

    Attributes:
        kind: ``joint``, of N and D, or ``power``, of C.
        estimates: ``E, alpha, A, beta, B, gamma`` (joint; ``gamma = αβ/(α+β)`` is the exponent of compute at the best N
            and D if compute is proportional to N D) or ``E, gamma, F`` (power). E and A N^-α have the unit of the loss.
        replicates: name to ``(R,)`` values of the refits; where E = 0 is not refuted, as many with E = 0 follow.
        without_floor: exponents of the fit with E = 0; empty where E was fixed to zero.
        floor_p_value: of E = 0, by an F test; NaN where E was fixed or the noise is not known.
        num_points: number of distinct inputs.
        ranges: input to lowest and highest value.
        left_out: predictions of the largest runs, where they were asked for.
    """

    kind: str
    estimates: Mapping[str, Interval]
    replicates: Mapping[str, Array] = field(repr=False)
    without_floor: Mapping[str, float]
    floor_p_value: float
    noise: Noise
    num_runs: int
    num_points: int
    ranges: Mapping[str, tuple[float, float]]
    lack_of_fit: LackOfFit
    settings: FitSettings = field(repr=False)
    warnings: tuple[str, ...]
    _law: SumOfPowers = field(repr=False)
    _parameters: Array = field(repr=False)
    _refits: Array = field(repr=False)
    left_out: tuple[LeftOut, ...] = ()

    def predict(self, *inputs: ArrayLike) -> tuple[Array, Array]:
        """Evaluates the law at N and D, or at C, each ``(m,)``.

        Returns:
            losses ``(m,)`` of the fit and ``(R, m)`` of the refits; the noise of a run is in neither.
        """
        x = np.stack([np.atleast_1d(np.asarray(one, dtype=np.float64)) for one in inputs])
        logs = np.log(x) - self._law.center
        return np.exp(self._law.value(self._parameters, logs)), np.exp(self._law.value(self._refits, logs))


def fit_law(
    kind: str, inputs: Sequence[ArrayLike], losses: ArrayLike, settings: FitSettings | None = None, *,
    leave_out: bool = False,
) -> LawFit:  # fmt: skip
    """Fits ``L = E + A N^-α + B D^-β`` (``joint``) or ``L = E + F C^-γ`` (``power``).

    Args:
        kind: ``joint`` or ``power``.
        inputs: N and D, or C, each ``(n,)``, positive.
        losses: ``(n,)``, positive; runs of equal inputs are seeds of one cell.
        settings: default δ = 1e-3 and 1000 refits at 90 %.
        leave_out: also fit all but the largest N, then all but the largest D (or C), and predict those left out.

    Raises:
        DataError: fewer distinct points than parameters, values that are not positive, or an input that never varies.
    """
    settings = settings or FitSettings()
    x, y, cells = _check_points(kind, inputs, losses, settings.floor)
    law = SumOfPowers.of(x, y, settings.floor)
    logs = np.log(x) - law.center
    best = law.best(logs, y, settings.huber)
    noise = Noise.of(law.value(best, logs) - y, cells, law.num_parameters)
    drawn = law.refit(logs, best, cells, noise, settings, settings.seed)
    without: dict[str, float] = {}
    p_value, groups, squares = math.nan, 1, _squares(law, logs, y, cells)
    if settings.floor:
        bare = SumOfPowers.of(x, y, False)
        bare_best = bare.best(logs, y, settings.huber)
        found = _named(kind, bare, bare_best[None])
        without = {name: float(found[name][0]) for name in ("alpha", "beta", "gamma") if name in found}
        free, left = len(cells.first) - law.num_parameters, squares[1]
        if free > 0:  # the squares of cell means that E takes away over those that are left
            gain = _squares(bare, logs, y, cells)[1] - left
            p_value = float(f_distribution.sf(gain / max(left / free, 1e-300), 1, free))
        if len(drawn) and not p_value < _SIGNIFICANT:
            more = bare.refit(logs, bare_best, cells, noise, settings, settings.seed + 1)
            drawn, groups = np.concatenate([drawn, np.pad(more, ((0, 0), (0, 1)))]), 2
    values, replicates = _named(kind, law, best[None]), _named(kind, law, drawn)
    estimates = {name: Interval.of(float(one[0]), replicates[name], settings, groups) for name, one in values.items()}
    return LawFit(
        kind=kind, estimates=estimates, replicates=replicates, without_floor=without, floor_p_value=p_value,
        noise=noise, num_runs=len(y), num_points=len(cells.first),
        ranges={name: (float(row.min()), float(row.max())) for name, row in zip(AXES[kind], x, strict=True)},
        lack_of_fit=_lack_of_fit(kind, x, cells, law, squares), settings=settings,
        warnings=_warnings(kind, estimates, drawn, noise, without, settings), _law=law, _parameters=best,
        _refits=drawn,
        left_out=tuple(_left_out(kind, k, x, y, cells, settings) for k in range(len(x))) if leave_out else (),
    )  # fmt: skip


def _check_points(kind: str, inputs: Sequence[ArrayLike], losses: ArrayLike, floor: bool) -> tuple[Array, Array, Cells]:
    """Returns inputs ``(K, n)``, log L ``(n,)`` and their cells, or raises the errors of ``fit_law``."""
    x, losses = np.array(inputs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(losses) == 0:
        raise DataError("no points to fit: name a metric that the records hold")
    for name, values in zip((*AXES[kind], "losses"), (*x, losses), strict=True):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise DataError(f"{name} must be positive numbers: leave other points out")
    y = np.log(losses)
    cells, needed = Cells.of(x), 2 * len(x) + floor
    if len(cells.first) < needed:
        raise DataError(
            f"{len(cells.first)} distinct points ({', '.join(AXES[kind])}) for a law of {needed} parameters: add "
            f"{needed - len(cells.first)} or more{', or fix E = 0 (--no-floor)' if floor else ''}; seeds do not count"
        )
    for name, values in zip(AXES[kind], x, strict=True):
        if len(np.unique(np.round(np.log(values), 6))) < 2:
            raise DataError(f"{name} is {values[0]:g} in every run: its exponent needs at least two values of it")
    return x, y, cells


def _named(kind: str, law: SumOfPowers, parameters: Array) -> dict[str, Array]:
    """Turns ``parameters (R, P)`` into the values ``(R,)`` of each name of the law."""
    num_inputs = len(AXES[kind])
    exponents = parameters[:, num_inputs : 2 * num_inputs]
    heads = np.exp(np.clip(parameters[:, :num_inputs] + exponents * law.center.T, -700.0, 700.0))
    floor = parameters[:, -1] if law.floor else np.zeros(len(parameters))
    found = {"E": np.where(floor < _ZERO_FLOOR, 0.0, floor * law.lowest)}
    for index, (exponent, head) in enumerate(zip(_EXPONENTS[kind], _HEADS[kind], strict=True)):
        found[exponent], found[head] = exponents[:, index], heads[:, index]
    if kind == "joint":  # where one of the two inputs does not help, compute spent on both does not either
        alpha, beta = np.maximum(found["alpha"], 0.0), np.maximum(found["beta"], 0.0)
        found["gamma"] = alpha * beta / np.maximum(alpha + beta, 1e-12)
    return found


def _squares(law: SumOfPowers, logs: Array, y: Array, cells: Cells) -> tuple[Array, float, float]:
    """Fits by least squares: mean residuals of cells ``(C,)``, their sum of squares, and that of runs about them."""
    residuals = y - law.value(law.best(logs, y, _LEAST_SQUARES), logs)
    return cells.means(residuals), *cells.sums_of_squares(residuals)


def _lack_of_fit(kind: str, x: Array, cells: Cells, law: SumOfPowers, squares: tuple[Array, float, float]) -> LackOfFit:
    """Tests a law against the noise of seeds, and so finds plateaus, exponents that change and sizes trained badly.

    ``F = [Σ m_c (ȳ_c − f_c)²/(C − p)] / [Σ (y − ȳ_c)²/(n − C)]`` of the fit by least squares (Draper and Smith, Applied
    Regression Analysis, section 2.1), with mean losses ``ȳ_c`` of C cells of ``m_c`` seeds and p parameters. A plateau
    along N alone is not found where D still helps: it is a law with a large E and a steep α.
    """
    means, between, within = squares
    free, seed_free = len(cells.first) - law.num_parameters, x.shape[1] - len(cells.first)
    if free < 1 or seed_free < 2:
        reason = "as many points as parameters" if free < 1 else "points of one seed each: run two or more"
        return LackOfFit(math.nan, math.nan, False, f"the law is not tested: {reason}")
    noise = within / seed_free
    p_value = float(f_distribution.sf(between / free / max(noise, 1e-300), free, seed_free))
    misfit = math.sqrt(max(between / free - noise, 0.0) / cells.counts.mean())
    if p_value >= _SIGNIFICANT:
        return LackOfFit(p_value, misfit, False, f"the law fits within the noise of seeds (F test, p = {p_value:.2g})")
    points = x[:, cells.first]
    at_largest = [float(means[row >= row.max() * (1 - 1e-6)].mean()) for row in points]
    worst = int(np.argmax(np.abs(at_largest)))
    side = "above: losses stop falling" if at_largest[worst] > 0 else "below: losses fall faster"
    text = (
        f"the law does NOT fit: points lie {100 * misfit:.2g} % off it beyond the noise of seeds (F test, p = "
        f"{p_value:.2g}): at the largest {AXES[kind][worst]}, {points[worst].max():.3g}, they lie "
        f"{100 * abs(at_largest[worst]):.2g} % {side}; do not extrapolate"
    )
    return LackOfFit(p_value, misfit, True, text)


def _left_out(kind: str, axis: int, x: Array, y: Array, cells: Cells, settings: FitSettings) -> LeftOut:
    name, largest = AXES[kind][axis], float(x[axis].max())
    out = x[axis] >= largest * (1 - 1e-6)
    left = np.unique(cells.index[out])
    observed = float(np.exp(cells.means(y)[left].mean()))
    words = f"largest {name} ({largest:.3g}) left out"
    try:
        fit = fit_law(kind, list(x[:, ~out]), np.exp(y[~out]), settings)
    except DataError:
        text = f"{words}: too few points remain for a law of {2 * len(x) + settings.floor} parameters"
        return LeftOut(name, Interval(math.nan, math.nan, math.nan), observed, text)
    value, refits = fit.predict(*x[:, cells.first[left]])
    drawn = np.log(refits)
    if len(drawn):
        drawn += fit.noise.draw(len(drawn), cells.counts[left], np.random.default_rng([settings.seed, axis, 1]))
    predicted = Interval.of(float(np.exp(np.log(value).mean())), np.exp(drawn.mean(axis=1)), settings)
    ends = f"({predicted.low:.4g} to {predicted.high:.4g})" if predicted.known else "(no interval)"
    error = 100 * (predicted.value / observed - 1)
    text = f"{words}: predicted {predicted.value:.4g} {ends}, observed {observed:.4g}, {error:+.1f} %"
    if predicted.known:
        side = "inside" if predicted.covers(observed) else "OUTSIDE"
        text += f": {side} the {100 * settings.level:g} % prediction interval"
    return LeftOut(name, predicted, observed, text)


def _warnings(
    kind: str, estimates: Mapping[str, Interval], drawn: Array, noise: Noise, without: Mapping[str, float],
    settings: FitSettings,
) -> tuple[str, ...]:  # fmt: skip
    if noise.freedom == 0:
        return ("as many points as parameters and no seeds: the noise is not known, no intervals",)
    found = []
    for index, (name, axis) in enumerate(zip(_EXPONENTS[kind], AXES[kind], strict=True)):
        one, column = estimates[name], drawn[:, len(AXES[kind]) + index]
        at_bounds = float(np.mean((column <= _BOUNDS[0] + 0.01) | (column >= _BOUNDS[1] - 0.01)))
        if one.covers(0.0):
            found.append(
                f"the {100 * settings.level:g} % interval of {name} covers zero: these data do not show that loss "
                f"falls with {axis}"
            )
        elif one.high - one.low > one.value:
            found.append(
                f"{name} is hardly determined: its interval is wider than its value; widen the range of {axis}"
            )
        if at_bounds > 0.01:
            found.append(f"{name} is not determined: {100 * at_bounds:.0f} % of refits end at its bounds {_BOUNDS}")
    if settings.floor and estimates["E"].low == 0.0:
        listed = ", ".join(f"{name} {value:.3g}" for name, value in without.items())
        found.append(f"E cannot be told from zero: intervals hold the fits with and without it; with E = 0: {listed}")
    if noise.freedom < 5:
        found.append(f"only {noise.freedom} degrees of freedom are left for the noise: intervals are wide and rough")
    return tuple(found)
