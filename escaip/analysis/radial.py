"""Radial distribution functions and coordination numbers of any periodic cell, out to any distance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks
from vesin import NeighborList

from escaip.errors import DataError, UsageError

Array = NDArray[np.float64]
_SMOOTHING = 0.05
_PROMINENCE = 0.2
_LARGEST = 10.0


@dataclass(frozen=True)
class FirstShell:
    """Of ``B`` around ``A``.

    Attributes:
        peak: Å, first maximum of g(r).
        end: Å, the minimum after it.
        coordination: mean number of ``B`` within ``end`` of an ``A``.
    """

    peak: float
    end: float
    coordination: float


@dataclass(frozen=True)
class RadialDistribution:
    """Result of :func:`radial_distribution`.

    Attributes:
        distance: ``(B,)`` Å, middles of the bins.
        edges: ``(B,)`` Å, upper edges of the bins.
        g: ``(B,)`` for ``"all"`` pairs and for each ``"A-B"``, in both orders; 1 in an ideal gas.
        neighbors: ``(B,)`` by the same names: mean number of ``B`` within the upper edge of an ``A``.
        num_frames: averaged over.
    """

    distance: Array
    edges: Array
    g: dict[str, Array]
    neighbors: dict[str, Array]
    num_frames: int

    def first_shell(self, pair: str) -> FirstShell | None:
        """The first coordination shell of a pair; None where g(r) shows no maximum with a minimum after it."""
        width = self.edges[1] - self.edges[0] if len(self.edges) > 1 else self.edges[0]
        smooth = gaussian_filter1d(self.g[pair], _SMOOTHING / width, mode="constant")
        peaks, _ = find_peaks(smooth, prominence=_PROMINENCE)
        if len(peaks) < 2:
            return None
        between = smooth[peaks[0] : peaks[1]]
        lowest = np.flatnonzero(between <= between.min() + 1e-3)  # of an empty gap between shells the middle
        end = peaks[0] + int(lowest[len(lowest) // 2])
        peak = max(peaks[0] - 1, 0) + int(np.argmax(self.g[pair][max(peaks[0] - 1, 0) : peaks[0] + 2]))
        return FirstShell(float(self.distance[peak]), float(self.edges[end]), float(self.neighbors[pair][end]))


class RadialCounter:
    """Counts pairs frame by frame.

    Args:
        r_max: Å; may reach beyond the cell.
        width: of a bin in Å; adjusted so that bins fill ``r_max``.
    """

    def __init__(self, r_max: float, width: float = 0.05) -> None:
        if not 0 < width <= r_max < np.inf:
            raise UsageError(f"r_max is {r_max} Å and the bin width {width} Å: both above 0, and the width below r_max")
        self.r_max = float(r_max)
        self.num_bins = max(1, round(r_max / width))
        self._numbers: NDArray[np.int64] | None = None
        self._elements: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._num_frames = 0

    def add(self, frame: Atoms) -> None:
        """Counts the pairs of a frame.

        Raises:
            DataError: not periodic along three axes, or other atoms than before.
        """
        check_periodic(frame)
        if self._numbers is None:
            self._numbers = frame.numbers.copy()
            self._elements, kind = np.unique(frame.numbers, return_inverse=True)
            self._kind = kind.astype(np.int64)
            size = len(self._elements)
            self._pairs = np.zeros((size, size, self.num_bins))
            self._volume_pairs = np.zeros_like(self._pairs)
        elif not np.array_equal(frame.numbers, self._numbers):
            raise DataError("frames hold different atoms: analyse trajectories of one system")
        size = len(self._elements)
        search = NeighborList(cutoff=self.r_max, full_list=False, n_threads=1)
        i, j, distance = search.compute(frame.positions, frame.cell.array, True, "ijd")
        bins = np.minimum((distance * (self.num_bins / self.r_max)).astype(np.int64), self.num_bins - 1)
        index = (self._kind[i.astype(np.int64)] * size + self._kind[j.astype(np.int64)]) * self.num_bins + bins
        once = np.bincount(index, minlength=self._pairs.size).reshape(self._pairs.shape)
        counts = once + once.transpose(1, 0, 2)
        self._pairs += counts
        self._volume_pairs += counts * frame.get_volume()
        self._num_frames += 1

    def result(self) -> RadialDistribution:
        """Averages over the frames.

        Raises:
            DataError: there were none.
        """
        if self._numbers is None:
            raise DataError("no frame to take a radial distribution of")
        edges = np.linspace(0.0, self.r_max, self.num_bins + 1)
        shells = 4.0 / 3.0 * np.pi * np.diff(edges**3)
        number = np.bincount(self._kind, minlength=len(self._elements)).astype(np.float64)
        total = float(number.sum())
        names = [chemical_symbols[element] for element in self._elements]
        g = {"all": self._volume_pairs.sum(axis=(0, 1)) / (total * total * shells * self._num_frames)}
        neighbors = {"all": np.cumsum(self._pairs.sum(axis=(0, 1))) / (total * self._num_frames)}
        for a, first in enumerate(names):
            for b, second in enumerate(names):
                pair = f"{first}-{second}"
                g[pair] = self._volume_pairs[a, b] / (number[a] * number[b] * shells * self._num_frames)
                neighbors[pair] = np.cumsum(self._pairs[a, b]) / (number[a] * self._num_frames)
        return RadialDistribution(0.5 * (edges[1:] + edges[:-1]), edges[1:], g, neighbors, self._num_frames)


def radial_distribution(frames: Iterable[Atoms], r_max: float, width: float = 0.05) -> RadialDistribution:
    """Radial distribution functions of all pairs and of each pair of elements.

    ``g_AB(r) = ⟨n_AB(r) V⟩ / (N_A N_B v(r))``: ``n_AB(r)`` ordered pairs in a bin, periodic images included, ``v(r)``
    the volume of its shell. The density of neighbors is ``N_B/V``, also for like atoms, so that a crystal does not
    depend on the cell it is described in; a gas of ``N`` atoms tends to ``1 − 1/N``.

    Args:
        frames: of one system, periodic along three axes; the volume may change.
        r_max: Å; may reach beyond the cell.
        width: of a bin in Å.

    Raises:
        DataError: not periodic along three axes, frames with different atoms, or none.
        UsageError: ``r_max`` or ``width`` out of range.
    """
    counter = RadialCounter(r_max, width)
    for frame in frames:
        counter.add(frame)
    return counter.result()


def check_periodic(frame: Atoms) -> None:
    """Refuses what has no density of its own.

    Raises:
        DataError: not periodic along three axes: relative to which density neighbors are counted would be arbitrary.
    """
    if not frame.pbc.all() or frame.cell.rank < 3:
        raise DataError("a cell that is periodic along all three axes is needed: set cell and pbc")


def default_r_max(frame: Atoms) -> float:
    """Å; half the smallest width of the cell, at most 10."""
    cell = frame.cell.array
    widths = frame.get_volume() / np.linalg.norm(np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]]), axis=1)
    return min(0.5 * float(widths.min()), _LARGEST)
