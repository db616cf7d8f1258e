"""Averages over time origins by fast Fourier transform, atom by atom in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.fft
from numpy.typing import NDArray

Array = NDArray[np.float64]
_FFT_BYTES = 128 * 1024**2


def autocorrelation(series: Array, weights: Array, num_lags: int) -> Array:
    """``C_g(m) = Σ_i w_ig ⟨x_i(t) · x_i(t + m)⟩_t`` over every time origin, by zero-padded transforms.

    Args:
        series: ``(F, N, 3)`` any unit.
        weights: ``(N, G)``, one column for each group of atoms.
        num_lags: how many, from 0, at most ``F``.

    Returns:
        ``(num_lags, G)``, unbiased: lag ``m`` is divided by its ``F − m`` origins.
    """
    total = np.zeros((num_lags, weights.shape[1]))
    for block, part in _blocks(series):
        total += _correlate(part, num_lags) @ weights[block]
    return total / (len(series) - np.arange(num_lags))[:, None]


def square_displacement(series: Array, weights: Array, num_lags: int) -> Array:
    """``Σ_i w_ig ⟨|x_i(t + m) − x_i(t)|²⟩_t`` over every time origin; arguments and shape as above.

    The squares are summed directly and the products by :func:`autocorrelation`'s transform (Calandrini et al.,
    Collection SFN 12, 201 (2011)); each atom's mean is taken off first, since they cancel.
    """
    num_frames = len(series)
    lags = np.arange(num_lags)
    total = np.zeros((num_lags, weights.shape[1]))
    for block, part in _blocks(series):
        part = part - part.mean(axis=0)
        squares = np.zeros((num_frames + 1, part.shape[1]))
        np.cumsum((part**2).sum(axis=2), axis=0, out=squares[1:])
        both = squares[num_frames - lags] + squares[num_frames] - squares[lags]
        total += np.maximum(both - 2.0 * _correlate(part, num_lags), 0.0) @ weights[block]
    return total / (num_frames - lags)[:, None]


def _blocks(series: Array) -> Iterator[tuple[slice, Array]]:
    """A few atoms at a time: of a series in a file only those are in memory."""
    num_frames, num_atoms = series.shape[:2]
    width = max(1, _FFT_BYTES // (2 * num_frames * 3 * 24))
    for start in range(0, num_atoms, width):
        block = slice(start, start + width)
        yield block, np.asarray(series[:, block], dtype=np.float64)


def _correlate(part: Array, num_lags: int) -> Array:
    """``(num_lags, n)`` sums over origins and components of ``(F, n, 3)``."""
    size = scipy.fft.next_fast_len(len(part) + num_lags, real=True)
    spectrum = scipy.fft.rfft(part, size, axis=0)
    power = (spectrum.real**2 + spectrum.imag**2).sum(axis=2)
    found: Array = scipy.fft.irfft(power, size, axis=0)[:num_lags]
    return found
