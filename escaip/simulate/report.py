"""The analysis of a trajectory file: one pass over its frames, numbers as JSON and as a table, plots."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

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

T = TypeVar("T")


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
    """Result of ``analyze``; quantities that were not asked for, or not possible, are None.

    Attributes:
        trajectory: the file.
        formula: of the system.
        num_atoms, num_frames: that were read.
        interval: fs between the frames read; None where no quantity needs it.
        radial: radial distribution functions.
        transport: mean-square displacements and diffusion.
        drift_removed: whether displacements are relative to the center of mass: unless an atom is fixed or there is
            only one.
        vibrations: velocity autocorrelation and spectrum.
        density: g/cm³.
        temperature: K.
        pressure: GPa.
        drift: of the conserved energy.
        log: columns of the log, the lines that were used.
        notes: quantities that were left out, with the reason, and doubts about others.
    """

    trajectory: str
    formula: str
    num_atoms: int
    num_frames: int
    interval: float | None
    radial: RadialDistribution | None
    transport: Transport | None
    drift_removed: bool
    vibrations: Vibrations | None
    density: Average | None
    temperature: Average | None
    pressure: Average | None
    drift: EnergyDrift | None
    log: dict[str, Array] | None
    notes: tuple[str, ...]

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
            "msd": self.transport and _transport_values(self.transport, self.drift_removed),
            "vacf": self.vibrations and _vibration_values(self.vibrations),
            "notes": list(self.notes),
        }  # fmt: skip

    def table(self) -> str:
        """Returns a table for a terminal."""
        head = f"{self.num_frames} frames of {self.formula} ({self.num_atoms} atoms)"
        if self.interval is not None:
            head += f", {self.interval:g} fs apart, {(self.num_frames - 1) * self.interval * 1e-3:g} ps"
        rows: list[tuple[str, str]] = []
        for name, unit, found in (
            ("density", "g/cm³", self.density), ("temperature", "K", self.temperature),
            ("pressure", "GPa", self.pressure),
        ):  # fmt: skip
            if found is not None:
                rows.append((name, f"{_with_error(found.mean, found.error)} {unit}"))
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
    collector = _Collector(Path(path), first, settings)
    for frame in tqdm(itertools.chain([first], frames), unit=" frames", disable=not progress):
        collector.add(frame)
    return collector.result()


class Recording:
    """Arrays of one shape, frame after frame, in an unnamed temporary file."""

    def __init__(self) -> None:
        self._stream: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the recording
        weakref.finalize(self, self._stream.close)
        self._shape: tuple[int, ...] = (0,)

    def append(self, values: Array) -> None:
        """Adds the array of a frame."""
        self._shape = (self._shape[0] + 1, *values.shape)
        self._stream.write(np.ascontiguousarray(values, dtype=np.float64).data)

    def array(self) -> Array:
        """Returns ``(F, *shape)``, read-only."""
        self._stream.flush()
        return np.memmap(self._stream, dtype=np.float64, mode="r", shape=self._shape)


class _Collector:
    """Gathers time series from frame to frame."""

    def __init__(self, path: Path, first: Atoms, settings: AnalysisSettings) -> None:
        self.path, self.first, self.settings = path, first, settings
        self.log_path = Path(settings.log or path.with_suffix(".csv"))
        self.notes: list[str] = []
        self.times: list[float | None] = []
        self.volumes: list[float] = []
        self.wanted = {name for name in settings.quantities or QUANTITIES if self._attempt(name, self._allows, name)}
        self.radial = RadialCounter(first, settings.r_max, settings.bin_width) if "rdf" in self.wanted else None
        self.positions, self.velocities, self.unwrapper = Recording(), Recording(), Unwrapper()
        self.masses = first.get_masses()
        self.removes_drift = not first.constraints and len(first) > 1

    def _allows(self, name: str) -> bool:
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
        return True

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
            self.velocities.append(frame.get_velocities() * units.fs)

    def result(self) -> Analysis:
        settings, wanted, first = self.settings, self.wanted, self.first
        dynamic, logged = sorted(wanted & set(_DYNAMIC)), [name for name in _FROM_LOG if name in wanted]
        interval = self._attempt(" and ".join(dynamic), self._interval) if dynamic else None
        log = self._attempt(", ".join(logged), self._log) if logged else None
        groups, weights = group_weights(first)
        transport = vibrating = None
        if interval is not None and "msd" in wanted:
            transport = self._attempt("msd", lambda: mean_square_displacement(
                self.positions.array(), groups, weights, interval, window=settings.fit
            ))  # fmt: skip
        if interval is not None and "vacf" in wanted:
            vibrating = self._attempt("vacf", lambda: vibrations(
                self.velocities.array(), groups, weights, self.masses, interval, settings.vacf_length
            ))  # fmt: skip
            self._note_folding(interval)
        if transport is not None and settings.unwrap and self.unwrapper.farthest > _FAR:
            self.notes.append(
                f"an atom moved by {self.unwrapper.farthest:.2f} of the cell between frames: beyond 0.5 the image it "
                "moved to is unknown; read more frames, or switch unwrapping off (--no-unwrap) where the file holds "
                "unwrapped positions"
            )
        of_log = {} if log is None else {name: self._attempt(name, self._of_log, name, log) for name in logged}
        return Analysis(
            trajectory=os.fspath(self.path), formula=first.get_chemical_formula(), num_atoms=len(first),
            num_frames=len(self.times), interval=interval, transport=transport, drift_removed=self.removes_drift,
            vibrations=vibrating, radial=self.radial.result() if self.radial is not None else None,
            density=Average.of(self.masses.sum() * _GRAM_PER_CM3 / np.array(self.volumes)),
            temperature=of_log.get("temperature"), pressure=of_log.get("pressure"), drift=of_log.get("drift"),
            log=log, notes=tuple(self.notes),
        )  # fmt: skip

    def _interval(self) -> float:
        if len(self.times) < 2:
            raise DataError("one frame only")
        return frame_interval(self.times, self.settings.timestep, self.settings.every, self.path)

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

    def _of_log(self, name: str, log: dict[str, Array]) -> Any:
        """Returns the ``EnergyDrift`` for ``drift``, else an ``Average``."""
        if name == "drift":
            found: Any = energy_drift(log["time_fs"], log["conserved_energy_eV"], len(self.first))
        else:
            found = Average.of(log[_FROM_LOG[name]])
        if found is None:
            raise DataError(f"log {self.log_path} holds no {name}: it is not defined for this run")
        return found

    def _attempt(self, name: str, compute: Callable[..., T], *arguments: Any) -> T | None:
        """Turns a DataError into a note, unless the quantity was asked for by name."""
        try:
            return compute(*arguments)
        except DataError as error:
            if self.settings.quantities is not None:
                raise DataError(f"{name}: {error}") from error
            self.notes.append(f"left out: {name}: {error}")
            return None

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
    """Returns the time between the frames read, in fs.

    Args:
        times: ``info["time_fs"]`` of each, None where there is none.
        timestep: fs between frames of the file, for files that do not say.
        every: frames of the file from one that is read to the next.
        path: to name in messages.

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


def _transport_values(found: Transport, drift_removed: bool) -> dict[str, Any]:
    chosen = thinned(len(found.lag))
    groups = {
        name: {
            "diffusion_cm2_per_s": one.coefficient, "error_cm2_per_s": one.error, "exponent": one.exponent,
            "msd_A2": found.msd[name][chosen],
        }
        for name, one in found.diffusion.items()
    }  # fmt: skip
    return {
        "center_of_mass_removed": drift_removed, "fit_from_fs": found.window[0], "fit_to_fs": found.window[1],
        "num_blocks": found.num_blocks, "lag_fs": found.lag[chosen], "groups": groups,
    }  # fmt: skip


def _vibration_values(found: Vibrations) -> dict[str, Any]:
    return {
        "resolution_per_cm": found.resolution, "highest_per_cm": found.highest,
        "peaks_per_cm": found.peaks, "lag_fs": found.lag, "vacf_A2_per_fs2": found.vacf,
        "frequency_per_cm": found.frequency, "spectrum_cm": found.spectrum,
    }  # fmt: skip


def thinned(count: int) -> np.ndarray:
    """Returns at most a thousand evenly spaced indices."""
    return np.unique(np.linspace(0, count - 1, min(count, 1000)).astype(np.int64))
