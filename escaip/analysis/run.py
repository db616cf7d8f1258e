"""One pass over a trajectory, and what follows from it."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from ase import Atoms, units
from tqdm import tqdm

from escaip.analysis.averages import Average
from escaip.analysis.frames import Recording, Unwrapper, frame_interval, group_weights, velocities
from escaip.analysis.radial import RadialCounter, check_periodic, default_r_max
from escaip.analysis.report import Analysis
from escaip.analysis.settings import QUANTITIES, AnalysisSettings
from escaip.analysis.spectra import WAVENUMBER, vibrations
from escaip.analysis.thermo import RunLog
from escaip.analysis.transport import mean_square_displacement
from escaip.errors import DataError, UsageError
from escaip.simulate.output import read_trajectory

_FROM_LOG = ("temperature", "pressure", "drift")
_DYNAMIC = ("msd", "vacf")
_GRAM_PER_CM3 = units._amu * 1e27
"""g/cm³ per amu/Å³."""
# cm⁻¹ that stretching vibrations reach, with hydrogen and of the other light elements.
_FASTEST = ((("H",), 4500.0), (("B", "C", "N", "O", "F"), 2500.0))

T = TypeVar("T")


def analyze(
    path: str | os.PathLike[str], settings: AnalysisSettings | None = None, *, progress: bool = False
) -> Analysis:
    """Analyses a trajectory (docs/analysis.md) in one pass over its frames.

    Memory does not grow with its length, but for displacements and velocities, whose time series go to a temporary
    file beyond 1 GiB.

    Args:
        path: see :func:`~escaip.simulate.read_trajectory`.
        settings: what to compute; by default all that the trajectory allows, with notes on what it does not.
        progress: show a bar.

    Raises:
        DataError: the trajectory cannot be read, or does not hold what a quantity that is asked for needs.
        UsageError: settings that do not fit the trajectory, or the time between its frames is unknown.
    """
    settings = settings or AnalysisSettings()
    frames = read_trajectory(path, start=settings.start, stop=settings.stop, every=settings.every)
    first = next(frames, None)
    if first is None:
        raise DataError(f"trajectory {path} has no frame number {settings.start}: give a smaller --start")
    pass_ = _Pass(Path(path), first, settings)
    for frame in tqdm(itertools.chain([first], frames), unit=" frames", disable=not progress):
        pass_.add(frame)
    return pass_.result()


class _Pass:
    """What is gathered from frame to frame."""

    def __init__(self, path: Path, first: Atoms, settings: AnalysisSettings) -> None:
        self.path, self.first, self.settings = path, first, settings
        self.notes: list[str] = []
        self.times: list[float | None] = []
        self.volumes: list[float] = []
        wanted = settings.quantities or QUANTITIES
        self.wanted = {name for name in wanted if self._attempt(name, functools.partial(self._check, name))}
        self.radial: RadialCounter | None = None
        if "rdf" in self.wanted:
            self.radial = RadialCounter(settings.r_max or default_r_max(first), settings.bin_width)
        self.positions, self.velocities, self.unwrapper = Recording(), Recording(), Unwrapper()
        self.masses = first.get_masses()
        self.removes_drift = settings.remove_drift and not first.constraints and len(first) > 1

    def add(self, frame: Atoms) -> None:
        if not np.array_equal(frame.numbers, self.first.numbers):
            raise DataError(f"{self.path}: frame {len(self.times)} of those read holds other atoms than the first")
        self.times.append(frame.info.get("time_fs"))
        if self.radial is not None:
            self.radial.add(frame)
        if "density" in self.wanted:
            check_periodic(frame)
            self.volumes.append(frame.get_volume())
        if "msd" in self.wanted:
            positions = self.unwrapper(frame) if self.settings.unwrap else frame.get_positions()
            if self.removes_drift:
                positions = positions - np.average(positions, axis=0, weights=self.masses)
            self.positions.append(positions)
        if "vacf" in self.wanted:
            self.velocities.append(velocities(frame))

    def result(self) -> Analysis:
        """Everything that is wanted and can be had."""
        interval = None
        if self.wanted & set(_DYNAMIC):
            interval = self._attempt(" and ".join(sorted(self.wanted & set(_DYNAMIC))), self._interval)
        log = None
        if self.wanted & set(_FROM_LOG):
            log = self._attempt(", ".join(name for name in _FROM_LOG if name in self.wanted), self._log)
        groups, weights = group_weights(self.first)
        settings = self.settings
        density = self.masses.sum() * _GRAM_PER_CM3 / np.array(self.volumes)
        transport = vibrating = None
        if interval is not None and "msd" in self.wanted:
            transport = self._attempt("msd", lambda: mean_square_displacement(
                self.positions.array(), groups, weights, interval, window=settings.fit, num_blocks=settings.num_blocks
            ))  # fmt: skip
        if interval is not None and "vacf" in self.wanted:
            vibrating = self._attempt("vacf", lambda: vibrations(
                self.velocities.array(), groups, weights, self.masses, interval, length=settings.vacf_length,
                mass_weighted=settings.mass_weighted,
            ))  # fmt: skip
            self._note_folding(interval)
        if transport is not None and settings.unwrap and self.unwrapper.is_doubtful:
            self.notes.append(
                f"an atom moved by {self.unwrapper.farthest:.2f} of the cell between frames: beyond 0.5 the image it "
                "moved to is unknown; read more frames, or switch unwrapping off (--no-unwrap) where the file holds "
                "unwrapped positions"
            )
        return Analysis(
            trajectory=os.fspath(self.path),
            formula=self.first.get_chemical_formula(),
            num_atoms=len(self.first),
            num_frames=len(self.times),
            interval=interval,
            radial=self.radial.result() if self.radial is not None else None,
            transport=transport,
            drift_removed=self.removes_drift,
            vibrations=vibrating,
            density=Average.of(density) if self.volumes else None,
            temperature=self._of_log("temperature", log, lambda found: found.average("temperature_K")),
            pressure=self._of_log("pressure", log, lambda found: found.average("pressure_GPa")),
            drift=self._of_log("drift", log, lambda found: found.drift(len(self.first))),
            log=log,
            notes=tuple(self.notes),
        )

    def _check(self, name: str) -> bool:
        """Whether the first frame allows a quantity, before all others are read."""
        if name in ("rdf", "density"):
            check_periodic(self.first)
        if name in _DYNAMIC and self.settings.timestep is None and "time_fs" not in self.first.info:
            raise UsageError(
                f"{self.path} does not say when its frames were taken: give --timestep, fs between its frames, or "
                "--quantities without msd and vacf"
            )
        if name == "vacf" and not self.first.has("momenta"):
            raise DataError("the frames hold no momenta: write them into the trajectory")
        if name in _FROM_LOG and not Path(self._log_path()).is_file():
            raise DataError(f"there is no log {self._log_path()}: give --log FILE")
        return True

    def _interval(self) -> float:
        if len(self.times) < 2:
            raise DataError("one frame only")
        return frame_interval(self.times, self.settings.timestep, self.settings.every, self.path)

    def _log_path(self) -> str | os.PathLike[str]:
        return self.settings.log or self.path.with_suffix(".csv")

    def _log(self) -> RunLog:
        first, last = self.times[0], self.times[-1]
        if first is None and (self.settings.start > 0 or self.settings.stop is not None):
            raise DataError("the frames do not say when they were taken: the log cannot be cut to them")
        bounded = self.settings.stop is not None
        return RunLog(self._log_path(), first if self.settings.start > 0 else None, last if bounded else None)

    def _of_log(self, name: str, log: RunLog | None, compute: Callable[[RunLog], T]) -> T | None:
        if log is None or name not in self.wanted:
            return None
        return self._attempt(name, lambda: compute(log))

    def _attempt(self, name: str, compute: Callable[[], T]) -> T | None:
        """What the data do not allow is an error where it was asked for, else a note."""
        try:
            return compute()
        except DataError as error:
            if self.settings.quantities is not None:
                raise DataError(f"{name}: {error}") from error
            self.notes.append(f"left out: {name}: {error}")
            return None

    def _note_folding(self, interval: float) -> None:
        highest = WAVENUMBER / (2 * interval)
        symbols = set(self.first.get_chemical_symbols())
        for elements, fastest in _FASTEST:
            present = ", ".join(sorted(symbols & set(elements)))
            if present and highest < fastest:
                self.notes.append(
                    f"frames {interval:g} fs apart show frequencies up to {highest:.0f} cm⁻¹; bonds of {present} may "
                    f"vibrate at up to {fastest:.0f} and would appear at wrong, lower ones: write frames more often"
                )
                return
