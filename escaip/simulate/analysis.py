"""Averages, drift, radial distributions, diffusion and vibrations from the time series of a run.

Groups of atoms are given as names and weights ``(N, G)``: one column per group, zero for atoms outside it, of sum 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.fft
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray

from escaip.errors import DataError, UsageError

Array = NDArray[np.float64]
WAVENUMBER = 33356.409519815205
"""cm⁻¹ per fs⁻¹: 10¹⁵ over the speed of light in cm/s."""
_CM2_PER_S = 0.1  # per Å²/fs
_FFT_BYTES = 128 * 1024**2
_FEWEST_BLOCKS = 4
_BLOCKS = 5  # equal parts in time whose coefficients, fitted in the same window, give the error of diffusion
_FIT = (0.1, 0.5)  # window of the fit of diffusion, as parts of a block
_FEWEST_FITTED = 4
_FEWEST_LAGS, _LONGEST_LAG = 16, 5000.0
_MOST_PEAKS = 20


@dataclass(frozen=True)
class EnergyDrift:
    """Conservation of energy in a run.

    Attributes:
        slope: meV per atom per ps, of a linear fit against time.
        error: standard error of the slope, meV per atom per ps, for uncorrelated samples.
        fluctuation: root mean square about the fit, meV per atom.
    """

    slope: float
    error: float
    fluctuation: float


def energy_drift(time: Array, energy: Array, num_atoms: int) -> EnergyDrift | None:
    """Fits a line to the conserved energy ``(S,)`` eV, NaN where it is not defined, over the time ``(S,)`` fs.

    None for fewer than three samples, or where nothing is conserved.
    """
    valid = np.isfinite(energy)
    picoseconds, values = time[valid] * 1e-3, energy[valid] * (1e3 / num_atoms)
    if len(values) < 3 or np.ptp(picoseconds) == 0.0:
        return None
    x, y = picoseconds - picoseconds.mean(), values - values.mean()
    slope = float(x @ y / (x @ x))
    squares = float(((y - slope * x) ** 2).sum())
    error = np.sqrt(squares / (len(values) - 2) / (x @ x))
    return EnergyDrift(slope, float(error), float(np.sqrt(squares / len(values))))


@dataclass(frozen=True)
class Average:
    """Mean of a time series, in its unit."""

    mean: float
    error: float | None  # standard error of the mean; None where the series is too short to tell
    deviation: float  # standard deviation of the samples
    num_samples: int  # that are finite

    @classmethod
    def of(cls, series: Array) -> Average | None:
        """Averages ``(S,)`` samples, NaN where there is none; None without any.

        The error is that of block means (Flyvbjerg and Petersen, J. Chem. Phys. 91, 461 (1989)) at the first block
        length ``B`` beyond which correlation no longer matters: ``B³ > 2 S (σ_B/σ_1)⁴`` (Lee et al., Phys. Rev. E 83,
        066706 (2011)), where ``σ_B`` is the error that blocks of length ``B`` give.
        """
        values = series[np.isfinite(series)]
        if len(values) == 0:
            return None
        return cls(float(values.mean()), _block_error(values), float(values.std()), len(values))


def _block_error(values: Array) -> float | None:
    if np.ptp(values) == 0.0:
        return 0.0 if len(values) >= _FEWEST_BLOCKS else None
    blocks, length, first = values, 1, 0.0
    while len(blocks) >= _FEWEST_BLOCKS:
        error = float(blocks.std(ddof=1) / np.sqrt(len(blocks)))
        first = first or error
        if length**3 > 2 * len(values) * (error / first) ** 4:
            return error
        even = len(blocks) // 2 * 2
        blocks, length = 0.5 * (blocks[0:even:2] + blocks[1:even:2]), 2 * length
    return None


def autocorrelation(series: Array, weights: Array, num_lags: int) -> Array:
    """Returns ``C_g(m) = Σ_i w_ig ⟨x_i(t) · x_i(t + m)⟩_t``, ``(num_lags, G)``, of a series ``(F, N, 3)``.

    Lag ``m``, from 0 to at most ``F − 1``, is the mean over its ``F − m`` time origins; by zero-padded transforms.
    """
    total = np.zeros((num_lags, weights.shape[1]))
    for block, part in _blocks_of_atoms(series):
        total += _correlate(part, num_lags) @ weights[block]
    return total / (len(series) - np.arange(num_lags))[:, None]


def square_displacement(series: Array, weights: Array, num_lags: int) -> Array:
    """Returns ``Σ_i w_ig ⟨|x_i(t + m) − x_i(t)|²⟩_t``; arguments and shape as for ``autocorrelation``.

    Squares are summed directly and products by Fourier transform (Calandrini et al., Collection SFN 12, 201 (2011)).
    Each atom's mean is subtracted first, since the two sums cancel.
    """
    num_frames, lags = len(series), np.arange(num_lags)
    total = np.zeros((num_lags, weights.shape[1]))
    for block, part in _blocks_of_atoms(series):
        part = part - part.mean(axis=0)
        squares = np.zeros((num_frames + 1, part.shape[1]))
        np.cumsum((part**2).sum(axis=2), axis=0, out=squares[1:])
        both = squares[num_frames - lags] + squares[num_frames] - squares[lags]
        total += np.maximum(both - 2.0 * _correlate(part, num_lags), 0.0) @ weights[block]
    return total / (num_frames - lags)[:, None]


def _blocks_of_atoms(series: Array) -> Iterator[tuple[slice, Array]]:
    """Yields a few atoms at a time, so that a series in a file is never in memory as a whole."""
    num_frames, num_atoms = series.shape[:2]
    width = max(1, _FFT_BYTES // (2 * num_frames * 3 * 24))
    for start in range(0, num_atoms, width):
        block = slice(start, start + width)
        yield block, np.asarray(series[:, block], dtype=np.float64)


def _correlate(part: Array, num_lags: int) -> Array:
    """Returns ``(num_lags, n)`` sums over origins and components of ``(F, n, 3)``."""
    size = scipy.fft.next_fast_len(len(part) + num_lags, real=True)
    spectrum = scipy.fft.rfft(part, size, axis=0)
    return scipy.fft.irfft((spectrum.real**2 + spectrum.imag**2).sum(axis=2), size, axis=0)[:num_lags]


class Unwrapper:
    """Follows atoms out of the cell, whether the file wraps positions or not.

    From frame to frame an atom is taken to move to the nearest image of its new position, and its wrapped displacements
    are added up (von Bülow, Bullerjahn and Hummer, J. Chem. Phys. 153, 021101 (2020)), which also holds where the cell
    changes. Axes that are not periodic are left alone. ``farthest`` is the largest displacement between two frames so
    far, as a fraction of the cell; the nearest image is the wrong one beyond 0.5.
    """

    def __init__(self) -> None:
        self.farthest = 0.0
        self._before: tuple[Array, Array] | None = None  # unwrapped and wrapped positions

    def __call__(self, frame: Atoms) -> Array:
        """Returns the positions ``(N, 3)`` Å of the next frame."""
        unwrapped = frame.get_positions()
        if not frame.pbc.any():
            return unwrapped
        cell = frame.cell.complete().array
        inverse = np.linalg.inv(cell)
        wrapped = frame.positions - np.where(frame.pbc, np.floor(frame.positions @ inverse), 0.0) @ cell
        if self._before is not None:
            moved = wrapped - self._before[1]
            moved = moved - np.where(frame.pbc, np.round(moved @ inverse), 0.0) @ cell
            self.farthest = max(self.farthest, float(np.abs((moved @ inverse)[:, frame.pbc]).max()))
            unwrapped = self._before[0] + moved
        self._before = unwrapped, wrapped
        return unwrapped


@dataclass(frozen=True)
class FirstShell:
    """First coordination shell of ``B`` around ``A``."""

    peak: float  # Å, first maximum of g(r)
    end: float  # Å, the minimum after it
    coordination: float  # mean number of B within the end of an A


@dataclass(frozen=True)
class RadialDistribution:
    """Result of ``radial_distribution``: arrays ``(B,)`` over bins, for ``"all"`` pairs and each ``"A-B"``."""

    distance: Array  # Å, middles of the bins
    edges: Array  # Å, upper edges of the bins
    g: dict[str, Array]  # 1 in an ideal gas
    neighbors: dict[str, Array]  # mean number of B within the upper edge of an A
    num_frames: int

    def first_shell(self, pair: str) -> FirstShell | None:
        """Returns the first coordination shell of a pair; None where g(r) has no maximum with a minimum after it."""
        from scipy.ndimage import gaussian_filter1d
        from scipy.signal import find_peaks

        smooth = gaussian_filter1d(self.g[pair], 0.05 / self.edges[0], mode="constant")  # the width of a bin
        peaks, _ = find_peaks(smooth, prominence=0.2)
        if len(peaks) < 2:
            return None
        between = smooth[peaks[0] : peaks[1]]
        lowest = np.flatnonzero(between <= between.min() + 1e-3)  # the middle of an empty gap between shells
        end = peaks[0] + int(lowest[len(lowest) // 2])
        peak = max(peaks[0] - 1, 0) + int(np.argmax(self.g[pair][max(peaks[0] - 1, 0) : peaks[0] + 2]))
        return FirstShell(float(self.distance[peak]), float(self.edges[end]), float(self.neighbors[pair][end]))


class RadialCounter:
    """Counts pairs frame by frame for ``radial_distribution``, whose arguments it takes beside a first frame."""

    def __init__(self, first: Atoms, r_max: float | None = None, width: float = 0.05) -> None:
        check_periodic(first)
        half = 0.5 / np.linalg.norm(first.cell.reciprocal(), axis=1).max()
        self.r_max = float(min(half, 10.0) if r_max is None else r_max)
        if not 0 < width <= self.r_max < np.inf:
            raise UsageError(
                f"r_max is {self.r_max} Å and the bin width {width} Å: both above 0, and the width below r_max"
            )
        self._numbers = first.numbers.copy()
        self._elements, self._kind = np.unique(first.numbers, return_inverse=True)
        shape = (len(self._elements), len(self._elements), max(1, round(self.r_max / width)))
        self._pairs, self._volume_pairs, self._num_frames = np.zeros(shape), np.zeros(shape), 0

    def add(self, frame: Atoms) -> None:
        """Counts the pairs of a frame; DataError where it is not periodic along three axes, or has other atoms."""
        from vesin import NeighborList

        check_periodic(frame)
        if not np.array_equal(frame.numbers, self._numbers):
            raise DataError("frames hold different atoms: analyse trajectories of one system")
        search = NeighborList(cutoff=self.r_max, full_list=False, n_threads=1)
        i, j, distance = search.compute(frame.positions, frame.cell.array, True, "ijd")
        shape = self._pairs.shape
        bins = np.minimum((distance * (shape[2] / self.r_max)).astype(np.int64), shape[2] - 1)
        index = np.ravel_multi_index((self._kind[i.astype(np.int64)], self._kind[j.astype(np.int64)], bins), shape)
        once = np.bincount(index, minlength=self._pairs.size).reshape(shape)
        counts = once + once.transpose(1, 0, 2)
        self._pairs += counts
        self._volume_pairs += counts * frame.get_volume()
        self._num_frames += 1

    def result(self) -> RadialDistribution:
        """Averages over the frames."""
        edges = np.linspace(0.0, self.r_max, self._pairs.shape[2] + 1)
        shells = 4.0 / 3.0 * np.pi * np.diff(edges**3) * self._num_frames
        number = np.bincount(self._kind).astype(np.float64)
        total = float(number.sum())
        names = [chemical_symbols[element] for element in self._elements]
        g = {"all": self._volume_pairs.sum(axis=(0, 1)) / (total * total * shells)}
        neighbors = {"all": np.cumsum(self._pairs.sum(axis=(0, 1))) / (total * self._num_frames)}
        for a, first in enumerate(names):
            for b, second in enumerate(names):
                g[f"{first}-{second}"] = self._volume_pairs[a, b] / (number[a] * number[b] * shells)
                neighbors[f"{first}-{second}"] = np.cumsum(self._pairs[a, b]) / (number[a] * self._num_frames)
        return RadialDistribution(0.5 * (edges[1:] + edges[:-1]), edges[1:], g, neighbors, self._num_frames)


def radial_distribution(frames: Iterable[Atoms], r_max: float | None = None, width: float = 0.05) -> RadialDistribution:
    """Computes radial distribution functions of all pairs and of each pair of elements.

    ``g_AB(r) = ⟨n_AB(r) V⟩ / (N_A N_B v(r))`` with ``n_AB(r)`` ordered pairs in a bin, periodic images included, and
    ``v(r)`` the volume of its shell. The density of neighbors is ``N_B/V`` also for like atoms, so that a crystal does
    not depend on the cell that describes it; a gas of ``N`` atoms tends to ``1 − 1/N``.

    Args:
        frames: of one system, periodic along three axes; the volume may change.
        r_max: Å, which may exceed the cell; by default half the smallest width of the first cell, at most 10.
        width: of a bin in Å; adjusted so that bins fill ``r_max``.

    Raises:
        DataError: not periodic along three axes, frames with different atoms, or none.
        UsageError: ``r_max`` or ``width`` out of range.
    """
    counter: RadialCounter | None = None
    for frame in frames:
        counter = counter or RadialCounter(frame, r_max, width)
        counter.add(frame)
    if counter is None:
        raise DataError("no frame to take a radial distribution of")
    return counter.result()


def check_periodic(frame: Atoms) -> None:
    """Raises DataError for a structure that is not periodic along three axes and so has no density."""
    if not frame.pbc.all() or frame.cell.rank < 3:
        raise DataError("a cell that is periodic along all three axes is needed: set cell and pbc")


@dataclass(frozen=True)
class Diffusion:
    """Diffusion of one group of atoms."""

    coefficient: float  # cm²/s, a sixth of the slope of the MSD in the window
    error: float  # cm²/s, standard error from the coefficients of the blocks
    exponent: float | None  # of a power law in the window: 1 for diffusion, 2 for free flight, 0 for bound atoms


@dataclass(frozen=True)
class Transport:
    """Result of ``mean_square_displacement``, by group of atoms."""

    lag: Array  # (L,) fs
    msd: dict[str, Array]  # (L,) Å²
    diffusion: dict[str, Diffusion]
    window: tuple[float, float]  # fs, first and last lag of the fits
    num_blocks: int  # that give the errors


def mean_square_displacement(
    positions: Array, groups: list[str], weights: Array, interval: float, window: tuple[float, float] | None = None
) -> Transport:
    """Computes the MSD over all time origins, and diffusion coefficients ``D = (1/6) d MSD/dt`` with errors.

    Args:
        positions: ``(F, N, 3)`` Å, unwrapped.
        groups: names of the groups of atoms.
        weights: ``(N, G)``.
        interval: fs between frames.
        window: fs, first and last lag of the linear fit; by default from 0.1 to 0.5 of a fifth of the run.

    Raises:
        UsageError: a window that does not fit the trajectory.
        DataError: too few frames.
    """
    length = len(positions) // _BLOCKS
    first, last = _fit_lags(window, interval, length)
    lags = np.arange(first, last + 1)

    def coefficients(msd: Array) -> Array:
        return np.polyfit(lags * interval, msd[lags], 1)[0] * (_CM2_PER_S / 6)

    curves = square_displacement(positions, weights, max(len(positions) // 2, last + 1))
    parts = [positions[block * length : (block + 1) * length] for block in range(_BLOCKS)]
    found = [coefficients(square_displacement(part, weights, last + 1)) for part in parts]
    errors = np.std(found, axis=0, ddof=1) / np.sqrt(_BLOCKS)
    diffusion = {}
    for name, values, coefficient, error in zip(groups, curves[lags].T, coefficients(curves), errors, strict=True):
        exponent = float(np.polyfit(np.log(lags), np.log(values), 1)[0]) if (values > 0).all() else None
        diffusion[name] = Diffusion(float(coefficient), float(error), exponent)
    msd = dict(zip(groups, curves.T, strict=True))
    lag = interval * np.arange(len(curves), dtype=np.float64)
    return Transport(lag, msd, diffusion, (first * interval, last * interval), _BLOCKS)


def _fit_lags(window: tuple[float, float] | None, interval: float, length: int) -> tuple[int, int]:
    """Returns the first and the last lag of the fits, in frames."""
    if window is None:
        first, last = max(1, round(_FIT[0] * length)), int(_FIT[1] * length)
        if last - first + 1 < _FEWEST_FITTED:
            needed = _BLOCKS * round(_FEWEST_FITTED / (_FIT[1] - _FIT[0]))
            raise DataError(f"too few frames for mean-square displacements: at least {needed} for {_BLOCKS} blocks")
        return first, last
    first, last = max(1, int(np.ceil(window[0] / interval - 1e-6))), int(window[1] / interval + 1e-6)
    if not 0 <= window[0] < window[1] or last - first + 1 < _FEWEST_FITTED or last > 0.9 * length:
        raise UsageError(
            f"the fit of the mean-square displacement, {window[0]:g} to {window[1]:g} fs, must hold {_FEWEST_FITTED} "
            f"frames, {interval:g} fs apart, and end before 0.9 of a block, {0.9 * length * interval:g} fs"
        )
    return first, last


@dataclass(frozen=True)
class Vibrations:
    """Result of ``vibrations``, by group of atoms."""

    lag: Array  # (L,) fs
    vacf: dict[str, Array]  # (L,) Å²/fs², ⟨v(0)·v(t)⟩ averaged over the atoms
    frequency: Array  # (K,) cm⁻¹
    spectrum: dict[str, Array]  # (K,) per cm⁻¹: that of "all" has the integral 1 and is the sum of the elements'
    peaks: Array  # cm⁻¹, maxima of the spectrum of all, largest first
    resolution: float  # cm⁻¹, full width at half maximum of a sharp line
    highest: float  # cm⁻¹; faster vibrations appear folded back below it


def vibrations(
    velocities: Array, groups: list[str], weights: Array, masses: Array, interval: float, length: float | None = None
) -> Vibrations:
    """Computes the velocity autocorrelation over all time origins, and its cosine transform.

    ``S(ν) ∝ ∫ w(t) Σ_i m_i ⟨v_i(0)·v_i(t)⟩ cos(2πνt) dt``. In equilibrium this is the vibrational density of states of
    a harmonic system (Dickey and Paskin, Phys. Rev. 188, 1407 (1969)): every mode has the same area. ``w`` is the Hann
    window, which falls from 1 to 0 over ``length``.

    Args:
        velocities: ``(F, N, 3)`` Å/fs.
        groups: names of the groups of atoms, the first of all atoms.
        weights: ``(N, G)``.
        masses: ``(N,)`` amu.
        interval: fs between frames.
        length: longest lag in fs; by default half of the trajectory, at most 5000.

    Raises:
        UsageError: a length that does not fit the trajectory.
        DataError: too few frames, or nothing moves.
    """
    num_frames = len(velocities)
    span = (num_frames - 1) * interval
    num_lags = int((min(_LONGEST_LAG, 0.5 * span) if length is None else length) / interval + 1e-6) + 1
    if num_lags < _FEWEST_LAGS and length is None:
        raise DataError(f"too few frames for a velocity autocorrelation: at least {2 * _FEWEST_LAGS}")
    if num_lags < _FEWEST_LAGS or num_lags > num_frames:
        raise UsageError(
            f"the length of the velocity autocorrelation is {length:g} fs: it must hold {_FEWEST_LAGS} frames, "
            f"{interval:g} fs apart, and not exceed the trajectory, {span:g} fs"
        )
    both = autocorrelation(velocities, np.hstack([weights, (weights > 0) * masses[:, None]]), num_lags)
    curves, weighted = both[:, : len(groups)], both[:, len(groups) :]
    if not weighted[0, 0] > 0:
        raise DataError("no velocities that are not zero: the trajectory must hold momenta")
    frequency, spectrum = _cosine_transform(weighted / weighted[0, 0], interval)
    return Vibrations(
        lag=interval * np.arange(num_lags, dtype=np.float64), vacf=dict(zip(groups, curves.T, strict=True)),
        frequency=frequency, spectrum=dict(zip(groups, spectrum.T, strict=True)),
        peaks=_peaks(frequency, spectrum[:, 0]), resolution=WAVENUMBER / (num_lags * interval),
        highest=WAVENUMBER / (2 * interval),
    )  # fmt: skip


def _cosine_transform(curves: Array, interval: float) -> tuple[Array, Array]:
    """Returns frequencies in cm⁻¹, and ``(K, G)`` spectra per cm⁻¹ whose integral is the value at lag 0."""
    num_lags = len(curves)
    window = 0.5 * (1.0 + np.cos(np.pi * np.arange(num_lags) / num_lags))
    size = scipy.fft.next_fast_len(4 * num_lags, real=True) + 1  # four points to a resolved line
    padded = np.zeros((size, curves.shape[1]))
    padded[:num_lags] = curves * window[:, None]
    spectrum = scipy.fft.dct(padded, type=1, axis=0) * (2.0 * interval / WAVENUMBER)
    return WAVENUMBER * np.arange(size) / (2.0 * interval * (size - 1)), spectrum


def _peaks(frequency: Array, spectrum: Array) -> Array:
    """Returns the maxima by the parabola through the three highest points of each."""
    from scipy.signal import find_peaks

    found, _ = find_peaks(spectrum, prominence=0.05 * float(spectrum.max()))
    found = found[np.argsort(-spectrum[found], kind="stable")][:_MOST_PEAKS]
    left, middle, right = spectrum[found - 1], spectrum[found], spectrum[found + 1]
    shift = 0.5 * (left - right) / (left - 2.0 * middle + right)
    return frequency[found] + shift * (frequency[1] - frequency[0])
