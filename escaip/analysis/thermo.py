"""Temperature, pressure and energy drift from the log of a run."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from escaip.analysis.averages import Average
from escaip.errors import DataError
from escaip.simulate.analysis import EnergyDrift, energy_drift
from escaip.simulate.output import read_log


class RunLog:
    """The lines of a log that belong to a part of a trajectory.

    Args:
        path: CSV of :func:`~escaip.simulate.run_md`.
        first, last: fs; None for no bound.

    Raises:
        DataError: missing, of another program, or without lines in that time.
    """

    def __init__(self, path: str | os.PathLike[str], first: float | None, last: float | None) -> None:
        path = Path(path)
        try:
            columns = read_log(path)
        except OSError as error:
            raise DataError(f"log {path} cannot be read ({error.strerror or error}): give --log FILE") from error
        except (KeyError, ValueError) as error:
            raise DataError(f"log {path} is none of escaip md ({error}): give --log FILE") from error
        time = columns["time_fs"]
        slack = 1e-6 * float(np.abs(time).max(initial=1.0))
        low, high = -np.inf if first is None else first - slack, np.inf if last is None else last + slack
        chosen = (time >= low) & (time <= high)
        if not chosen.any():
            raise DataError(f"log {path} has no line in the time of the frames: give --log FILE")
        self.path = path
        self.columns = {name: values[chosen] for name, values in columns.items()}

    def average(self, column: str) -> Average:
        """Mean of a column.

        Raises:
            DataError: the run has no such number.
        """
        found = Average.of(self.columns[column])
        if found is None:
            raise DataError(f"log {self.path} holds no {column}: it has no meaning for this run")
        return found

    def drift(self, num_atoms: int) -> EnergyDrift:
        """Drift of the conserved energy.

        Raises:
            DataError: nothing is conserved, or fewer than three lines.
        """
        found = energy_drift(self.columns["time_fs"], self.columns["conserved_energy_eV"], num_atoms)
        if found is None:
            raise DataError(f"log {self.path} has too few conserved energies: Langevin dynamics conserves none")
        return found

    def series(self, column: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Times in ps and values of a column, for plots."""
        return self.columns["time_fs"] * 1e-3, self.columns[column]
