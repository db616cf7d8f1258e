"""Frontier, budgets, variants beside each other, and all fits of a study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import LAW, grid, loss, noise, records, write, write_study

from escaip.errors import DataError
from escaip.scaling.fits import Points, compare, fit_isoflop, fit_study, frontier, group_budgets
from escaip.scaling.laws import FitSettings, fit_law

FEW = FitSettings(bootstrap=60)


def test_the_frontier_is_the_lower_envelope_of_cells() -> None:
    n = np.array([1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0])
    c = np.array([1e12, 1e12, 1.1e12, 1.1e12, 1e13, 1e13, 1e14])
    losses = np.array([0.5, 0.3, 0.35, 0.36, 0.2, 0.2, 0.3])
    # The second cell has the lower mean in its bin; the last costs more and is worse.
    assert frontier(Points(n, np.ones(7), c, losses)).loss.tolist() == [0.35, 0.36, 0.2, 0.2]


def budgets(span: float = 6.0, shift: float = 1.0, spread: float = 0.0, seed: int = 0) -> Points:
    """Runs of four budgets with seven sizes about the best each, C = 60 N D."""
    c = np.repeat(np.logspace(12, 15, 4), 14)
    total = LAW["alpha"] + LAW["beta"]
    best = (LAW["alpha"] * LAW["A"] / LAW["beta"] / LAW["B"]) ** (1 / total) * (c / 60) ** (LAW["beta"] / total)
    n = best * shift * np.tile(np.repeat(np.logspace(-np.log10(span), np.log10(span), 7), 2), 4)
    d = c / (60 * n)
    return Points(n, d, c, loss(n, d, spread, seed))


def isoflop(points: Points, settings: FitSettings = FEW) -> Any:
    return fit_isoflop(points, settings)


def test_minima_and_exponents_of_budgets() -> None:
    """Exponents of the best size and data are β/(α+β) and α/(α+β)."""
    found = isoflop(budgets(spread=0.005), FitSettings(bootstrap=300))
    assert (found.a.value, found.b.value) == pytest.approx((0.4 / 0.7, 0.3 / 0.7), abs=0.06)
    assert found.a.value + found.b.value == pytest.approx(1.0, abs=1e-6)
    assert found.a.covers(0.4 / 0.7)
    assert found.warnings == ()
    assert len(found.budgets) == 4
    for one in found.budgets:
        assert one.N.value * one.D.value * 60 == pytest.approx(one.flops, rel=1e-6)
        assert one.N.covers(one.N.value)
        assert one.N.value == pytest.approx(np.sqrt(one.sizes[0] * one.sizes[1]), rel=0.3)


def test_intervals_of_budgets_hold_the_truth() -> None:
    exact = isoflop(budgets()).a
    held = 0
    for seed in range(30):
        one = isoflop(budgets(spread=0.02, seed=seed), FitSettings(bootstrap=200, seed=seed)).a
        held += one is not None and one.covers(exact.value)
    assert held >= 23


def test_a_minimum_outside_of_the_sizes_is_refused() -> None:
    found = isoflop(budgets(3.0, 8.0))
    assert all(one.N is None for one in found.budgets)
    assert found.a is None
    assert "its minimum lies outside of N" in found.warnings[0]
    assert "add smaller models at this budget" in found.warnings[0]
    assert "fewer than two budgets" in found.warnings[-1]
    assert "add larger models" in isoflop(budgets(3.0, 1 / 8)).warnings[0]
    n = np.logspace(4, 6, 5)
    upside_down = isoflop(Points(n, 1e12 / n, np.full(5, 1e12), np.exp(-0.1 * np.log(n / 1e5) ** 2)))
    assert "the curve has no minimum" in upside_down.warnings[0]


def test_what_is_hardly_known_of_budgets_is_said() -> None:
    assert any("two budgets only" in one for one in isoflop(budgets(spread=0.005).take(np.arange(28))).warnings)
    exact = isoflop(budgets().take(np.concatenate([np.arange(0, 14, 6), np.arange(14, 28, 6)])))
    assert any("no intervals" in one for one in exact.warnings)
    assert not exact.a.known


def test_budgets_are_grouped_within_the_tolerance() -> None:
    c = np.array([1.0, 2.0, 1.05, 0.96, 2.1, 1.3])
    assert [sorted(group.tolist()) for group in group_budgets(c)] == [[0, 2, 3], [5], [1, 4]]
    assert max(len(group) for group in group_budgets(1.05 ** np.arange(9))) == 4  # a chain is not followed
    two_sizes = Points(np.array([1.0, 2.0, 2.0, 4.0]), c[:4], np.array([1.0, 1.0, 1.0, 5.0]), c[:4])
    assert fit_isoflop(two_sizes, FEW) is None


def test_exponents_that_differ_and_such_that_do_not() -> None:
    n, d = grid(6, 5, 3)
    fits = {
        name: fit_law(
            "joint", [n, d], loss(n, d, 0.01, seed, alpha=alpha, A=0.03 * 1e6**alpha), replace(FEW, seed=seed)
        )
        for seed, (name, alpha) in enumerate({"one": 0.3, "same": 0.3, "steep": 0.55}.items())
    }
    found = {(one.first, one.second, one.quantity): one for one in compare({**fits, "again": fits["one"]})}
    assert len(found) == 6 * 4
    assert not found["one", "same", "alpha"].distinct
    apart = found["one", "steep", "alpha"]
    assert apart.distinct
    assert apart.value.high < 0
    ratio = found["one", "same", "loss"]
    assert ratio.at == (n.max(), d.max())
    assert ratio.value.covers(1.0)
    assert found["one", "steep", "loss"].value.low > 1
    # Refits of equal seeds are not taken for pairs: the difference of a fit from itself is uncertain.
    itself, alpha = found["one", "again", "alpha"].value, fits["one"].estimates["alpha"]
    assert itself.high - itself.low > 1.2 * (alpha.high - alpha.low)


def test_ratio_at_the_largest_common_budget() -> None:
    c, factors = np.repeat(np.logspace(12, 15, 5), 2), noise(0.01, 10)
    settings = FitSettings(bootstrap=60, floor=False)
    fits = {
        "short": fit_law("power", [c], 2.0 * c**-0.1 * factors, settings),
        "long": fit_law("power", [100 * c], c**-0.1 * 100**-0.1 * factors[::-1], settings),
        "far": fit_law("power", [1e9 * c], (1e9 * c) ** -0.1 * factors[::-1], settings),
    }
    near, far, _ = (one for one in compare(fits) if one.quantity == "loss")
    assert near.at == (1e15,)
    assert near.value.value == pytest.approx(2, abs=0.1)
    assert (near.extrapolated, far.extrapolated) == ((), ("far",))
    exact = fit_law("power", [[1e12, 1e13, 1e14]], [0.3, 0.2, 0.15], FEW)
    difference, ratio = compare({"a": exact, "b": exact})
    assert not difference.value.known
    assert not difference.distinct
    assert ratio.value.value == 1.0


def test_everything_the_records_allow(tmp_path: Path) -> None:
    n, d = grid()
    runs = records(n, d, loss(n, d, 0.02, 1, E=0.03), "hard")
    small = grid(2, 2)
    few = records(*small, loss(*small, 0.02), "few")
    write_study(tmp_path, [*runs[:-1], replace(runs[-1], losses={})], few)
    found = fit_study(tmp_path, settings=FEW)
    assert list(found.variants) == ["default", "hard", "few", "isoflop"]
    one = found.variants["default"]
    assert one.power is not None
    assert one.gamma_difference is not None
    assert len(one.joint.left_out) == 2
    assert len(one.frontier.loss) >= 6
    assert found.variants["isoflop"].isoflop is not None
    assert "1 of 24 runs have no forces_mae and are left out" in found.variants["hard"].notes
    assert found.variants["few"].joint is None
    assert any("4 distinct points (N, D) for a law of 5 parameters" in note for note in found.variants["few"].notes)


@pytest.mark.bad_input
def test_nothing_can_be_fitted(tmp_path: Path) -> None:
    write(tmp_path, records(np.array([1e5, 1e6]), np.array([1e3, 1e3]), np.array([0.2, 0.1])))
    with pytest.raises(DataError, match="nothing can be fitted: law of N and D not fitted: 2 distinct points"):
        fit_study(tmp_path, settings=FEW)
    with pytest.raises(DataError, match="no record holds 'energy_mae': use --metric with one of forces_mae"):
        fit_study(tmp_path, "energy_mae")
