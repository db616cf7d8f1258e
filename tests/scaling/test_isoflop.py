"""Parabolas of budgets, their minima, and how these grow."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_runs import LAW, loss

from escaip.errors import DataError, UsageError
from escaip.scaling import FitSettings, fit_isoflop
from escaip.scaling.isoflop import budgets, is_isoflop

FEW = FitSettings(bootstrap=300)


def plan(span: float = 6.0, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C, N and D of four budgets with seven sizes about the best each, C = 60 N D."""
    c = np.repeat(np.logspace(12, 15, 4), 14)
    a = LAW["beta"] / (LAW["alpha"] + LAW["beta"])
    best = (LAW["alpha"] * LAW["A"] / LAW["beta"] / LAW["B"]) ** (1 / (LAW["alpha"] + LAW["beta"])) * (c / 60) ** a
    n = best * shift * np.tile(np.repeat(np.logspace(-np.log10(span), np.log10(span), 7), 2), 4)
    return c, n, c / (60 * n)


def test_minima_and_exponents_are_found() -> None:
    """Exponents of the best size and data are β/(α+β) and α/(α+β)."""
    c, n, d = plan()
    found = fit_isoflop(c, n, d, loss(n, d, 0.005), FEW)
    assert len(found.parabolas) == 4
    assert found.size_exponent is not None
    assert found.data_exponent is not None
    assert found.size_exponent.value == pytest.approx(0.4 / 0.7, abs=0.06)
    assert found.data_exponent.value == pytest.approx(0.3 / 0.7, abs=0.06)
    assert found.size_exponent.value + found.data_exponent.value == pytest.approx(1.0, abs=1e-6)
    assert found.size_exponent.covers(0.4 / 0.7)
    for one in found.parabolas:
        assert one.best_parameters is not None
        assert one.best_structures is not None
        assert one.best_loss is not None
        assert one.best_parameters.value * one.best_structures.value * 60 == pytest.approx(one.flops, rel=1e-6)
        assert one.best_parameters.covers(one.best_parameters.value)
        middle = np.sqrt(one.sizes[0] * one.sizes[1])
        assert one.best_parameters.value == pytest.approx(middle, rel=0.3)
    assert found.warnings == ()


def test_intervals_of_exponents_hold_the_truth() -> None:
    c, n, d = plan()
    exact = np.array([found.size_exponent.value for found in [fit_isoflop(c, n, d, loss(n, d), FEW)]])[0]  # type: ignore[union-attr]
    held = 0
    for seed in range(30):
        found = fit_isoflop(c, n, d, loss(n, d, 0.02, seed), FitSettings(bootstrap=200, seed=seed)).size_exponent
        held += found is not None and found.covers(exact)
    assert held >= 23


def test_a_minimum_outside_of_the_sizes_is_refused() -> None:
    c, n, d = plan(3.0, 8.0)
    found = fit_isoflop(c, n, d, loss(n, d), FEW)
    assert all(one.best_parameters is None for one in found.parabolas)
    assert found.size_exponent is None
    assert "its minimum lies outside of N" in found.warnings[0]
    assert "add smaller models at this budget" in found.warnings[0]
    assert "fewer than two budgets" in found.warnings[-1]
    upward = fit_isoflop(*plan(3.0, 1 / 8), loss(*plan(3.0, 1 / 8)[1:]), FEW)
    assert "add larger models" in upward.warnings[0]


def test_a_curve_without_a_minimum_is_refused() -> None:
    c = np.full(5, 1e12)
    n = np.logspace(4, 6, 5)
    found = fit_isoflop(c, n, c / n, np.exp(-0.1 * np.log(n / 1e5) ** 2), FEW)
    assert "the curve has no minimum" in found.warnings[0]


def test_what_is_hardly_known_is_said() -> None:
    c, n, d = plan()
    noisy = fit_isoflop(c[:28], n[:28], d[:28], loss(n[:28], d[:28], 0.005), FEW)
    assert any("two budgets only" in one for one in noisy.warnings)
    picked = np.concatenate([np.arange(0, 14, 6), np.arange(14, 28, 6)])
    exact = fit_isoflop(c[picked], n[picked], d[picked], loss(n[picked], d[picked]), FEW)
    assert any("nothing is left to tell the noise from" in one for one in exact.warnings)
    assert exact.size_exponent is not None
    assert not exact.size_exponent.known


def test_budgets_are_grouped_within_the_tolerance() -> None:
    c = np.array([1.0, 2.0, 1.05, 0.96, 2.1, 1.3])
    assert [sorted(group.tolist()) for group in budgets(c)] == [[0, 2, 3], [5], [1, 4]]
    chain = 1.05 ** np.arange(9)
    assert max(len(group) for group in budgets(chain)) == 4
    assert is_isoflop([1, 1, 1, 5], [1, 2, 3, 4])
    assert not is_isoflop([1, 1, 1, 5], [1, 2, 2, 4])


@pytest.mark.bad_input
def test_no_budget() -> None:
    with pytest.raises(DataError, match="no budget holds three sizes within 8 %"):
        fit_isoflop([1e12, 1e13], [1e5, 1e6], [10, 20], [0.2, 0.1])
    with pytest.raises(UsageError, match=r"tolerance is 0\.9"):
        budgets([1.0], 0.9)
