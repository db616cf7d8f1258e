"""Variants beside each other."""

from __future__ import annotations

import numpy as np
from synthetic_runs import grid, loss

from escaip.scaling import FitSettings, fit_joint, fit_power
from escaip.scaling.compare import compare
from escaip.scaling.frontier import frontier


def test_exponents_that_differ_and_such_that_do_not() -> None:
    n, d = grid(6, 5, 3)
    fits = {
        name: fit_joint(
            n, d, loss(n, d, 0.01, seed, alpha=alpha, A=0.03 * 1e6**alpha), FitSettings(bootstrap=200, seed=seed)
        )
        for seed, (name, alpha) in enumerate({"one": 0.3, "same": 0.3, "steep": 0.55}.items())
    }
    differences, ratios = compare(fits)
    assert [(one.first, one.second) for one in ratios] == [("one", "same"), ("one", "steep"), ("same", "steep")]
    found = {(one.first, one.second, one.exponent): one for one in differences}
    assert len(found) == 9
    alike, apart = found["one", "same", "alpha"], found["one", "steep", "alpha"]
    assert not alike.distinct
    assert "these data do not tell them apart" in alike.text
    assert 0.02 < alike.steeper < 0.98
    assert apart.distinct
    assert apart.difference.high < 0
    assert apart.steeper < 0.05
    assert "alpha of steep is larger than that of one" in apart.text
    assert ratios[0].inputs == (1e7, n.dtype.type(10**5.2))
    assert ratios[0].ratio.covers(1.0)
    assert ratios[1].ratio.low > 1


def test_refits_of_equal_seeds_are_not_taken_for_pairs() -> None:
    """The same fit twice: its difference from itself is as uncertain as that of two studies."""
    n, d = grid()
    one = fit_joint(n, d, loss(n, d, 0.02), FitSettings(bootstrap=200))
    found = compare({"a": one, "b": one})[0][0]
    width = one.estimates["alpha"].high - one.estimates["alpha"].low
    assert found.difference.high - found.difference.low > 1.2 * width


def test_ratio_at_the_largest_common_budget() -> None:
    c = np.repeat(np.logspace(12, 15, 5), 2)
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(10))
    settings = FitSettings(bootstrap=100, floor=False)
    fits = {
        "short": fit_power(c, 2.0 * c**-0.1 * noise, settings),
        "long": fit_power(100 * c, c**-0.1 * 100**-0.1 * noise[::-1], settings),
        "far": fit_power(1e9 * c, (1e9 * c) ** -0.1 * noise[::-1], settings),
    }
    ratios = compare(fits)[1]
    assert ratios[0].inputs == (1e15,)
    assert abs(ratios[0].ratio.value - 2) < 0.1
    assert "extrapolation" not in ratios[0].text
    assert "outside of the range of far: an extrapolation" in ratios[1].text


def test_without_intervals_nothing_is_said() -> None:
    c = [1e12, 1e13, 1e14]
    one = fit_power(c, [0.3, 0.2, 0.15], FitSettings(bootstrap=50))
    differences, ratios = compare({"a": one, "b": one})
    assert "nothing can be said" in differences[0].text
    assert not differences[0].distinct
    assert ratios[0].text.endswith("1.000")


def test_the_frontier_is_the_lower_envelope_of_cells() -> None:
    n = np.array([1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0])
    d = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    c = np.array([1e12, 1e12, 1.1e12, 1.1e12, 1e13, 1e13, 1e14])
    losses = np.array([0.5, 0.3, 0.35, 0.36, 0.2, 0.2, 0.3])
    # The second cell has the lower mean in its bin; the last costs more and is worse.
    assert frontier(c, n, d, losses).tolist() == [False, False, True, True, True, True, False]
