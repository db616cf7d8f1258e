"""A law that does not hold is flagged, one that does is not, and the largest runs are predicted."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_runs import grid, loss

from escaip.scaling import FitSettings, lack_of_fit, leave_largest_out
from escaip.scaling.checks import _probability_of_runs

FEW = FitSettings(bootstrap=100)


def test_a_plateau_is_flagged_and_a_law_is_not() -> None:
    n, d = grid()
    exact = loss(n, d)
    stopped = np.maximum(exact, np.quantile(exact, 0.3))
    noise = [np.exp(0.03 * np.random.default_rng(seed).standard_normal(len(n))) for seed in range(15)]
    assert sum(lack_of_fit("joint", [n, d], stopped * one).flagged for one in noise) >= 13
    assert sum(lack_of_fit("joint", [n, d], exact * one).flagged for one in noise) <= 2


def test_the_words_name_where_losses_stop() -> None:
    n, d = grid(6, 4, 3)
    found = lack_of_fit("joint", [n, d], loss(n, d, 0.01) * np.where(n > 5e6, 1.2, 1.0))
    assert found.method == "F"
    assert "NOT fit" in found.text
    assert "at the largest N, 1e+07, they lie" in found.text
    assert "above: losses stop falling" in found.text
    assert found.misfit == pytest.approx(0.06, abs=0.05)
    assert "fits within the noise" in lack_of_fit("joint", [n, d], loss(n, d, 0.01)).text


def test_an_exponent_that_changes_is_flagged() -> None:
    c = np.repeat(np.logspace(12, 17, 8), 3)
    broken = (
        0.1 * (c / 1e15) ** np.where(c < 1e15, -0.3, -0.6) * np.exp(0.02 * np.random.default_rng(0).normal(size=24))
    )
    assert lack_of_fit("power", [c], broken).flagged
    straight = 0.1 * (c / 1e15) ** -0.3 * np.exp(0.02 * np.random.default_rng(0).normal(size=24))
    assert not lack_of_fit("power", [c], straight).flagged


def test_one_seed_each_is_tested_by_runs_of_signs() -> None:
    c = np.logspace(12, 17, 24)
    stopped = np.maximum(0.1 * (c / 1e15) ** -0.3, 0.12)
    found = lack_of_fit("power", [c], stopped, floor=False)
    assert (found.method, found.flagged) == ("runs", True)
    assert "neighbors lie on one side" in found.text
    noisy = 0.1 * (c / 1e15) ** -0.3 * np.exp(0.02 * np.random.default_rng(1).normal(size=24))
    assert not lack_of_fit("power", [c], noisy, floor=False).flagged


def test_too_few_points_to_test() -> None:
    found = lack_of_fit("power", [[1e12, 1e13, 1e14]], [0.3, 0.2, 0.15])
    assert (found.method, found.flagged) == ("none", False)
    assert lack_of_fit("power", [[1e12, 1e13, 1e14]], [0.3, 0.2, 0.15], floor=False).method == "none"


def test_probabilities_of_runs_add_up() -> None:
    found = [_probability_of_runs(runs, 4, 3) for runs in range(9)]
    assert sum(found) == pytest.approx(1.0)
    assert found[2] == pytest.approx(2 / 35)  # all of one sign first: two of the 35 orders
    assert found[7] == pytest.approx(1 / 35)


def test_the_largest_runs_are_predicted() -> None:
    n, d = grid(6, 4, 2)
    by_size, by_data = leave_largest_out("joint", [n, d], loss(n, d, 0.01), FEW)
    assert (by_size.axis, by_data.axis) == ("N", "D")
    assert (by_size.value, by_size.num_points, by_data.num_points) == (1e7, 4, 6)
    assert by_size.holds
    assert by_data.holds
    assert abs(by_size.error) < 3
    assert "inside the 90 % prediction interval" in by_size.text
    off = loss(n, d, 0.01) * np.where(n > 5e6, 1.2, 1.0)
    found = leave_largest_out("joint", [n, d], off, FEW)[0]
    assert not found.holds
    assert found.error == pytest.approx(100 * (1 / 1.2 - 1), abs=4)
    assert "OUTSIDE" in found.text


def test_predictions_hold_as_often_as_they_say() -> None:
    c = np.repeat(np.logspace(13, 17, 7), 2)
    held = 0
    for seed in range(20):
        losses = 0.1 * (c / 1e15) ** -0.3 * np.exp(0.03 * np.random.default_rng(seed).standard_normal(len(c)))
        held += leave_largest_out("power", [c], losses, FitSettings(bootstrap=100, floor=False, seed=seed))[0].holds
    assert held >= 15


def test_too_few_points_remain() -> None:
    found = leave_largest_out("power", [[1e12, 1e13, 1e14]], [0.3, 0.2, 0.15], FEW)[0]
    assert "too few points remain for a law of 3 parameters" in found.text
    assert not found.holds
    found = leave_largest_out("power", [[1e12, 1e13, 1e14, 1e15]], [0.3, 0.2, 0.15, 0.12], FEW)[0]
    assert "no interval" in found.text
