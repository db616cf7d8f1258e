"""Velocity autocorrelation and the spectrum of vibrations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.signal import find_peaks

from escaip.analysis.correlation import autocorrelation
from escaip.errors import DataError, UsageError

Array = NDArray[np.float64]
WAVENUMBER = 33356.409519815205
"""cm⁻¹ per fs⁻¹: 10¹⁵ over the speed of light in cm/s."""
_LONGEST = 5000.0
_FEWEST_LAGS = 16
_PROMINENCE = 0.05
_MOST_PEAKS = 20


@dataclass(frozen=True)
class Vibrations:
    """Result of :func:`vibrations`.

    Attributes:
        lag: ``(L,)`` fs.
        vacf: ``(L,)`` Å²/fs², ``⟨v(0)·v(t)⟩`` averaged over the atoms of each group.
        frequency: ``(K,)`` cm⁻¹.
        spectrum: ``(K,)`` per cm⁻¹, by group: that of ``"all"`` has the integral 1 and is the sum of the elements'.
        peaks: cm⁻¹, maxima of the spectrum of all, largest first.
        resolution: cm⁻¹, full width at half maximum of a sharp line.
        highest: cm⁻¹; what vibrates faster is folded back below it.
        mass_weighted: whether atoms are weighted with their masses.
    """

    lag: Array
    vacf: dict[str, Array]
    frequency: Array
    spectrum: dict[str, Array]
    peaks: Array
    resolution: float
    highest: float
    mass_weighted: bool


def vibrations(
    velocities: Array,
    groups: list[str],
    weights: Array,
    masses: Array,
    interval: float,
    *,
    length: float | None = None,
    mass_weighted: bool = True,
) -> Vibrations:
    """Velocity autocorrelation over all time origins, and its cosine transform.

    ``S(ν) ∝ ∫ w(t) Σ_i m_i ⟨v_i(0)·v_i(t)⟩ cos(2πνt) dt``. Weighted with masses and in equilibrium this is the
    vibrational density of states of a harmonic system (Dickey and Paskin, Phys. Rev. 188, 1407 (1969)): every mode
    has the same area. ``w`` is the Hann window, which falls from 1 to 0 over ``length``.

    Args:
        velocities: ``(F, N, 3)`` Å/fs.
        groups: names of the groups of atoms, the first of all atoms.
        weights: ``(N, G)``, one column for each group, of sum 1.
        masses: ``(N,)`` amu.
        interval: fs between frames.
        length: fs of the autocorrelation; by default half of the trajectory, at most 5000.
        mass_weighted: weight atoms with their masses; else each counts alike.

    Raises:
        UsageError: a length that does not fit the trajectory.
        DataError: too few frames, or nothing moves.
    """
    num_frames, num_atoms = velocities.shape[:2]
    span = (num_frames - 1) * interval
    num_lags = int((min(_LONGEST, 0.5 * span) if length is None else length) / interval + 1e-6) + 1
    if num_lags < _FEWEST_LAGS and length is None:
        raise DataError(f"too few frames for a velocity autocorrelation: at least {2 * _FEWEST_LAGS}")
    if num_lags < _FEWEST_LAGS or num_lags > num_frames:
        raise UsageError(
            f"the length of the velocity autocorrelation is {length:g} fs: it must hold {_FEWEST_LAGS} frames, "
            f"{interval:g} fs apart, and not exceed the trajectory, {span:g} fs"
        )
    members = (weights > 0) * (masses if mass_weighted else np.ones(num_atoms))[:, None]
    both = autocorrelation(velocities, np.concatenate([weights, members], axis=1), num_lags)
    curves, weighted = both[:, : len(groups)], both[:, len(groups) :]
    if not weighted[0, 0] > 0:
        raise DataError("no velocities that are not zero: the trajectory must hold momenta")
    frequency, spectrum = _cosine_transform(weighted / weighted[0, 0], interval)
    return Vibrations(
        lag=interval * np.arange(num_lags, dtype=np.float64),
        vacf={name: curves[:, group] for group, name in enumerate(groups)},
        frequency=frequency,
        spectrum={name: spectrum[:, group] for group, name in enumerate(groups)},
        peaks=_peaks(frequency, spectrum[:, 0]),
        resolution=WAVENUMBER / (num_lags * interval),
        highest=WAVENUMBER / (2 * interval),
        mass_weighted=mass_weighted,
    )


def _cosine_transform(curves: Array, interval: float) -> tuple[Array, Array]:
    """Frequencies in cm⁻¹, and ``(K, G)`` spectra per cm⁻¹ whose integral is the value at lag 0."""
    num_lags = len(curves)
    window = 0.5 * (1.0 + np.cos(np.pi * np.arange(num_lags) / num_lags))
    size = scipy.fft.next_fast_len(4 * num_lags, real=True) + 1  # four points to a resolved line
    padded = np.zeros((size, curves.shape[1]))
    padded[:num_lags] = curves * window[:, None]
    spectrum = scipy.fft.dct(padded, type=1, axis=0) * (2.0 * interval / WAVENUMBER)
    return WAVENUMBER * np.arange(size) / (2.0 * interval * (size - 1)), spectrum


def _peaks(frequency: Array, spectrum: Array) -> Array:
    """Maxima by the parabola through the three highest points of each."""
    found, _ = find_peaks(spectrum, prominence=_PROMINENCE * float(spectrum.max()))
    found = found[np.argsort(-spectrum[found], kind="stable")][:_MOST_PEAKS]
    left, middle, right = spectrum[found - 1], spectrum[found], spectrum[found + 1]
    shift = 0.5 * (left - right) / (left - 2.0 * middle + right)
    places: Array = frequency[found] + shift * (frequency[1] - frequency[0])
    return places
