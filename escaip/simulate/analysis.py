"""What a log says about a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EnergyDrift:
    """How well a run conserved energy.

    Attributes:
        slope: meV per atom per ps, of a linear fit against time.
        error: standard error of the slope, meV per atom per ps, for uncorrelated samples.
        fluctuation: root mean square about the fit, meV per atom.
    """

    slope: float
    error: float
    fluctuation: float


def energy_drift(time: NDArray[np.float64], energy: NDArray[np.float64], num_atoms: int) -> EnergyDrift | None:
    """Fits a line to the conserved energy; None for fewer than three samples or where nothing is conserved.

    Args:
        time: ``(S,)`` fs.
        energy: ``(S,)`` eV, NaN where it is not defined.
        num_atoms: of the system.
    """
    valid = np.isfinite(energy)
    picoseconds, values = time[valid] * 1e-3, energy[valid] * (1e3 / num_atoms)
    if len(values) < 3 or np.ptp(picoseconds) == 0.0:
        return None
    centered = picoseconds - picoseconds.mean()
    spread = float((centered**2).sum())
    slope = float((centered * (values - values.mean())).sum()) / spread
    residual = values - values.mean() - slope * centered
    variance = float((residual**2).sum()) / (len(values) - 2)
    return EnergyDrift(slope, float(np.sqrt(variance / spread)), float(np.sqrt((residual**2).mean())))
