"""Molecular dynamics with log, trajectory, guards and a restart that continues bit for bit."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np
from ase import Atoms, units
from tqdm import tqdm

from escaip.errors import ConfigError, DataError, EscaipError, SimulationError, UsageError
from escaip.simulate.analysis import EnergyDrift, energy_drift
from escaip.simulate.ensembles import MDSettings, make_ensemble, prepare_velocities, temperature
from escaip.simulate.guards import (
    DEVIATION_COLUMN,
    DeviationMonitor,
    RangeMonitor,
    find_contact,
    find_problem,
    is_committee,
    largest_spread,
)
from escaip.simulate.output import (
    LogFile,
    check_trajectory_name,
    make_frame,
    open_trajectory,
    read_log,
    write_structure,
)
from escaip.simulate.restart import RestartState

_CONTACT_INTERVAL = 10
"""Steps between searches for atoms that are too close, and between the frames kept as last good."""


@dataclass(frozen=True)
class MDStatus:
    """Progress of a run.

    Attributes:
        steps: in all.
        time: fs, simulated.
        temperature: K.
        energy: eV, conserved energy, or total energy where nothing is conserved.
        ns_per_day: NaN before the first step.
        seconds_left: wall time; NaN before the first step.
    """

    step: int
    steps: int
    time: float
    temperature: float
    energy: float
    ns_per_day: float
    seconds_left: float


@dataclass(frozen=True)
class MDResult:
    """A finished run.

    Attributes:
        atoms: the last frame, with velocities and calculator.
        steps: resumed parts included.
        time: fs, simulated.
        mean_temperature: K, over the log.
        drift: of the conserved energy; None for Langevin or fewer than three log lines.
        ns_per_day: of this part; NaN when there was nothing left to do.
        outside: how often this part left what the model was trained on, in words; empty for never.
    """

    atoms: Atoms
    steps: int
    time: float
    mean_temperature: float
    drift: EnergyDrift | None
    ns_per_day: float
    trajectory: Path
    log: Path
    restart: Path
    outside: str = ""

    def summary(self) -> str:
        """Returns a few lines for people."""
        lines = [f"{self.steps} steps, {self.time / 1000:.3f} ps, mean temperature {self.mean_temperature:.1f} K"]
        if self.drift is not None:
            lines.append(
                f"energy drift {self.drift.slope:+.3g} ± {self.drift.error:.2g} meV/atom/ps, "
                f"fluctuation {self.drift.fluctuation:.3g} meV/atom"
            )
        if np.isfinite(self.ns_per_day):
            lines.append(f"speed {self.ns_per_day:.3g} ns/day")
        if self.outside:
            lines.append(self.outside)
        lines.append(f"wrote {self.trajectory}, {self.log} and {self.restart}")
        return "\n".join(lines)


class RunFiles(NamedTuple):
    """The files of a run: frames, log (CSV), restart, frames on which a committee disagrees, last frame of a stop."""

    trajectory: Path
    log: Path
    restart: Path
    uncertain: Path
    last_good: Path

    @classmethod
    def beside(cls, trajectory: Path) -> RunFiles:
        """Names the files beside a trajectory."""
        endings = (".csv", ".restart.npz", ".uncertain.extxyz", ".last_good.extxyz")
        return cls(trajectory, *map(trajectory.with_suffix, endings))


class ProgressLine:
    """Rewrites one line on a terminal; elsewhere prints about ten lines in all. By default on the error stream."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._next = 0.0

    def __call__(self, status: MDStatus) -> None:
        """Shows a status."""
        fraction, finished = status.step / status.steps, status.step >= status.steps
        if math.isnan(status.seconds_left) or (not self.live and not finished and fraction < self._next):
            return
        self._next = fraction + 0.1
        line = (
            f"step {status.step}/{status.steps} ({100 * fraction:.0f} %)  {status.time / 1000:.3f} ps  "
            f"{status.temperature:.0f} K  {status.energy:.4f} eV  {status.ns_per_day:.3g} ns/day  "
            f"{tqdm.format_interval(status.seconds_left)} left"
        )
        end = "\n" if finished or not self.live else ""
        print(f"\r{line}\x1b[K" if self.live else line, end=end, file=self.stream, flush=True)


def run_md(
    atoms: Atoms,
    settings: MDSettings,
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[MDStatus], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> MDResult:
    """Runs molecular dynamics on a copy of ``atoms`` with its calculator.

    Writes a trajectory (``out``), a log (``.csv``) and a restart file (``.restart.npz``) beside it. A resumed run
    cuts log and trajectory back to the step of the restart file and continues bit for bit, provided that the
    calculator's answers depend on the structure alone (as those of ``EScAIPCalculator`` do).

    Args:
        atoms: structure with a calculator.
        settings: ensemble, steps, temperature, and so on.
        out: trajectory, ``.extxyz`` or ``.traj``.
        resume: continue from the restart file until ``settings.steps``.
        overwrite: replace files of the same name.
        report: called after each logged step.
        stop: asked before each step; True writes the restart file and ends the run early.

    Raises:
        ConfigError: settings that do not fit the structure, or no calculator.
        UsageError: ``out`` exists and neither ``resume`` nor ``overwrite`` is given, or the run to resume has more
            steps than are asked for.
        SimulationError: a guard stopped the run (the last good frame is saved), a file cannot be written, or the
            restart file does not belong to the run.
    """
    if atoms.calc is None:
        raise ConfigError("the structure has no calculator: set atoms.calc")
    for warning in settings.check_structure(atoms):
        warnings.warn(warning, stacklevel=2)
    files = RunFiles.beside(Path(out))
    check_trajectory_name(files.trajectory)
    own = atoms.copy()
    own.calc = atoms.calc
    if settings.ensemble == "npt":
        try:
            own.get_stress()
        except NotImplementedError as error:  # ASE's PropertyNotImplementedError is one
            raise ConfigError(f"npt needs stress: {error or 'this calculator has none'}: use nvt") from error
    state = RestartState.load(files.restart) if resume else None
    if state is None:
        _refuse_to_lose(files, overwrite)
    elif settings.steps < state.step:
        raise UsageError(
            f"{files.trajectory} has {state.step} steps already, {settings.steps} are asked for: ask for more"
        )
    return _Run(own, settings, files, state, report).advance(stop)


class _Run:
    """A run: its files and its integrator."""

    def __init__(
        self, atoms: Atoms, settings: MDSettings, files: RunFiles, state: RestartState | None,
        report: Callable[[MDStatus], None] | None,
    ) -> None:  # fmt: skip
        self.atoms, self.settings, self.files, self.report = atoms, settings, files, report
        self.is_new, self.first_step = state is None, state.step if state else 0
        rng = np.random.default_rng(settings.seed)
        if state:
            state.apply(atoms, settings.physics, files.restart)
        else:
            prepare_velocities(atoms, settings, rng)
        self.ensemble = make_ensemble(atoms, settings, rng)
        if state:
            rng.bit_generator.state = state.rng
            self.ensemble.restore(state.integrator, state.step)
        stored = state.max_temperature if state else 10 * max(settings.temperature or 0.0, self.temperature, 300.0)
        self.max_temperature = settings.max_temperature or stored
        self.last_good: tuple[int, Atoms] | None = None
        if self.is_new:  # before a file is made or replaced
            with np.errstate(all="ignore"):
                problem = self._find_problem(self.temperature, True)
            if problem is not None:
                self._stop(problem)
            files.trajectory.parent.mkdir(parents=True, exist_ok=True)
        self.logs_deviation, self.range = is_committee(atoms), RangeMonitor(atoms)
        columns = (DEVIATION_COLUMN,) if self.logs_deviation else ()
        with contextlib.ExitStack() as stack:
            self.monitor = DeviationMonitor(atoms, files.uncertain, settings, state.saved if state else ())
            stack.callback(self.monitor.close)
            self.log = LogFile(files.log, state.log_position if state else None, columns)
            stack.callback(self.log.close)
            self.trajectory = open_trajectory(files.trajectory, state.trajectory_position if state else None)
            stack.callback(self.trajectory.close)
            self.open_files = stack.pop_all()
        self.started = self.last_logged = time.perf_counter()
        self.last_logged_step = self.first_step

    @property
    def temperature(self) -> float:
        return temperature(self.atoms, self.ensemble.num_degrees)

    @property
    def step(self) -> int:
        return int(self.ensemble.dynamics.nsteps)

    def advance(self, stop: Callable[[], bool]) -> MDResult:
        remaining = max(self.settings.steps - self.first_step, 0)
        try:
            # An overflow becomes NaN, which a guard reports.
            with self.open_files, np.errstate(all="ignore"):
                if self.is_new:
                    self._after_step()
                for _ in range(remaining):
                    if stop():
                        self._save()
                        break
                    self._take_step()
                    self._after_step()
        except OSError as error:
            raise SimulationError(
                f"step {self.step}: cannot write {self.files.trajectory}: {error.strerror or error}: make room, then "
                "continue with --resume"
            ) from error
        return self._result(self.step - self.first_step)

    def _take_step(self) -> None:
        dynamics: Any = self.ensemble.dynamics
        try:
            dynamics.step()
            dynamics.nsteps += 1
            self.atoms.get_forces()
        except (DataError, ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
            self._stop(f"the structure cannot be evaluated ({error})", cause=error)

    def _after_step(self) -> None:
        step, settings, present = self.step, self.settings, self.temperature
        writes_restart = step % settings.restart_interval == 0 or step >= settings.steps
        looks_closely = step % _CONTACT_INTERVAL == 0 or writes_restart
        if (problem := self._find_problem(present, looks_closely)) is not None:
            self._stop(problem)
        if looks_closely:
            self.last_good = step, make_frame(self.atoms, step, step * settings.timestep)
            self.range.look(self.atoms, step)
        if (problem := self.monitor.find_problem(self.atoms, step)) is not None:
            self._stop(problem, f"that frame is in {self.files.uncertain}: label it and train on it, or allow more")
        if step % settings.trajectory_interval == 0:
            self.trajectory.write(make_frame(self.atoms, step, step * settings.timestep))
        if step % settings.log_interval == 0:
            self._log(step, present)
        if writes_restart:
            self._save()

    def _find_problem(self, present: float, looks_closely: bool) -> str | None:
        problem = find_problem(self.atoms, present, self.max_temperature)
        return find_contact(self.atoms) if problem is None and looks_closely else problem

    def _log(self, step: int, present: float) -> None:
        now, length = time.perf_counter(), self.settings.timestep
        speed = _ns_per_day((step - self.last_logged_step) * length, now - self.last_logged)
        self.last_logged, self.last_logged_step = now, step
        potential, kinetic = float(self.atoms.get_potential_energy()), float(self.atoms.get_kinetic_energy())
        conserved = self.ensemble.conserved_energy()
        row: dict[str, float | int] = {
            "step": step, "time_fs": step * length, "temperature_K": present,
            "potential_energy_eV": potential, "kinetic_energy_eV": kinetic, "total_energy_eV": potential + kinetic,
            "conserved_energy_eV": conserved, "pressure_GPa": _pressure(self.atoms),
            "volume_A3": float(self.atoms.get_volume()) if self.atoms.cell.rank == 3 else math.nan,
            "ns_per_day": speed,
        }  # fmt: skip
        if self.logs_deviation:
            row[DEVIATION_COLUMN] = largest_spread(self.atoms)[0]
        self.log.write(row)
        if self.report is not None:
            done = step - self.first_step
            left = (now - self.started) * (self.settings.steps - step) / done if done else math.nan
            energy = conserved if math.isfinite(conserved) else potential + kinetic
            self.report(MDStatus(step, self.settings.steps, step * length, present, energy, speed, left))

    def _save(self) -> None:
        RestartState(
            step=self.step, target=self.settings.steps, physics=self.settings.physics,
            positions=self.atoms.get_positions(), momenta=self.atoms.get_momenta(), cell=self.atoms.cell.array.copy(),
            atomic_numbers=self.atoms.numbers.copy(), energy=float(self.atoms.get_potential_energy()),
            rng=dict(self.ensemble.rng.bit_generator.state), integrator=self.ensemble.state(),
            max_temperature=self.max_temperature, log_position=self.log.position(),
            trajectory_position=self.trajectory.position(), saved=self.monitor.saved(),
        ).save(self.files.restart)  # fmt: skip

    def _stop(self, problem: str, remedy: str | None = None, cause: Exception | None = None) -> NoReturn:
        if remedy is None and self.last_good is not None:
            write_structure(self.files.last_good, self.last_good[1])
            remedy = (
                f"the last good frame (step {self.last_good[0]}) is in {self.files.last_good}: use a timestep below "
                f"{self.settings.timestep:g} fs, or relax the structure first"
            )
        remedy = remedy or "nothing was kept: relax the structure first"
        raise SimulationError(f"stopped at step {self.step}: {problem}; {remedy}") from cause

    def _result(self, num_steps: int) -> MDResult:
        log = read_log(self.files.log)
        return MDResult(
            atoms=self.atoms, steps=self.step, time=self.step * self.settings.timestep,
            mean_temperature=float(log["temperature_K"].mean()) if len(log["step"]) else math.nan,
            drift=energy_drift(log["time_fs"], log["conserved_energy_eV"], len(self.atoms)),
            ns_per_day=_ns_per_day(num_steps * self.settings.timestep, time.perf_counter() - self.started),
            trajectory=self.files.trajectory, log=self.files.log, restart=self.files.restart, outside=str(self.range),
        )  # fmt: skip


def _refuse_to_lose(files: RunFiles, overwrite: bool) -> None:
    """Refuses to replace files by accident."""
    found = [file for file in (files.trajectory, files.log, files.restart) if file.exists()]
    if overwrite or not found:
        return
    where, instead = f"{found[0]} exists", "choose another --out"
    if files.restart in found:
        try:
            state = RestartState.load(files.restart)
            where, instead = f"{found[0]} is of a finished run ({state.step} steps)", "extend it with --resume"
            if state.step < state.target:
                where = f"{found[0]} is of an unfinished run (step {state.step} of {state.target})"
                instead = "continue it with --resume"
        except EscaipError:
            where = f"{found[0]} is of a run whose restart file is damaged"
    raise UsageError(f"{where}: {instead}, or replace it with --overwrite")


def _pressure(atoms: Atoms) -> float:
    """Returns the pressure in GPa, kinetic part included; NaN where it is not defined."""
    if not atoms.pbc.all() or "stress" not in atoms.calc.implemented_properties:
        return math.nan
    return float(-np.trace(atoms.get_stress(voigt=False, include_ideal_gas=True)) / 3 / units.GPa)


def _ns_per_day(femtoseconds: float, seconds: float) -> float:
    return femtoseconds * 1e-6 / seconds * 86400 if femtoseconds > 0 and seconds > 0 else math.nan
