"""The analysis of a trajectory file: one pass over its frames, numbers as JSON and as a table, plots."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms, units
from tqdm import tqdm

from escaip.errors import ConfigError, DataError, UsageError
from escaip.simulate.analysis import (
    WAVENUMBER,
    Array,
    Average,
    Diffusion,
    EnergyDrift,
    RadialCounter,
    RadialDistribution,
    Transport,
    Unwrapper,
    Vibrations,
    check_periodic,
    energy_drift,
    mean_square_displacement,
    vibrations,
)
from escaip.simulate.output import read_log, read_trajectory

QUANTITIES = ("rdf", "msd", "vacf", "density", "temperature", "pressure", "drift")
_FROM_LOG = {"temperature": "temperature_K", "pressure": "pressure_GPa", "drift": "conserved_energy_eV"}
_DYNAMIC = ("msd", "vacf")
_GRAM_PER_CM3 = units._amu * 1e27  # per amu/Å³
# cm⁻¹ that stretching vibrations reach, with hydrogen and of the other light elements.
_FASTEST = ((("H",), 4500.0), (("B", "C", "N", "O", "F"), 2500.0))
_FAR = 0.4  # of the cell: another atom may have moved farther than half of it, to an unknown image
_DIFFUSIVE = 0.2  # deviation from 1 of an exponent that still counts as diffusion


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of an analysis; times in fs, distances in Å.

    Attributes:
        quantities: some of ``QUANTITIES``; None for all that the trajectory allows.
        start, stop, every: which frames; ``stop`` is excluded.
        timestep: fs between frames of the file, for files that do not say.
        log: of the run; by default the ``.csv`` beside the trajectory.
        r_max: range of radial distributions; by default half the smallest width of the cell, at most 10.
        bin_width: of radial distributions.
        fit: first and last lag of the linear fit to the mean-square displacement; by default 0.1 to 0.5 of a block.
        unwrap: follow atoms through periodic boundaries; otherwise positions are taken as they are.
        vacf_length: longest lag of the velocity autocorrelation; by default half of the trajectory, at most 5000.

    Raises:
        ConfigError: a value is out of range.
    """

    quantities: tuple[str, ...] | None = None
    start: int = 0
    stop: int | None = None
    every: int = 1
    timestep: float | None = None
    log: str | os.PathLike[str] | None = None
    r_max: float | None = None
    bin_width: float = 0.05
    fit: tuple[float, float] | None = None
    unwrap: bool = True
    vacf_length: float | None = None

    def __post_init__(self) -> None:
        for name in self.quantities or ():
            if name not in QUANTITIES:
                raise ConfigError(f"quantity {name!r} is unknown: choose {', '.join(QUANTITIES)}")
        if self.quantities is not None and not self.quantities:
            raise ConfigError(f"no quantity is asked for: choose {', '.join(QUANTITIES)}")
        for name in ("timestep", "r_max", "bin_width", "vacf_length"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} is {value}: it must be above 0")


@dataclass(frozen=True)
class Analysis:
    """Result of ``analyze``; quantities that were not asked for, or not possible, are None."""

    trajectory: str
    formula: str
    num_atoms: int
    num_frames: int
    drift_removed: bool  # displacements are relative to the center of mass, unless an atom is fixed or the only one
    notes: tuple[str, ...]  # quantities that were left out, with the reason, and doubts about others
    interval: float | None = None  # fs between the frames read
    radial: RadialDistribution | None = None
    transport: Transport | None = None
    vibrations: Vibrations | None = None
    density: Average | None = None  # g/cm³
    temperature: Average | None = None  # K
    pressure: Average | None = None  # GPa
    drift: EnergyDrift | None = None  # of the conserved energy
    log: dict[str, Array] | None = None  # columns of the log, the lines that were used

    def to_dict(self) -> dict[str, Any]:
        """Returns numbers and arrays, the unit in each name; what is unknown is None."""
        return {
            "trajectory": self.trajectory, "formula": self.formula, "num_atoms": self.num_atoms,
            "num_frames": self.num_frames, "frame_interval_fs": self.interval,
            "density": _average_values(self.density, "g_per_cm3"),
            "temperature": _average_values(self.temperature, "K"),
            "pressure": _average_values(self.pressure, "GPa"),
            "drift": self.drift and {
                "slope_meV_per_atom_per_ps": self.drift.slope, "error_meV_per_atom_per_ps": self.drift.error,
                "fluctuation_meV_per_atom": self.drift.fluctuation,
            },
            "rdf": self.radial and _radial_values(self.radial),
            "msd": self.transport and {
                "center_of_mass_removed": self.drift_removed, **_transport_values(self.transport)
            },
            "vacf": self.vibrations and {
                "resolution_per_cm": self.vibrations.resolution, "highest_per_cm": self.vibrations.highest,
                "peaks_per_cm": self.vibrations.peaks, "lag_fs": self.vibrations.lag,
                "vacf_A2_per_fs2": self.vibrations.vacf, "frequency_per_cm": self.vibrations.frequency,
                "spectrum_cm": self.vibrations.spectrum,
            },
            "notes": list(self.notes),
        }  # fmt: skip

    def table(self) -> str:
        """Returns a table for a terminal."""
        head = f"{self.num_frames} frames of {self.formula} ({self.num_atoms} atoms)"
        if self.interval is not None:
            head += f", {self.interval:g} fs apart, {(self.num_frames - 1) * self.interval * 1e-3:g} ps"
        rows: list[tuple[str, str]] = []
        for name, unit in (("density", "g/cm³"), ("temperature", "K"), ("pressure", "GPa")):
            if (average := getattr(self, name)) is not None:
                rows.append((name, f"{_with_error(average.mean, average.error)} {unit}"))
        if self.drift is not None:
            rows.append(("energy drift", f"{self.drift.slope:+.3g} ± {self.drift.error:.2g} meV/atom/ps"))
        if self.radial is not None:
            for pair in shown(self.radial.g):
                if (shell := self.radial.first_shell(pair)) is not None:
                    text = f"peak {shell.peak:.2f} Å, {shell.coordination:.2f} neighbors within {shell.end:.2f} Å"
                    rows.append((f"g(r) {pair}", text))
        if self.transport is not None:
            low, high = self.transport.window
            rows.append(("diffusion", f"fitted from {low:g} to {high:g} fs, {self.transport.num_blocks} blocks"))
            for name in shown(self.transport.diffusion):
                one = self.transport.diffusion[name]
                rows.append((f"  D {name}", f"{_with_error(one.coefficient, one.error)} cm²/s{_warning(one)}"))
        if self.vibrations is not None:
            peaks = ", ".join(f"{peak:.0f}" for peak in np.sort(self.vibrations.peaks[:8])) or "none"
            resolution, highest = self.vibrations.resolution, self.vibrations.highest
            rows.append(("vibrations", f"peaks {peaks} cm⁻¹; resolved to {resolution:.2g}, up to {highest:.0f} cm⁻¹"))
        lines = [head, "", *(f"{name:<20}{text}" for name, text in rows)]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])


def analyze(
    path: str | os.PathLike[str], settings: AnalysisSettings | None = None, *, progress: bool = False
) -> Analysis:
    """Analyses a trajectory (docs/howto/simulate.md) in one pass over its frames.

    Memory does not grow with the number of frames: time series of positions and velocities go to a temporary file.

    Args:
        path: see ``read_trajectory``.
        settings: quantities and frames; by default all that the trajectory allows, with notes on what it does not.
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
    with tempfile.TemporaryFile() as positions, tempfile.TemporaryFile() as velocities:
        collector = _Collector(Path(path), first, settings, positions, velocities)
        for frame in tqdm(itertools.chain([first], frames), unit=" frames", disable=not progress):
            collector.add(frame)
        return collector.result()


class _Collector:
    """Gathers time series from frame to frame, ``(F, N, 3)`` float64 in files."""

    def __init__(
        self, path: Path, first: Atoms, settings: AnalysisSettings, positions: IO[bytes], velocities: IO[bytes]
    ) -> None:
        self.path, self.first, self.settings = path, first, settings
        self.positions, self.velocities, self.unwrapper = positions, velocities, Unwrapper()
        self.log_path = Path(settings.log or path.with_suffix(".csv"))
        self.notes: list[str] = []
        self.times: list[float | None] = []
        self.volumes: list[float] = []
        self.wanted: list[str] = []
        for name in settings.quantities or QUANTITIES:
            with self._attempt(name):
                self._check(name)
                self.wanted.append(name)
        self.radial = RadialCounter(first, settings.r_max, settings.bin_width) if "rdf" in self.wanted else None
        self.masses = first.get_masses()
        self.removes_drift = not first.constraints and len(first) > 1

    @contextlib.contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Turns a DataError into a note, unless the quantity was asked for by name."""
        try:
            yield
        except DataError as error:
            if self.settings.quantities is not None:
                raise DataError(f"{name}: {error}") from error
            self.notes.append(f"left out: {name}: {error}")

    def _check(self, name: str) -> None:
        """Checks that the first frame allows a quantity, before all others are read."""
        if name in ("rdf", "density"):
            check_periodic(self.first)
        if name in _DYNAMIC and self.settings.timestep is None and "time_fs" not in self.first.info:
            raise UsageError(
                f"{self.path} does not say when its frames were taken: give --timestep, fs between its frames, or "
                "--quantities without msd and vacf"
            )
        if name == "vacf" and not self.first.has("momenta"):
            raise DataError("the frames hold no momenta: write them into the trajectory")
        if name in _FROM_LOG and not self.log_path.is_file():
            raise DataError(f"there is no log {self.log_path}: give --log FILE")

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
            self.positions.write(positions.tobytes())
        if "vacf" in self.wanted:
            self.velocities.write((frame.get_velocities() * units.fs).tobytes())

    def result(self) -> Analysis:
        settings, found = self.settings, dict[str, Any]()
        dynamic = [name for name in _DYNAMIC if name in self.wanted]
        if dynamic:
            with self._attempt(" and ".join(dynamic)):
                if len(self.times) < 2:
                    raise DataError("one frame only")
                found["interval"] = frame_interval(self.times, settings.timestep, settings.every, self.path)
        interval, (groups, weights) = found.get("interval"), group_weights(self.first)
        if "msd" in dynamic and interval:
            with self._attempt("msd"):
                moving = self._series(self.positions)
                found["transport"] = mean_square_displacement(moving, groups, weights, interval, settings.fit)
        if "vacf" in dynamic and interval:
            with self._attempt("vacf"):
                moving, length = self._series(self.velocities), settings.vacf_length
                found["vibrations"] = vibrations(moving, groups, weights, self.masses, interval, length)
            self._note_folding(interval)
        if "transport" in found and self.unwrapper.farthest > _FAR:
            self.notes.append(
                f"an atom moved by {self.unwrapper.farthest:.2f} of the cell between frames: beyond 0.5 the image it "
                "moved to is unknown; read more frames, or switch unwrapping off (--no-unwrap) where the file holds "
                "unwrapped positions"
            )
        logged = [name for name in _FROM_LOG if name in self.wanted]
        if logged:
            with self._attempt(", ".join(logged)):
                found["log"] = self._log()
        for name in logged if "log" in found else ():
            with self._attempt(name):
                found[name] = self._of_log(name, found["log"])
        if self.radial is not None:
            found["radial"] = self.radial.result()
        return Analysis(
            trajectory=os.fspath(self.path), formula=self.first.get_chemical_formula(), num_atoms=len(self.first),
            num_frames=len(self.times), drift_removed=self.removes_drift, notes=tuple(self.notes),
            density=Average.of(self.masses.sum() * _GRAM_PER_CM3 / np.array(self.volumes)), **found,
        )  # fmt: skip

    def _series(self, stream: IO[bytes]) -> Array:
        stream.flush()
        return np.memmap(stream, dtype=np.float64, mode="r", shape=(len(self.times), len(self.first), 3))

    def _log(self) -> dict[str, Array]:
        """Reads the lines of the log that belong to the frames read."""
        starts, ends = self.settings.start > 0, self.settings.stop is not None
        if self.times[0] is None and (starts or ends):
            raise DataError("the frames do not say when they were taken: the log cannot be cut to them")
        try:
            columns = read_log(self.log_path)
        except OSError as error:
            raise DataError(f"log {self.log_path} cannot be read ({error.strerror}): give --log FILE") from error
        except (KeyError, ValueError) as error:
            raise DataError(f"log {self.log_path} is none of escaip md ({error}): give --log FILE") from error
        time = columns["time_fs"]
        slack = 1e-6 * float(np.abs(time).max(initial=1.0))
        low = (self.times[0] or 0.0) - slack if starts else -np.inf
        high = (self.times[-1] or 0.0) + slack if ends else np.inf
        chosen = (time >= low) & (time <= high)
        if not chosen.any():
            raise DataError(f"log {self.log_path} has no line in the time of the frames: give --log FILE")
        return {name: values[chosen] for name, values in columns.items()}

    def _of_log(self, name: str, log: dict[str, Array]) -> EnergyDrift | Average:
        column = log[_FROM_LOG[name]]
        found = energy_drift(log["time_fs"], column, len(self.first)) if name == "drift" else Average.of(column)
        if found is None:
            raise DataError(f"log {self.log_path} holds no {name}: it is not defined for this run")
        return found

    def _note_folding(self, interval: float) -> None:
        highest = WAVENUMBER / (2 * interval)
        for elements, fastest in _FASTEST:
            present = ", ".join(sorted(set(self.first.get_chemical_symbols()) & set(elements)))
            if present and highest < fastest:
                self.notes.append(
                    f"frames {interval:g} fs apart show frequencies up to {highest:.0f} cm⁻¹; bonds of {present} may "
                    f"vibrate at up to {fastest:.0f} and would appear at wrong, lower ones: write frames more often"
                )
                return


def group_weights(frame: Atoms) -> tuple[list[str], Array]:
    """Returns the names of the groups, ``"all"`` and each element, and ``(N, G)`` weights of the mean over each."""
    symbols = np.array(frame.get_chemical_symbols())
    names = sorted(set(symbols.tolist()))
    members = np.stack([np.ones(len(symbols), dtype=bool), *(symbols == name for name in names)], axis=1)
    return ["all", *names], members / members.sum(axis=0)


def frame_interval(times: Sequence[float | None], timestep: float | None, every: int, path: object) -> float:
    """Returns the time in fs between frames read, from their ``info["time_fs"]`` or, where None, from ``timestep``.

    Raises:
        UsageError: neither the frames nor ``timestep`` say it, or both do and differ.
        DataError: the frames are not evenly spaced.
    """
    known = np.array([time for time in times if time is not None], dtype=np.float64)
    if len(known) == 0:
        if timestep is None:
            raise UsageError(f"{path} does not say when its frames were taken: give --timestep, fs between its frames")
        return timestep * every
    steps = np.diff(known)
    if len(known) < len(times) or not len(steps) or not (steps > 0).all():
        raise DataError(f"{path}: the times of its frames (time_fs) do not increase from each to the next: cut it up")
    interval, usual = float((known[-1] - known[0]) / len(steps)), float(np.median(steps))
    uneven = np.flatnonzero(np.abs(steps - usual) > 1e-3 * usual)
    if len(uneven):
        raise DataError(
            f"{path}: most frames are {usual:g} fs apart, but number {int(uneven[0]) + 1} of those read comes after "
            f"{steps[uneven[0]]:g} fs: choose an even part with --start and --stop"
        )
    if timestep is not None and abs(timestep * every - interval) > 1e-3 * interval:
        raise UsageError(f"{path} says that its frames are {interval / every:g} fs apart: leave --timestep out")
    return interval


def shown(names: Iterable[str]) -> list[str]:
    """Returns groups or pairs without repetition: where there is one element, it and "all" are the same."""
    found = list(names)
    return found if len(found) > 2 else found[:1]


def _warning(found: Diffusion) -> str:
    if found.exponent is None or abs(found.exponent - 1) <= _DIFFUSIVE:
        return ""
    return f" (not diffusive: MSD grows as t^{found.exponent:.2f})"


def _with_error(value: float, error: float | None) -> str:
    if error is None:
        return f"{value:.4g} (too short for an error)"
    if not error > 0:
        return f"{value:.6g}"
    digits = max(2, 2 + int(np.floor(np.log10(max(abs(value), error)))) - int(np.floor(np.log10(error))))
    return f"{value:.{min(digits, 9)}g} ± {error:.2g}"


def _average_values(average: Average | None, unit: str) -> dict[str, Any] | None:
    return None if average is None else {
        f"mean_{unit}": average.mean, f"error_{unit}": average.error, f"deviation_{unit}": average.deviation,
        "num_samples": average.num_samples,
    }  # fmt: skip


def _radial_values(found: RadialDistribution) -> dict[str, Any]:
    pairs = {}
    for pair, g in found.g.items():
        shell = found.first_shell(pair)
        first = shell and {"peak_A": shell.peak, "end_A": shell.end, "coordination": shell.coordination}
        pairs[pair] = {"g": g, "neighbors_within_edge": found.neighbors[pair], "first_shell": first}
    return {"num_frames": found.num_frames, "distance_A": found.distance, "edge_A": found.edges, "pairs": pairs}


def _transport_values(found: Transport) -> dict[str, Any]:
    chosen = thinned(len(found.lag))
    groups = {
        name: {
            "diffusion_cm2_per_s": one.coefficient, "error_cm2_per_s": one.error, "exponent": one.exponent,
            "msd_A2": found.msd[name][chosen],
        }
        for name, one in found.diffusion.items()
    }  # fmt: skip
    low, high = found.window
    return {
        "fit_from_fs": low, "fit_to_fs": high, "num_blocks": found.num_blocks, "lag_fs": found.lag[chosen],
        "groups": groups,
    }  # fmt: skip


def thinned(count: int) -> np.ndarray:
    """Returns at most a thousand evenly spaced indices."""
    return np.unique(np.linspace(0, count - 1, min(count, 1000)).astype(np.int64))
