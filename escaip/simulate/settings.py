"""What a molecular dynamics run is asked to do, checked before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from escaip.errors import ConfigError

ENSEMBLES = ("nve", "nvt", "npt")
THERMOSTATS = ("langevin", "bussi", "nose-hoover")
BAROSTATS = ("isotropic", "full")
VELOCITIES = ("auto", "draw", "keep")
MAX_TIMESTEP = 20.0
"""fs; longer than any vibration's period allows."""


@dataclass(frozen=True)
class MDSettings:
    """Settings of a run; times in fs, temperature in K, pressure in GPa.

    Attributes:
        ensemble: ``"nve"``, ``"nvt"`` or ``"npt"``.
        steps: of the whole run, counted from its first step also when it is resumed.
        timestep: fs.
        temperature: K; of the thermostat and of the velocities that are drawn.
        pressure: GPa, npt only; None for 0.
        thermostat: nvt only: ``"langevin"`` (samples every system correctly; the default), ``"bussi"``
            (stochastic velocity rescaling, keeps dynamics) or ``"nose-hoover"`` (chain, deterministic).
        thermostat_time: relaxation time in fs; the Langevin friction is its inverse.
        barostat: npt only: ``"isotropic"`` (the default) or ``"full"`` cell (Martyna-Tobias-Klein).
        barostat_time: relaxation time in fs.
        velocities: ``"draw"`` from the Maxwell-Boltzmann distribution, ``"keep"`` those of the structure, or
            ``"auto"``: keep where there are any, else draw.
        seed: of velocities and stochastic thermostats.
        log_interval, trajectory_interval, restart_interval: steps between log lines, frames and restart files.
        max_temperature: K at which the run is stopped; by default ten times the largest of the target, the
            initial temperature and 300 K.
        max_spread: eV/Å, for a committee: the run is stopped where its forces on an atom spread by more.
        save_spread: eV/Å, for a committee: frames above it are written to a file of their own.

    Raises:
        ConfigError: a value is out of range or does not belong to the ensemble.
    """

    ensemble: str = "nve"
    steps: int = 1000
    timestep: float = 0.5
    temperature: float | None = None
    pressure: float | None = None
    thermostat: str | None = None
    thermostat_time: float = 100.0
    barostat: str | None = None
    barostat_time: float = 1000.0
    velocities: str = "auto"
    seed: int = 0
    log_interval: int = 10
    trajectory_interval: int = 10
    restart_interval: int = 1000
    max_temperature: float | None = None
    max_spread: float | None = None
    save_spread: float | None = None

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        # Defaults that depend on the ensemble are filled in, so that a restart can be compared with them.
        if self.ensemble == "nvt" and self.thermostat is None:
            object.__setattr__(self, "thermostat", "langevin")
        if self.ensemble == "npt":
            object.__setattr__(self, "barostat", self.barostat or "isotropic")
            object.__setattr__(self, "pressure", self.pressure or 0.0)

    def _check_choices(self) -> None:
        choices = {"ensemble": ENSEMBLES, "thermostat": THERMOSTATS, "barostat": BAROSTATS, "velocities": VELOCITIES}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed and not (value is None and name in ("thermostat", "barostat")):
                raise ConfigError(f"{name} is {value!r}: choose {', '.join(allowed)}")
        for name, ensemble in (("thermostat", "nvt"), ("barostat", "npt"), ("pressure", "npt")):
            if getattr(self, name) is not None and self.ensemble != ensemble:
                raise ConfigError(f"{name} belongs to {ensemble}, not to {self.ensemble}: leave it out")
        if self.temperature is None and self.ensemble != "nve":
            raise ConfigError(f"{self.ensemble} needs a temperature: give one in K")
        if self.temperature is None and self.velocities == "draw":
            raise ConfigError("velocities can only be drawn at a temperature: give one in K")

    def _check_numbers(self) -> None:
        if not 0 < self.timestep <= MAX_TIMESTEP:
            raise ConfigError(f"timestep is {self.timestep} fs: it must be above 0 and at most {MAX_TIMESTEP:g} fs")
        for name in ("temperature", "max_temperature"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} is {value} K: it must be above 0")
        for name in ("max_spread", "save_spread"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} is {value} eV/Å: it must be above 0")
        if self.pressure is not None and not math.isfinite(self.pressure):
            raise ConfigError(f"pressure is {self.pressure} GPa: it must be a finite number")
        for name in ("thermostat_time", "barostat_time"):
            value = getattr(self, name)
            if not self.timestep <= value < math.inf:
                raise ConfigError(f"{name} is {value} fs: it must be at least the timestep, {self.timestep:g} fs")
        for name in ("steps", "log_interval", "trajectory_interval", "restart_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}: it must be 0 or more")

    @property
    def physics(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        names = ["ensemble", "timestep", "temperature", "pressure", "thermostat", "barostat", "seed"]
        if self.ensemble != "nve":
            names.append("thermostat_time")
        if self.ensemble == "npt":
            names.append("barostat_time")
        return {name: getattr(self, name) for name in names}

    def check_structure(self, atoms: Atoms) -> list[str]:
        """Returns warnings about the settings for a structure, one line each.

        Raises:
            ConfigError: the ensemble cannot be applied to it.
        """
        if len(atoms) < 2 and (self.ensemble == "npt" or self.thermostat in ("bussi", "nose-hoover")):
            what = self.thermostat or self.ensemble
            raise ConfigError(f"{what} needs at least 2 atoms: use nve, or nvt with the langevin thermostat")
        if self.ensemble == "npt" and not (atoms.pbc.all() and abs(np.linalg.det(atoms.cell.array)) > 0):
            raise ConfigError("npt needs a cell that is periodic along all three axes: use nvt, or set cell and pbc")
        if atoms.constraints and (self.ensemble == "npt" or self.thermostat == "nose-hoover"):
            what = self.thermostat or self.ensemble
            raise ConfigError(f"{what} does not support constraints: remove them, or use nvt with langevin or bussi")
        lightest = int(np.argmin(atoms.get_masses()))
        limit = math.sqrt(float(atoms.get_masses()[lightest]))  # 1 fs for hydrogen, 6 fs for argon
        if self.timestep > 1.05 * limit:
            symbol = atoms.symbols[lightest]
            return [f"a timestep of {self.timestep:g} fs is long for {symbol}: use at most {limit:.1g} fs"]
        return []
