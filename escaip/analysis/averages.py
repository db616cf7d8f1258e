"""Means of correlated samples with errors that can be believed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FEWEST_BLOCKS = 4


@dataclass(frozen=True)
class Average:
    """Of a time series.

    Attributes:
        mean: in the unit of the series.
        error: standard error of the mean; None where the series is too short to tell.
        deviation: standard deviation of the samples.
        num_samples: that were finite.
    """

    mean: float
    error: float | None
    deviation: float
    num_samples: int

    @classmethod
    def of(cls, series: NDArray[np.float64]) -> Average | None:
        """From ``(S,)`` samples, NaN where there is none; None without any.

        The error is that of block means (Flyvbjerg and Petersen, J. Chem. Phys. 91, 461 (1989)) at the first block
        length ``B`` that correlation no longer matters for: ``B³ > 2 S (σ_B/σ_1)⁴`` (Lee et al., Phys. Rev. E 83,
        066706 (2011)), ``σ_B`` being the error that blocks of length ``B`` give.
        """
        values = series[np.isfinite(series)]
        if len(values) == 0:
            return None
        return cls(float(values.mean()), _error(values), float(values.std()), len(values))


def _error(values: NDArray[np.float64]) -> float | None:
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
