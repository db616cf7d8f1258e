"""Displacements against their definition, walks of known diffusion, and errors of means of correlated samples."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms

from escaip.errors import DataError, UsageError
from escaip.simulate.analysis import Average, Unwrapper, autocorrelation, mean_square_displacement, square_displacement
from escaip.simulate.report import frame_interval

DIFFUSION = 2e-3
"""Å²/fs, that is 2·10⁻⁴ cm²/s."""


def walk(seed: int, num_frames: int = 1000, num_atoms: int = 40, interval: float = 5.0) -> np.ndarray:
    steps = np.random.default_rng(seed).normal(size=(num_frames, num_atoms, 3)) * np.sqrt(2 * DIFFUSION * interval)
    return 50.0 + np.cumsum(steps, axis=0)


@pytest.mark.parametrize("memory", [1 << 27, 20_000], ids=["whole", "by atoms"])
def test_averages_over_origins_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr("escaip.simulate.analysis._FFT_BYTES", memory)
    rng = np.random.default_rng(0)
    series, weights = 100.0 + rng.normal(size=(57, 5, 3)).cumsum(axis=0), rng.uniform(size=(5, 2))
    for num_lags in (1, 20, 57):
        squares = square_displacement(series, weights, num_lags)
        products = autocorrelation(series, weights, num_lags)
        for lag in range(num_lags):
            later, earlier = series[lag:], series[: 57 - lag]
            assert squares[lag] == pytest.approx(((later - earlier) ** 2).sum(-1).mean(0) @ weights, abs=1e-9)
            assert products[lag] == pytest.approx((later * earlier).sum(-1).mean(0) @ weights, rel=1e-12)


def test_a_walk_diffuses_as_it_was_made_to() -> None:
    """Over twenty walks the deviations are as large as the errors that are given."""
    deviations, errors = [], []
    for seed in range(20):
        found = mean_square_displacement(walk(seed), ["all"], np.full((40, 1), 1 / 40), 5.0)
        one = found.diffusion["all"]
        assert one.exponent == pytest.approx(1.0, abs=0.15)
        deviations.append(one.coefficient - 0.1 * DIFFUSION)
        errors.append(one.error)
    assert found.window == (100.0, 500.0)
    assert found.msd["all"][:4] == pytest.approx(6 * DIFFUSION * found.lag[:4], rel=0.1)
    ratio = np.array(deviations) / np.array(errors)
    assert np.abs(ratio).max() < 5
    assert 0.5 < np.sqrt((ratio**2).mean()) < 1.6
    assert np.mean(errors) < 0.1 * 0.1 * DIFFUSION


def test_straight_flight_and_atoms_at_rest() -> None:
    time = 2.0 * np.arange(200)
    flying = np.zeros((200, 3, 3))
    flying[:, 0, 0] = 0.01 * time
    flying[:, 1, 1] = 0.02 * time
    found = mean_square_displacement(flying, ["fast", "rest"], np.array([[0.5, 0], [0.5, 0], [0, 1.0]]), 2.0)
    assert found.msd["fast"] == pytest.approx(2.5e-4 * found.lag**2, abs=1e-9)
    assert found.diffusion["fast"].exponent == pytest.approx(2.0)
    assert found.msd["rest"] == pytest.approx(0.0, abs=1e-12)
    assert found.diffusion["rest"].coefficient == pytest.approx(0.0, abs=1e-12)
    assert found.diffusion["rest"].exponent is None


def test_a_window_that_is_given() -> None:
    found = mean_square_displacement(walk(1), ["all"], np.full((40, 1), 1 / 40), 5.0, (20.0, 60.0))
    assert found.window == (20.0, 60.0)
    slope = np.polyfit(found.lag[4:13], found.msd["all"][4:13], 1)[0]
    assert found.diffusion["all"].coefficient == pytest.approx(0.1 * slope / 6)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((60.0, 20.0), "60 to 20 fs"),
        ((0.0, 5000.0), "end before 0.9 of a block, 900 fs"),
        ((20.0, 30.0), "must hold 4 frames, 5 fs apart"),
    ],
)
def test_windows_that_do_not_fit(window: tuple[float, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mean_square_displacement(walk(0), ["all"], np.full((40, 1), 1 / 40), 5.0, window)


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True)])
@pytest.mark.parametrize("wrapped", [True, False])
def test_atoms_are_followed_through_the_cell(pbc: tuple[bool, bool, bool], wrapped: bool) -> None:
    cell = np.array([[6.0, 0.0, 0.0], [2.0, 7.0, 0.0], [-1.0, 1.0, 8.0]])
    path = walk(2, 400, 6, 20.0)
    unwrap = Unwrapper()
    found = []
    for positions in path:
        frame = Atoms("Ar6", positions=positions, cell=cell, pbc=pbc)
        if wrapped:
            frame.wrap()
        found.append(unwrap(frame))
    moved = np.array(found)
    assert moved - moved[0] == pytest.approx(path - path[0], abs=1e-9)
    assert unwrap.farthest < 0.4


def test_an_axis_that_is_not_periodic_has_no_images() -> None:
    unwrap = Unwrapper()
    for place in (0.0, 7.0, 21.0):
        found = unwrap(Atoms("Ar", positions=[[0.0, 0.0, place]], cell=[10.0] * 3, pbc=(True, True, False)))
    assert found[0, 2] == 21.0
    assert unwrap.farthest == 0.0
    for place in (0.0, 4.4):  # a jump that can hardly be followed
        unwrap(Atoms("Ar", positions=[[place, 0.0, 21.0]], cell=[10.0] * 3, pbc=(True, True, False)))
    assert unwrap.farthest == pytest.approx(0.44)


def test_a_cell_that_breathes_does_not_carry_atoms_away() -> None:
    """An atom that has left the cell for its neighbor, wrapped or not, moves by what it moves within its own cell."""
    found = []
    for wrapped in (True, False):
        unwrap = Unwrapper()
        for length in (10.0, 10.5, 9.5, 10.2):
            frame = Atoms("Ar", scaled_positions=[[3.25, 0.5, -1.75]], cell=[length] * 3, pbc=True)
            if wrapped:
                frame.wrap()
            place = unwrap(frame)[0]
        found.append(place)
        assert np.abs(place - place.round()).max() < 1  # of the order of the change of the cell
    start = [np.array([2.5, 5.0, 2.5]), np.array([32.5, 5.0, -17.5])]
    assert found[0] - start[0] == pytest.approx(found[1] - start[1], abs=1e-9)
    assert found[0] - start[0] == pytest.approx([0.05, 0.1, 0.05])


def test_the_time_between_frames() -> None:
    assert frame_interval([0.0, 2.5, 5.0], None, 1, "a") == 2.5
    assert frame_interval([0.0, 5.0, 10.0], 2.5, 2, "a") == 5.0
    assert frame_interval([None, None], 2.0, 3, "a") == 6.0


@pytest.mark.bad_input
def test_times_that_cannot_be_used() -> None:
    with pytest.raises(UsageError, match="give --timestep"):
        frame_interval([None, None], None, 1, "a")
    with pytest.raises(UsageError, match=r"2\.5 fs apart: leave --timestep out"):
        frame_interval([0.0, 2.5, 5.0], 3.0, 1, "a")
    with pytest.raises(DataError, match=r"number 2 of those read comes after 7\.5 fs"):
        frame_interval([0.0, 2.5, 10.0, 12.5, 15.0], None, 1, "a")
    for times in ([0.0, None, 2.0], [0.0, 1.0, 0.5], [1.0]):
        with pytest.raises(DataError, match="do not increase"):
            frame_interval(times, None, 1, "a")


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
    assert (one.mean, one.error, one.num_samples) == (1.5, None, 2)
    ramp = Average.of(np.arange(64.0))
    assert ramp.error is None  # as long as the correlation
    constant = Average.of(np.full(10, 3.0))
    assert constant.error == 0.0
    assert Average.of(np.array([np.nan])) is None
