"""Mean-square displacement and diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from escaip.analysis.correlation import square_displacement
from escaip.errors import DataError, UsageError

Array = NDArray[np.float64]
CM2_PER_S = 0.1
"""cm²/s per Å²/fs."""
_WINDOW = (0.1, 0.5)
_FEWEST_LAGS = 4


@dataclass(frozen=True)
class Diffusion:
    """Of one group of atoms.

    Attributes:
        coefficient: cm²/s, a sixth of the slope of the MSD in the window.
        error: cm²/s, standard error from the coefficients of the blocks; None with one block.
        exponent: of a power law fitted in the window: 1 where atoms diffuse, 2 where they fly, 0 where they are held.
    """

    coefficient: float
    error: float | None
    exponent: float | None


@dataclass(frozen=True)
class Transport:
    """Result of :func:`mean_square_displacement`.

    Attributes:
        lag: ``(L,)`` fs.
        msd: ``(L,)`` Å², by group.
        diffusion: by group.
        window: fs, first and last lag of the fits.
        num_blocks: that the errors come from.
    """

    lag: Array
    msd: dict[str, Array]
    diffusion: dict[str, Diffusion]
    window: tuple[float, float]
    num_blocks: int


def mean_square_displacement(
    positions: Array,
    groups: list[str],
    weights: Array,
    interval: float,
    *,
    window: tuple[float, float] | None = None,
    num_blocks: int = 5,
) -> Transport:
    """MSD over all time origins, and diffusion coefficients ``D = (1/6) d MSD/dt`` (Einstein) with errors.

    Args:
        positions: ``(F, N, 3)`` Å, unwrapped.
        groups: names of the groups of atoms.
        weights: ``(N, G)``, one column for each group, of sum 1.
        interval: fs between frames.
        window: fs, first and last lag of the linear fit; by default from 0.1 to 0.5 of a block.
        num_blocks: equal parts in time whose coefficients, fitted in the same window, give the error.

    Raises:
        UsageError: a window or a number of blocks that does not fit the trajectory.
        DataError: too few frames.
    """
    num_frames = len(positions)
    if num_blocks < 1:
        raise UsageError(f"the number of blocks is {num_blocks}: it must be at least 1")
    length = num_frames // num_blocks
    first, last = _fit_lags(window, interval, length, num_blocks)
    num_lags = max(num_frames // 2, last + 1)
    curves = square_displacement(positions, weights, num_lags)
    whole = [_slope(curves[:, group], first, last, interval) for group in range(len(groups))]
    parts = np.empty((num_blocks, len(groups)))
    for block in range(num_blocks if num_blocks > 1 else 0):
        part = square_displacement(positions[block * length : (block + 1) * length], weights, last + 1)
        parts[block] = [_slope(part[:, group], first, last, interval) for group in range(len(groups))]
    unit = CM2_PER_S / 6
    diffusion = {
        name: Diffusion(
            whole[group] * unit,
            float(parts[:, group].std(ddof=1) / np.sqrt(num_blocks)) * unit if num_blocks > 1 else None,
            _exponent(curves[:, group], first, last),
        )
        for group, name in enumerate(groups)
    }
    msd = {name: curves[:, group] for group, name in enumerate(groups)}
    lag: Array = interval * np.arange(num_lags, dtype=np.float64)
    return Transport(lag, msd, diffusion, (first * interval, last * interval), num_blocks)


def _fit_lags(window: tuple[float, float] | None, interval: float, length: int, num_blocks: int) -> tuple[int, int]:
    """First and last lag of the fits, in frames."""
    if window is None:
        first, last = max(1, round(_WINDOW[0] * length)), int(_WINDOW[1] * length)
        if last - first + 1 < _FEWEST_LAGS:
            needed = num_blocks * round(_FEWEST_LAGS / (_WINDOW[1] - _WINDOW[0]))
            raise DataError(f"too few frames for mean-square displacements: at least {needed} for {num_blocks} blocks")
        return first, last
    first, last = max(1, int(np.ceil(window[0] / interval - 1e-6))), int(window[1] / interval + 1e-6)
    if not 0 <= window[0] < window[1] or last - first + 1 < _FEWEST_LAGS or last > 0.9 * length:
        raise UsageError(
            f"the fit of the mean-square displacement, {window[0]:g} to {window[1]:g} fs, must hold {_FEWEST_LAGS} "
            f"frames, {interval:g} fs apart, and end before 0.9 of a block, {0.9 * length * interval:g} fs"
        )
    return first, last


def _slope(curve: Array, first: int, last: int, interval: float) -> float:
    """Å²/fs."""
    lags = np.arange(first, last + 1)
    centered = lags - lags.mean()
    return float((centered * curve[first : last + 1]).sum() / (centered**2).sum() / interval)


def _exponent(curve: Array, first: int, last: int) -> float | None:
    values = curve[first : last + 1]
    if not (values > 0).all():
        return None
    return float(np.polyfit(np.log(np.arange(first, last + 1)), np.log(values), 1)[0])
