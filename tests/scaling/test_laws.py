"""Known exponents are found, intervals hold them, and the report names what cannot be fitted or does not hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from synthetic_runs import LAW, grid, loss, noise

from escaip.errors import DataError, UsageError
from escaip.scaling.laws import Cells, FitSettings, Interval, LackOfFit, Noise, fit_law

FEW = FitSettings(bootstrap=60)


def lack_of_fit(kind: str, inputs: list[Any], losses: Any) -> LackOfFit:
    return fit_law(kind, inputs, losses, FitSettings(bootstrap=50)).lack_of_fit


BUDGETS = np.repeat(np.logspace(13, 17, 6), 3)


@pytest.mark.parametrize("huber", [1e-3, 1.0])
def test_losses_without_noise_give_the_law_back(huber: float) -> None:
    n, d = grid(5, 4, 1)
    settings = FitSettings(bootstrap=50, huber=huber)
    found = fit_law("joint", [n, d], loss(n, d), settings)
    for name, value in LAW.items():
        assert found.estimates[name].value == pytest.approx(value, rel=2e-3), name
    np.testing.assert_allclose(found.predict([1e8], [1e6])[0], loss(np.array([1e8]), np.array([1e6])), rtol=1e-3)
    c = np.logspace(12, 17, 7)
    power = fit_law("power", [c], 0.01 + 3.0 * c**-0.1, settings)
    assert [power.estimates[one].value for one in ("E", "gamma", "F")] == pytest.approx([0.01, 0.1, 3.0], rel=2e-2)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """A reduced form of benchmarks/scaling_recovery.py: of 12 repeats, 90 % are 10.8 ± 1.0."""
    n, d = grid()
    held = dict.fromkeys(("alpha", "beta", "gamma", "power"), 0)
    for repeat in range(12):
        settings = FitSettings(bootstrap=60, seed=repeat)
        found = fit_law("joint", [n, d], loss(n, d, 0.03, repeat), settings).estimates
        for name in ("alpha", "beta", "gamma"):
            held[name] += found[name].covers(LAW[name])
            assert found[name].high - found[name].low < 0.6  # an interval that holds everything is of no use
        losses = (0.01 + 0.1 * (BUDGETS / 1e15) ** -0.4) * noise(0.03, 18, repeat)
        held["power"] += fit_law("power", [BUDGETS], losses, settings).estimates["gamma"].covers(0.4)
    assert min(held.values()) >= 8, held


def test_one_run_that_went_astray_does_not_matter() -> None:
    n, d = grid(5, 4, 2)
    losses = loss(n, d, 0.005)
    clean = fit_law("joint", [n, d], losses, FEW).estimates["alpha"].value
    losses[7] *= 3
    robust, squares = (FitSettings(bootstrap=50, huber=huber) for huber in (1e-3, 10.0))
    assert fit_law("joint", [n, d], losses, robust).estimates["alpha"].value == pytest.approx(clean, abs=0.03)
    assert abs(fit_law("joint", [n, d], losses, squares).estimates["alpha"].value - clean) > 0.03


def test_noise_of_cells_and_of_seeds() -> None:
    """Cells of two seeds that share a displacement, and draws that are as wide as Student's t."""
    rng = np.random.default_rng(0)
    residuals = np.repeat(0.1 * rng.standard_normal(400), 2) + 0.02 * rng.standard_normal(800)
    found = Noise.of(residuals, Cells.of(np.repeat(np.arange(1.0, 401.0), 2)[None]), 3)
    assert found.seeds == pytest.approx(0.02, rel=0.1)
    assert found.run == pytest.approx(np.sqrt(2 * 0.1**2 + 0.02**2), rel=0.1)
    assert found.freedom == 397
    drawn = Noise(run=1.0, freedom=4, seeds=None).draw(40000, np.ones(1), rng)
    assert np.quantile(drawn, 0.95) == pytest.approx(2.13, abs=0.06)


def test_without_floor_and_where_zero_is_not_refuted() -> None:
    n, d = grid()
    losses = loss(n, d, 0.02, E=0.0)
    bare = fit_law("joint", [n, d], losses, FitSettings(bootstrap=60, floor=False))
    assert (bare.estimates["E"], bare.without_floor) == (Interval(0.0, 0.0, 0.0), {})
    assert bare.estimates["alpha"].covers(LAW["alpha"])
    both = fit_law("joint", [n, d], losses, FEW)
    assert both.floor_p_value > 0.05
    assert both.without_floor["alpha"] == pytest.approx(bare.estimates["alpha"].value, rel=1e-3)
    assert both.estimates["alpha"].covers(both.without_floor["alpha"])
    assert both.estimates["E"].low == 0.0
    assert any("E cannot be told from zero" in one and "alpha" in one for one in both.warnings)
    clear = fit_law("joint", [n, d], loss(n, d, 0.01), FEW)
    assert clear.floor_p_value < 0.01
    assert clear.estimates["E"].low > 0
    assert not clear.estimates["alpha"].covers(clear.without_floor["alpha"])


def test_what_is_not_determined_is_said() -> None:
    n, d = grid()
    found = fit_law("joint", [n, d], loss(n, d, 0.03, B=0.0), FEW)
    assert any("beta covers zero: these data do not show that loss falls with D" in one for one in found.warnings)
    c = np.array([1e12, 1e13, 1e14])
    exact = fit_law("power", [c], 0.01 + 2.0 * c**-0.1, FEW)
    assert exact.estimates["gamma"].value == pytest.approx(0.1, rel=0.05)
    assert not exact.estimates["gamma"].known
    assert "no intervals" in exact.warnings[0]
    seeds = np.repeat(0.01 + 2.0 * c**-0.1, 3) * np.tile([0.99, 1.0, 1.02], 3)
    with_seeds = fit_law("power", [np.repeat(c, 3)], seeds, FEW)
    assert with_seeds.estimates["gamma"].known
    assert with_seeds.noise.freedom == 6


def test_the_same_seed_gives_the_same_numbers() -> None:
    n, d = grid()
    losses = loss(n, d, 0.02)
    one, other = (fit_law("joint", [n, d], losses, FitSettings(bootstrap=50, seed=seed)) for seed in (0, 1))
    assert one.estimates == fit_law("joint", [n, d], losses, FitSettings(bootstrap=50)).estimates
    assert one.estimates != other.estimates


def test_a_plateau_is_flagged_and_a_law_is_not() -> None:
    n, d = grid()
    exact = loss(n, d)
    stopped = np.maximum(exact, np.quantile(exact, 0.3))
    draws = [noise(0.03, len(n), seed) for seed in range(12)]
    assert sum(lack_of_fit("joint", [n, d], stopped * one).flagged for one in draws) >= 11
    assert sum(lack_of_fit("joint", [n, d], exact * one).flagged for one in draws) <= 2
    c = np.repeat(np.logspace(12, 17, 8), 3)
    for exponent, flagged in ((0.3, False), (0.6, True)):
        losses = 0.1 * (c / 1e15) ** -np.where(c < 1e15, 0.3, exponent) * noise(0.02, 24)
        assert lack_of_fit("power", [c], losses).flagged == flagged


def test_the_words_name_where_losses_stop() -> None:
    n, d = grid(6, 4, 3)
    found = lack_of_fit("joint", [n, d], loss(n, d, 0.01) * np.where(n > 5e6, 1.2, 1.0))
    assert "at the largest N, 1e+07, they lie" in found.text
    assert "above: losses stop falling" in found.text
    assert found.misfit == pytest.approx(0.06, abs=0.05)
    for c, reason in (([1e12, 1e13, 1e14], "as many points"), ([1e12, 1e13, 1e14, 1e15], "one seed each")):
        untested = lack_of_fit("power", [c], [0.3, 0.2, 0.15, 0.12][: len(c)])
        assert math.isnan(untested.p_value)
        assert not untested.flagged
        assert reason in untested.text


def test_the_largest_runs_are_predicted() -> None:
    n, d = grid(6, 4, 2)
    by_size, by_data = fit_law("joint", [n, d], loss(n, d, 0.01), FEW, leave_out=True).left_out
    assert [(one.axis, one.predicted.covers(one.observed)) for one in (by_size, by_data)] == [("N", True), ("D", True)]
    assert by_size.predicted.value == pytest.approx(by_size.observed, rel=0.03)
    stopped = loss(n, d, 0.01) * np.where(n > 5e6, 1.2, 1.0)
    found = fit_law("joint", [n, d], stopped, FEW, leave_out=True).left_out[0]
    assert not found.predicted.covers(found.observed)
    assert found.predicted.value / found.observed == pytest.approx(1 / 1.2, abs=0.04)
    few = fit_law("power", [[1e12, 1e13, 1e14]], [0.3, 0.2, 0.15], FEW, leave_out=True).left_out[0]
    assert "too few points remain for a law of 3 parameters" in few.text
    assert not few.predicted.known


@pytest.mark.bad_input
def test_points_that_cannot_be_fitted() -> None:
    n, d = grid(2, 2, 5)
    with pytest.raises(DataError, match=r"4 distinct points \(N, D\) for a law of 5 parameters: add 1 .*--no-floor"):
        fit_law("joint", [n, d], loss(n, d))
    fit_law("joint", [n, d], loss(n, d, 0.01), FitSettings(bootstrap=50, floor=False))
    with pytest.raises(DataError, match="D is 1000 in every run: its exponent needs at least two values"):
        fit_law("joint", [np.logspace(5, 7, 6), np.full(6, 1000.0)], np.linspace(0.2, 0.1, 6))
    with pytest.raises(DataError, match="no points to fit"):
        fit_law("power", [[]], [])
    for losses, compute, name in ((-1.0, 1e9, "losses"), (0.1, float("nan"), "C")):
        with pytest.raises(DataError, match=f"^{name} must be positive numbers: leave other points out"):
            fit_law("power", [[*np.logspace(5, 9, 9), compute]], [*np.linspace(0.5, 0.2, 9), losses])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "value"), [("huber", 0.0), ("huber", float("nan")), ("bootstrap", 10), ("level", 1.0), ("seed", -1)]
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        FitSettings(**{name: value})  # type: ignore[arg-type]
