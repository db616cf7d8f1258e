"""What speaks against a law: misfit beyond the noise of seeds, and the largest runs predicted from the others."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import f as f_distribution

from escaip.errors import DataError
from escaip.scaling.laws import AXES, FitSettings, check_points, fit_law, number_of_parameters
from escaip.scaling.resampling import Cells
from escaip.scaling.solver import Array, SumOfPowers, minimize_from_grid

_SIGNIFICANT = 0.05
_LEAST_SQUARES = 1e3  # δ no residual reaches


@dataclass(frozen=True)
class LackOfFit:
    """Of a law at points with noise.

    Attributes:
        method: ``F``, the misfit of cells beside the noise of seeds, or ``runs``, the order of the signs of residuals,
            where there is one seed each; ``none`` where neither is possible.
        p_value: probability of a misfit as large if the law were true; NaN for ``none``.
        misfit: standard deviation of log L of cells about the law, the noise of seeds taken off.
        text: in words.
    """

    method: str
    p_value: float
    misfit: float
    text: str

    @property
    def flagged(self) -> bool:
        """Whether the law does not describe these points (5 %)."""
        return self.p_value < _SIGNIFICANT


def lack_of_fit(kind: str, inputs: list[ArrayLike], losses: ArrayLike, floor: bool = True) -> LackOfFit:
    """Tests a law against the noise of seeds: a plateau, an exponent that changes, a size that was trained badly.

    With seeds: ``F = [Σ m_c (ȳ_c − f_c)²/(C − p)] / [Σ (y − ȳ_c)²/(n − C)]`` of the fit by least squares (Draper and
    Smith, Applied Regression Analysis, section 2.1): mean losses ``ȳ_c`` of C cells of ``m_c`` seeds, p parameters.
    Without: the runs test (Wald and Wolfowitz, Ann. Math. Stat. 11, 147 (1940)) of the signs along the inputs, which
        sees only what is large.

    What it cannot see: a plateau along N alone is a law with a large E and a steep α, if D still helps.

    Args:
        kind: ``joint`` or ``power``.
        inputs: N and D, or C, each ``(n,)``.
        losses: ``(n,)``.
        floor: whether the law has an E.
    """
    x, y, cells = check_points(kind, inputs, losses, floor)
    logs = np.log(x)
    law = SumOfPowers.of(logs - logs.mean(axis=1, keepdims=True), y, floor)
    best, _, _ = minimize_from_grid(law, y, _LEAST_SQUARES)
    residuals = y - law.value(best[None])[0]
    means = np.bincount(cells.index, weights=residuals) / cells.counts
    within = float(((residuals - means[cells.index]) ** 2).sum())
    between = float((cells.counts * means**2).sum())
    free, seed_free = len(cells.first) - law.num_parameters, len(y) - len(cells.first)
    if free < 1:
        text = "as many points as parameters: nothing can speak against the law"
        return LackOfFit("none", float("nan"), float("nan"), text)
    if seed_free < 2:
        return _by_runs(means[_along(x[:, cells.first])], float(np.sqrt(between / free)))
    noise = within / seed_free
    p_value = float(f_distribution.sf(between / free / max(noise, 1e-300), free, seed_free))
    misfit = float(np.sqrt(max(between / free - noise, 0.0) / cells.counts.mean()))
    if p_value >= _SIGNIFICANT:
        text = f"the law fits within the noise of seeds (F test, p = {p_value:.2g})"
    else:
        text = (
            f"the law does NOT fit: points lie {100 * misfit:.2g} % off it beyond the noise of seeds "
            f"(F test, p = {p_value:.2g}): {_where(kind, x[:, cells.first], means)}; do not extrapolate"
        )
    return LackOfFit("F", p_value, misfit, text)


def _along(points: Array) -> np.ndarray:
    """Order of ``points (K, C)`` along a path through the grid, back and forth, so that neighbors stay neighbors."""
    if len(points) == 1:
        return np.argsort(points[0])
    rank = np.unique(points[0], return_inverse=True)[1].reshape(-1)
    return np.lexsort((np.where(rank % 2 == 0, points[1], -points[1]), rank))


def _by_runs(residuals: Array, spread: float) -> LackOfFit:
    signs = residuals > 0
    total, above = len(signs), int(signs.sum())
    runs = 1 + int((signs[1:] != signs[:-1]).sum())
    if min(above, total - above) < 2:
        return LackOfFit("none", float("nan"), spread, "too few points of one seed each to test the law")
    p_value = float(sum(_probability_of_runs(count, above, total - above) for count in range(1, runs + 1)))
    if p_value >= _SIGNIFICANT:
        text = (
            f"signs of residuals change as by chance (runs test, p = {p_value:.2g}); without seeds little would be seen"
        )
    else:
        text = (
            f"the law does NOT fit: neighbors lie on one side of it (runs test, p = {p_value:.2g}); do not extrapolate"
        )
    return LackOfFit("runs", p_value, spread, text)


def _probability_of_runs(runs: int, above: int, below: int) -> float:
    """Of exactly so many runs of two signs, if every order is equally likely."""
    if runs < 2:
        return 0.0

    half, odd = divmod(runs, 2)
    if odd:
        count = comb(above - 1, half) * comb(below - 1, half - 1) + comb(above - 1, half - 1) * comb(below - 1, half)
    else:
        count = 2 * comb(above - 1, half - 1) * comb(below - 1, half - 1)
    return count / comb(above + below, above)


def _where(kind: str, points: Array, means: Array) -> str:
    """Which input's largest value lies off most, in words."""
    found = []
    for name, row in zip(AXES[kind], points, strict=True):
        last = row >= row.max() * (1 - 1e-6)
        found.append((float(means[last].mean()), name, float(row.max())))
    excess, name, largest = max(found, key=lambda one: abs(one[0]))
    side = "above: losses stop falling" if excess > 0 else "below: losses fall faster"
    return f"at the largest {name}, {largest:.3g}, they lie {100 * abs(excess):.2g} % {side}"


@dataclass(frozen=True)
class LeftOut:
    """The points of the largest value of one input, predicted by the law fitted to all others.

    Attributes:
        axis: N, D or C.
        value: that was left out.
        num_points: distinct points there; the geometric mean of their losses is what is compared.
        predicted, low, high: by the law, with the noise of that mean; NaN where the others are too few.
        observed: that mean.
        text: in words.
    """

    axis: str
    value: float
    num_points: int
    predicted: float
    low: float
    high: float
    observed: float
    text: str

    @property
    def error(self) -> float:
        """Of the prediction, in per cent of what was observed."""
        return 100 * (self.predicted / self.observed - 1)

    @property
    def holds(self) -> bool:
        """Whether the prediction interval holds what was observed."""
        return self.low <= self.observed <= self.high


def leave_largest_out(
    kind: str, inputs: list[ArrayLike], losses: ArrayLike, settings: FitSettings | None = None
) -> tuple[LeftOut, ...]:
    """Leaves the largest N, then the largest D (or the largest C) out, fits the others and predicts it.

    Args:
        kind: ``joint`` or ``power``.
        inputs: N and D, or C, each ``(n,)``.
        losses: ``(n,)``.
        settings: as of the fit.
    """
    settings = settings or FitSettings()
    x, y, cells = check_points(kind, inputs, losses, settings.floor)
    return tuple(_leave(kind, axis, x, y, cells, settings) for axis in range(len(x)))


def _leave(kind: str, axis: int, x: Array, y: Array, cells: Cells, settings: FitSettings) -> LeftOut:
    largest = float(x[axis].max())
    out = x[axis] >= largest * (1 - 1e-6)
    left = np.unique(cells.index[out])
    observed = float(np.exp(cells.means[left].mean()))
    name, nan = AXES[kind][axis], float("nan")
    try:
        fit = fit_law(kind, list(x[:, ~out]), np.exp(y[~out]), settings)
    except DataError:
        needed = number_of_parameters(kind, settings.floor)
        text = f"largest {name} left out: too few points remain for a law of {needed} parameters"
        return LeftOut(name, largest, len(left), nan, nan, nan, observed, text)
    value, drawn = fit.predict(*x[:, cells.first[left]])
    predicted = float(np.exp(np.log(value).mean()))
    if len(drawn) == 0:
        text = f"largest {name} left out: as many points as parameters remain, no interval"
        return LeftOut(name, largest, len(left), predicted, nan, nan, observed, text)
    rng = np.random.default_rng([settings.seed, axis, 1])
    noise = fit.noise.draw((len(drawn), len(left)), cells.counts[left], rng)
    low, high = np.exp(
        np.quantile((np.log(drawn) + noise).mean(axis=1), [0.5 - settings.level / 2, 0.5 + settings.level / 2])
    )
    error = 100 * (predicted / observed - 1)
    verdict = "inside" if low <= observed <= high else "OUTSIDE"
    text = (
        f"largest {name} ({largest:.3g}) left out: predicted {predicted:.4g} ({low:.4g} to {high:.4g}), observed "
        f"{observed:.4g}, {error:+.1f} %: {verdict} the {100 * settings.level:g} % prediction interval"
    )
    return LeftOut(name, largest, len(left), predicted, float(low), float(high), observed, text)
