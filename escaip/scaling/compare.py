"""Variants of a model beside each other: do their exponents differ by more than the data can tell?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from escaip.scaling.laws import Interval, LawFit
from escaip.scaling.solver import Array


@dataclass(frozen=True)
class Difference:
    """One exponent of two variants that were fitted apart.

    Attributes:
        first, second: names of the variants.
        law: ``joint`` or ``power``.
        exponent: ``alpha``, ``beta`` or ``gamma``.
        difference: of the first less the second.
        steeper: fraction of refits in which the first is the steeper.
        text: in words.
    """

    first: str
    second: str
    law: str
    exponent: str
    difference: Interval
    steeper: float
    text: str

    @property
    def distinct(self) -> bool:
        """Whether the interval of the difference leaves zero out."""
        return self.difference.known and not self.difference.covers(0.0)


@dataclass(frozen=True)
class LossRatio:
    """Losses of two variants at the same input, by their laws.

    Attributes:
        first, second: names of the variants.
        law: ``joint`` or ``power``.
        inputs: C, or N and D, where both are compared: the largest that both have.
        ratio: of the first to the second.
        text: in words.
    """

    first: str
    second: str
    law: str
    inputs: tuple[float, ...]
    ratio: Interval
    text: str


def compare(fits: Mapping[str, LawFit], level: float = 0.9) -> tuple[tuple[Difference, ...], tuple[LossRatio, ...]]:
    """Compares the same law of every pair of variants.

    Refits of different variants are independent: they are paired by chance, and the interval of a difference is that
    of its percentiles. Many pairs make some differ by chance: of ten equal pairs one will at 90 %.

    Args:
        fits: variant to its law, all of one kind.
        level: of the intervals.
    """
    differences: list[Difference] = []
    ratios: list[LossRatio] = []
    for number, (first, second) in enumerate(combinations(fits, 2)):
        rng = np.random.default_rng([number, 3])
        one, other = fits[first], fits[second]
        for exponent in ("gamma",) if one.kind == "power" else ("alpha", "beta", "gamma"):
            differences.append(_difference(first, second, one, other, exponent, level, rng))
        ratios.append(_ratio(first, second, one, other, level, rng))
    return tuple(differences), tuple(ratios)


def _paired(one: Array, other: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """As many of each, in an order that does not link them."""
    number = min(len(one), len(other))
    return rng.permutation(one)[:number], rng.permutation(other)[:number]


def _difference(
    first: str, second: str, one: LawFit, other: LawFit, exponent: str, level: float, rng: np.random.Generator
) -> Difference:
    a, b = _paired(one.replicates[exponent], other.replicates[exponent], rng)
    found = Interval.of(one.estimates[exponent].value - other.estimates[exponent].value, a - b, level)
    steeper = float(np.mean(a > b)) if len(a) else float("nan")
    if not found.known:
        text = f"{exponent} of {first} and {second}: no intervals, nothing can be said"
    elif found.covers(0.0):
        text = f"{exponent} of {first} and {second}: the interval covers zero: these data do not tell them apart"
    else:
        steep, flat = (first, second) if found.low > 0 else (second, first)
        share = 100 * max(steeper, 1 - steeper)
        text = f"{exponent} of {steep} is larger than that of {flat} ({share:.0f} % of the refits)"
    return Difference(first, second, one.kind, exponent, found, steeper, text)


def _ratio(first: str, second: str, one: LawFit, other: LawFit, level: float, rng: np.random.Generator) -> LossRatio:
    at = tuple(min(one.ranges[axis][1], other.ranges[axis][1]) for axis in one.ranges)
    (value, drawn), (value2, drawn2) = one.predict(*at), other.predict(*at)
    a, b = _paired(drawn[:, 0], drawn2[:, 0], rng)
    ratio = Interval.of(float(value[0] / value2[0]), a / b, level)
    where = ", ".join(f"{axis} = {number:.3g}" for axis, number in zip(one.ranges, at, strict=True))
    text = f"loss of {first} over that of {second} at {where}: {ratio.value:.3f}"
    if ratio.known:
        text += f" ({ratio.low:.3f} to {ratio.high:.3f})"
        text += ": these data do not tell them apart" if ratio.covers(1.0) else ""
    below = [
        name
        for name, fit in ((first, one), (second, other))
        if any(at[i] < r[0] for i, r in enumerate(fit.ranges.values()))
    ]
    if below:
        text += f"; outside of the range of {' and '.join(below)}: an extrapolation"
    return LossRatio(first, second, one.kind, at, ratio, text)
