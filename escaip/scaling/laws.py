"""Scaling laws with intervals: L = E + A N^-α + B D^-β over sizes and data, L = E + F C^-γ over compute.

Fitted is log L with Huber's loss of the residuals (δ = 1e-3, as in Hoffmann et al., arXiv:2203.15556, section 3.3),
from a grid of starts, the sum inside the logarithm computed from logarithms of its terms. Where seeds differ by more
than δ, as they do in small studies, that is nearly the fit of least absolute residuals: it does not mind a run that
went astray, and its intervals are about a quarter wider than those of least squares (``huber=1`` or more). Every start
is followed to the bottom of its valley: Besiroglu et al. (arXiv:2404.10102) trace the far too narrow intervals of the
former paper to an optimizer that stopped early. Intervals: :mod:`escaip.scaling.resampling`. What speaks against a
law: :mod:`escaip.scaling.checks`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import f as f_distribution

from escaip.errors import DataError, UsageError
from escaip.scaling.resampling import Cells, Noise, refits
from escaip.scaling.solver import HIGHEST, LOWEST, Array, SumOfPowers, descend, minimize_from_grid

_EXPONENTS = {"joint": ("alpha", "beta"), "power": ("gamma",)}
_HEADS = {"joint": ("A", "B"), "power": ("F",)}
_SIGNIFICANT = 0.05
_ZERO = 3.5  # above the bound of log E: an E below 1.1 % of the lowest loss counts as zero
AXES = {"joint": ("N", "D"), "power": ("C",)}
"""Inputs of each law."""


@dataclass(frozen=True)
class FitSettings:
    """How laws are fitted.

    Attributes:
        huber: δ of Huber's loss, in log L.
        bootstrap: number of refits that intervals are taken from.
        level: probability that an interval is to hold the truth.
        seed: of the drawing.
        floor: whether losses end at an E ≥ 0; without it E = 0.
    """

    huber: float = 1e-3
    bootstrap: int = 1000
    level: float = 0.9
    seed: int = 0
    floor: bool = True

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UsageError: one is out of its range.
        """
        if not (math.isfinite(self.huber) and self.huber > 0):
            raise UsageError(f"huber is {self.huber}: give a number above 0, such as 1e-3")
        if self.bootstrap < 50:
            raise UsageError(f"bootstrap is {self.bootstrap}: an interval needs at least 50 refits, better 1000")
        if not 0.5 <= self.level < 1:
            raise UsageError(f"level is {self.level}: give a probability from 0.5 to below 1, such as 0.9")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}: give a number from 0 on")


@dataclass(frozen=True)
class Interval:
    """A value and where it may lie.

    Attributes:
        value: best fit.
        low, high: ends of the interval; NaN where nothing is left to tell the noise from.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, replicates: Array, level: float, groups: int = 1) -> Interval:
        """From percentiles of ``replicates (R,)``; those that are not finite are left out.

        Of several groups, equal parts of the replicates, the interval holds those of all.
        """
        ends = []
        for part in np.split(replicates, groups):
            known = part[np.isfinite(part)]
            if len(known) == 0:
                return cls(value, math.nan, math.nan)
            ends.append(np.quantile(known, [0.5 - level / 2, 0.5 + level / 2]))
        low, high = np.stack(ends).T
        return cls(value, float(low.min()), float(high.max()))

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    def covers(self, value: float) -> bool:
        """Whether ``value`` lies in it."""
        return self.low <= value <= self.high

    def to_list(self) -> list[float | None]:
        """Returns value, low and high for JSON."""
        return [one if math.isfinite(one) else None for one in (self.value, self.low, self.high)]


@dataclass(frozen=True)
class LawFit:
    """A fitted law.

    Attributes:
        kind: ``joint``, of N and D, or ``power``, of C.
        estimates: of ``E, alpha, A, beta, B, gamma`` (joint; ``gamma = αβ/(α+β)``, of the best N and D for a compute
            that is proportional to N D) or ``E, gamma, F`` (power). E and A N^-α are in the unit of the loss.
        replicates: name to ``(R,)`` values of the refits; where E = 0 is not refuted, as many with E = 0 follow.
        without_floor: the exponents of the fit with E = 0; empty where E was left out.
        floor_p_value: of E = 0, by an F test; NaN where E was left out or the noise is not known.
        noise: about the law.
        num_runs, num_cells, num_parameters: runs, distinct inputs, parameters of the law.
        ranges: input to lowest and highest value.
        cost: mean of Huber's loss.
        settings: of the fit.
        warnings: in words.
    """

    kind: str
    estimates: Mapping[str, Interval]
    replicates: Mapping[str, Array]
    without_floor: Mapping[str, float]
    floor_p_value: float
    noise: Noise
    num_runs: int
    num_cells: int
    num_parameters: int
    ranges: Mapping[str, tuple[float, float]]
    cost: float
    settings: FitSettings
    warnings: tuple[str, ...]
    _law: SumOfPowers
    _center: Array
    _parameters: Array
    _refits: Array

    def predict(self, *inputs: ArrayLike) -> tuple[Array, Array]:
        """The law at N and D, or at C, each ``(m,)``.

        Returns:
            losses ``(m,)`` and those of the refits ``(R, m)``; the noise of a run is in neither.
        """
        logs = np.log(np.stack([np.atleast_1d(np.asarray(one, dtype=np.float64)) for one in inputs]))
        law = self._law.at(logs - self._center)
        return np.exp(law.value(self._parameters[None])[0]), np.exp(law.value(self._refits))


def fit_joint(
    parameters: ArrayLike, structures: ArrayLike, losses: ArrayLike, settings: FitSettings | None = None
) -> LawFit:
    """Fits ``L = E + A N^-α + B D^-β``.

    Args:
        parameters: ``(n,)`` N of each run.
        structures: ``(n,)`` D of each run.
        losses: ``(n,)`` positive; runs of equal N and D are seeds of one cell.
        settings: by default δ = 1e-3 and 1000 refits at 90 %.

    Raises:
        DataError: fewer distinct points than parameters, an input that never varies, or a value that is not positive.
    """
    return fit_law("joint", [parameters, structures], losses, settings or FitSettings())


def fit_power(flops: ArrayLike, losses: ArrayLike, settings: FitSettings | None = None) -> LawFit:
    """Fits ``L = E + F C^-γ`` to the points given; :func:`escaip.scaling.frontier.frontier` chooses them.

    Args:
        flops: ``(n,)`` C of each run.
        losses: ``(n,)`` positive; runs of equal C are seeds of one cell.
        settings: as of :func:`fit_joint`.

    Raises:
        DataError: as of :func:`fit_joint`.
    """
    return fit_law("power", [flops], losses, settings or FitSettings())


def number_of_parameters(kind: str, floor: bool) -> int:
    """Returns that of the law ``joint`` or ``power``."""
    return 2 * len(AXES[kind]) + floor


def check_points(kind: str, inputs: list[ArrayLike], losses: ArrayLike, floor: bool) -> tuple[Array, Array, Cells]:
    """Returns inputs ``(K, n)``, log L ``(n,)`` and their cells, if a law can be fitted to them.

    Raises:
        DataError: as of :func:`fit_joint`.
    """
    arrays = [np.asarray(one, dtype=np.float64).reshape(-1) for one in [*inputs, losses]]
    for name, values in zip([*AXES[kind], "loss"], arrays, strict=True):
        if len(values) != len(arrays[-1]):
            raise DataError(f"{name} has {len(values)} values for {len(arrays[-1])} losses: give one of each run")
        if not (np.isfinite(values) & (values > 0)).all():
            raise DataError(f"{name} holds a value that is not finite and positive: leave runs that diverged out")
    if len(arrays[-1]) == 0:
        raise DataError("no points to fit: name a metric that the records hold")
    x, y = np.stack(arrays[:-1]), np.log(arrays[-1])
    cells, needed = Cells.of(x, y), number_of_parameters(kind, floor)
    if len(cells.first) < needed:
        raise DataError(
            f"{len(cells.first)} distinct points ({', '.join(AXES[kind])}) for a law of {needed} parameters: add "
            f"{needed - len(cells.first)} or more{', or fix E = 0 (--no-floor)' if floor else ''}; seeds do not count"
        )
    for name, values in zip(AXES[kind], x, strict=True):
        if len(np.unique(np.round(np.log(values), 6))) < 2:
            raise DataError(f"{name} is {values[0]:g} in every run: its exponent needs at least two values of it")
    return x, y, cells


def fit_law(kind: str, inputs: list[ArrayLike], losses: ArrayLike, settings: FitSettings) -> LawFit:
    """Either law: ``joint`` of the inputs N and D, or ``power`` of C."""
    x, y, cells = check_points(kind, inputs, losses, settings.floor)
    logs = np.log(x)
    center = logs.mean(axis=1, keepdims=True)
    law = SumOfPowers.of(logs - center, y, settings.floor)
    best, cost, minima = minimize_from_grid(law, y, settings.huber)
    noise = Noise.of(law.value(best[None])[0] - y, cells, law.num_parameters)
    without: dict[str, float] = {}
    p_value, groups = math.nan, 1
    arguments = (cells, noise, settings.huber, settings.bootstrap)
    if not settings.floor:
        drawn = refits(law, minima, *arguments, settings.seed)
    else:
        bare = SumOfPowers.of(logs - center, y, False)
        bare_best, _, bare_minima = minimize_from_grid(bare, y, settings.huber)
        found = _named(kind, bare, bare_best[None], center)
        without = {name: float(found[name][0]) for name in dict.fromkeys([*_EXPONENTS[kind], "gamma"])}
        p_value = _floor_p_value(law, best, bare, bare_best, y, cells)
        # The way down to E = 0 is long in log E: refits start there as well.
        ends = np.pad(bare_best[None], ((0, 0), (0, 1)), constant_values=law.lower[-1])
        drawn = refits(law, np.concatenate([minima, ends]), *arguments, settings.seed)
        if len(drawn) and not p_value < _SIGNIFICANT:
            nothing = refits(bare, bare_minima, *arguments, settings.seed + 1)
            drawn = np.concatenate([drawn, np.pad(nothing, ((0, 0), (0, 1)), constant_values=law.lower[-1])])
            groups = 2
    values, replicates = _named(kind, law, best[None], center), _named(kind, law, drawn, center)
    estimates = {
        name: Interval.of(float(value[0]), replicates[name], settings.level, groups) for name, value in values.items()
    }
    warnings = _warnings(kind, law, estimates, drawn, noise, without, settings.level)
    return LawFit(
        kind=kind, estimates=estimates, replicates=replicates, without_floor=without,
        floor_p_value=p_value, noise=noise, num_runs=len(y),
        num_cells=len(cells.first), num_parameters=law.num_parameters,
        ranges={name: (float(row.min()), float(row.max())) for name, row in zip(AXES[kind], x, strict=True)},
        cost=cost / len(y), settings=settings, warnings=warnings, _law=law, _center=center, _parameters=best,
        _refits=drawn,
    )  # fmt: skip


def _named(kind: str, law: SumOfPowers, parameters: Array, center: Array) -> dict[str, Array]:
    """Every name of the law's estimates, ``(R,)``, from ``parameters (R, P)``."""
    terms = len(AXES[kind])
    exponents = parameters[:, terms : 2 * terms]
    heads = np.exp(np.clip(parameters[:, :terms] + exponents * center.T, -700.0, 700.0))
    found: dict[str, Array] = {}
    found["E"] = np.zeros(len(parameters))
    if law.floor:  # its logarithm cannot reach that of zero
        found["E"] = np.where(parameters[:, -1] < law.lower[-1] + _ZERO, 0.0, np.exp(parameters[:, -1]))
    for index, (exponent, head) in enumerate(zip(_EXPONENTS[kind], _HEADS[kind], strict=True)):
        found[exponent], found[head] = exponents[:, index], heads[:, index]
    if kind == "joint":
        # Where one of the two does not help, neither does compute that is spent on both.
        alpha, beta = np.maximum(found["alpha"], 0.0), np.maximum(found["beta"], 0.0)
        found["gamma"] = alpha * beta / np.maximum(alpha + beta, 1e-12)
    return found


def _floor_p_value(law: SumOfPowers, best: Array, bare: SumOfPowers, bare_best: Array, y: Array, cells: Cells) -> float:
    """Of E = 0: the gain in squares of cell means over those left, by least squares of both laws."""
    freedom = len(cells.first) - law.num_parameters
    if freedom < 1:
        return math.nan
    left = [
        2
        * float(
            descend(one.at(one.logs[:, cells.first]), cells.means[None], start[None], 1e3, cells.counts[None])[1][0]
        )
        for one, start in ((law, best), (bare, bare_best))
    ]
    return float(f_distribution.sf((left[1] - left[0]) / max(left[0] / freedom, 1e-300), 1, freedom))


def _warnings(
    kind: str, law: SumOfPowers, estimates: Mapping[str, Interval], drawn: Array, noise: Noise,
    without: Mapping[str, float], level: float,
) -> tuple[str, ...]:  # fmt: skip
    found = []
    if noise.freedom == 0:
        found.append("as many points as parameters and no seeds: nothing is left to tell the noise from, no intervals")
        return tuple(found)
    percent = f"{100 * level:g} %"
    for index, name in enumerate(_EXPONENTS[kind]):
        one = estimates[name]
        column = drawn[:, len(AXES[kind]) + index]
        edge = float(np.mean((column <= LOWEST + 1e-6) | (column >= HIGHEST - 1e-6)))
        axis = AXES[kind][index]
        if one.low <= 0 <= one.high:
            found.append(
                f"the {percent} interval of {name} covers zero: these data do not show that loss falls with {axis}"
            )
        elif one.high - one.low > one.value:
            found.append(
                f"{name} is hardly determined: its interval is wider than its value; widen the range of {axis}"
            )
        if edge > 0.01 or not LOWEST < one.value < HIGHEST:
            found.append(
                f"{name} is not determined: {100 * edge:.0f} % of refits end at its bounds ({LOWEST:g}, {HIGHEST:g})"
            )
    if law.floor and estimates["E"].low == 0.0:
        listed = ", ".join(f"{name} {value:.3g}" for name, value in without.items())
        found.append(f"E cannot be told from zero: intervals hold the fits with and without it; with E = 0: {listed}")
    if noise.freedom < 5:
        found.append(f"only {noise.freedom} degrees of freedom are left for the noise: intervals are wide and rough")
    if noise.seeds is None:
        found.append("one seed of each point: the law cannot be tested against the noise of seeds; run two or more")
    return tuple(found)
