"""Errors of means of correlated samples."""

from __future__ import annotations

import numpy as np
import pytest

from escaip.simulate.analysis import Average


def correlated(seed: int, memory: float, number: int = 4096) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=number)
    values = np.empty(number)
    values[0] = noise[0] / np.sqrt(1 - memory**2)
    for index in range(1, number):
        values[index] = memory * values[index - 1] + noise[index]
    return values


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_the_error_is_that_of_correlated_samples(memory: float) -> None:
    """The mean of an autoregressive series deviates by σ/(1 − φ)/√S."""
    found = [Average.of(correlated(seed, memory)) for seed in range(40)]
    errors = np.array([one.error for one in found if one is not None], dtype=float)
    assert errors.mean() == pytest.approx(1 / (1 - memory) / 64, rel=0.12)
    means = np.array([one.mean for one in found if one is not None])
    assert np.sqrt((means**2).mean()) == pytest.approx(errors.mean(), rel=0.3)


def test_series_too_short_for_an_error() -> None:
    one = Average.of(np.array([1.0, 2.0, np.nan]))
    assert one is not None
    assert (one.mean, one.error, one.num_samples) == (1.5, None, 2)
    ramp = Average.of(np.arange(64.0))
    assert ramp is not None
    assert ramp.error is None  # as long as the correlation
    constant = Average.of(np.full(10, 3.0))
    assert constant is not None
    assert constant.error == 0.0
    assert Average.of(np.array([np.nan])) is None
