"""Settings of a molecular dynamics run, its initial velocities, and the integrator of its ensemble."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT, NoseHooverChainThermostat
from ase.md.verlet import VelocityVerlet

from escaip.errors import ConfigError

_CHOICES = {
    "ensemble": ("nve", "nvt", "npt"), "thermostat": ("langevin", "bussi", "nose-hoover", None),
    "barostat": ("isotropic", "full", None), "velocities": ("auto", "draw", "keep"),
}  # fmt: skip
_MAX_TIMESTEP = 20.0  # fs; longer than any vibration allows
_LINEAR = 1e-6  # amu Å²: smaller moments of inertia are those of a linear molecule about its axis

# Variables that an integrator carries from step to step beside positions, momenta, cell and random numbers.
_CHAIN = ("_thermostat._eta", "_thermostat._p_eta")
_BAROSTAT = ("_barostat._xi", "_barostat._p_xi")
_STATE: dict[type[MolecularDynamics], tuple[str, ...]] = {
    VelocityVerlet: (),
    Langevin: (),
    Bussi: ("transferred_energy",),
    NoseHooverChainNVT: _CHAIN,
    IsotropicMTKNPT: ("_cell0", "_volume0", "_eps", "_p_eps", *_CHAIN, *_BAROSTAT),
    MTKNPT: ("_p_g", *_CHAIN, *_BAROSTAT),
}


@dataclass(frozen=True)
class MDSettings:
    """Settings of a run; times in fs, temperature in K, pressure in GPa.

    Attributes:
        ensemble: ``"nve"``, ``"nvt"`` or ``"npt"``.
        steps: of the whole run, counted from its first step also when it is resumed.
        timestep: fs; see ``default_timestep``.
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
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: choose {', '.join(filter(None, allowed))}")
        for name, ensemble in (("thermostat", "nvt"), ("barostat", "npt"), ("pressure", "npt")):
            if getattr(self, name) is not None and self.ensemble != ensemble:
                raise ConfigError(f"{name} belongs to {ensemble}, not to {self.ensemble}: leave it out")
        if self.temperature is None and self.ensemble != "nve":
            raise ConfigError(f"{self.ensemble} needs a temperature: give one in K")
        if self.temperature is None and self.velocities == "draw":
            raise ConfigError("velocities can only be drawn at a temperature: give one in K")

    def _check_numbers(self) -> None:
        if not 0 < self.timestep <= _MAX_TIMESTEP:
            raise ConfigError(f"timestep is {self.timestep} fs: it must be above 0 and at most {_MAX_TIMESTEP:g} fs")
        positive = {"temperature": "K", "max_temperature": "K", "max_spread": "eV/Å", "save_spread": "eV/Å"}
        for name, unit in positive.items():
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value} {unit}: it must be above 0")
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
        """The settings that a resumed run must share with the run that it continues."""
        names = ["ensemble", "timestep", "temperature", "pressure", "thermostat", "barostat", "seed"]
        if self.ensemble != "nve":
            names.append("thermostat_time")
        if self.ensemble == "npt":
            names.append("barostat_time")
        return {name: getattr(self, name) for name in names}

    def check_structure(self, atoms: Atoms) -> list[str]:
        """Returns warnings about the settings for a structure; raises ConfigError where the ensemble cannot apply."""
        what = self.thermostat or self.ensemble
        if len(atoms) < 2 and (self.ensemble == "npt" or self.thermostat in ("bussi", "nose-hoover")):
            raise ConfigError(f"{what} needs at least 2 atoms: use nve, or nvt with the langevin thermostat")
        if self.ensemble == "npt" and not (atoms.pbc.all() and abs(np.linalg.det(atoms.cell.array)) > 0):
            raise ConfigError("npt needs a cell that is periodic along all three axes: use nvt, or set cell and pbc")
        if atoms.constraints and (self.ensemble == "npt" or self.thermostat == "nose-hoover"):
            raise ConfigError(f"{what} does not support constraints: remove them, or use nvt with langevin or bussi")
        lightest = int(np.argmin(atoms.get_masses()))
        limit = math.sqrt(float(atoms.get_masses()[lightest]))  # 1 fs for hydrogen, 6 fs for argon
        if self.timestep > 1.05 * limit:
            symbol = atoms.symbols[lightest]
            return [f"a timestep of {self.timestep:g} fs is long for {symbol}: use at most {limit:.1g} fs"]
        return []


def default_timestep(atoms: Atoms) -> float:
    """Returns a safe timestep in fs: 0.5 with atoms lighter than 6 u, 1 with atoms lighter than 24 u, else 2."""
    lightest = float(atoms.get_masses().min())
    return 0.5 if lightest < 6.0 else 1.0 if lightest < 24.0 else 2.0


@dataclass(frozen=True)
class Ensemble:
    """An integrator bound to atoms."""

    dynamics: MolecularDynamics
    rng: np.random.Generator  # of velocities and thermostat
    num_degrees: int  # thermal degrees of freedom, for the temperature

    def conserved_energy(self) -> float:
        """Energy in eV that the equations of motion conserve; NaN for Langevin dynamics, which conserves none."""
        dynamics = self.dynamics
        if isinstance(dynamics, Langevin):
            return math.nan
        if isinstance(dynamics, (NoseHooverChainNVT, IsotropicMTKNPT, MTKNPT)):
            return float(dynamics.get_conserved_energy())
        return float(dynamics.atoms.get_total_energy() - getattr(dynamics, "transferred_energy", 0.0))  # of Bussi

    def state(self) -> dict[str, np.ndarray]:
        """Returns the internal variables by name; scalars as 0-d arrays."""
        return {name: np.array(attrgetter(name)(self.dynamics), float) for name in _STATE[type(self.dynamics)]}

    def restore(self, state: dict[str, np.ndarray], step: int) -> None:
        """Sets the internal variables and the number of steps done."""
        for name in _STATE[type(self.dynamics)]:
            value = state[name]
            owner, _, last = name.rpartition(".")
            target = attrgetter(owner)(self.dynamics) if owner else self.dynamics
            setattr(target, last, value.copy() if value.ndim else float(value))
        self.dynamics.nsteps = step


def make_ensemble(atoms: Atoms, settings: MDSettings, rng: np.random.Generator) -> Ensemble:
    """Builds the integrator for ``atoms``, which it will move.

    Thermostats act on the free degrees of freedom. Where the dynamics conserves total momentum, ASE's count of ``3N``
    would heat a nine-atom molecule by a quarter.
    """
    relaxation = settings.thermostat_time * units.fs
    common: dict[str, Any] = {"timestep": settings.timestep * units.fs, "temperature_K": settings.temperature}
    num_degrees = degrees_of_freedom(atoms, conserves_momentum=settings.thermostat != "langevin")
    dynamics: Any
    if settings.ensemble == "nve":
        dynamics = VelocityVerlet(atoms, settings.timestep * units.fs)
    elif settings.thermostat == "langevin":
        dynamics = Langevin(atoms, **common, friction=1.0 / relaxation, fixcm=False, rng=rng)
    elif settings.thermostat == "bussi":
        dynamics = Bussi(atoms, **common, taut=relaxation, rng=rng)
        dynamics.ndof = num_degrees
        dynamics.target_kinetic_energy = 0.5 * dynamics.temp * num_degrees
    else:
        # In the equations of Martyna, Tobias and Klein a third of the degrees of freedom is the number of atoms.
        count = num_degrees / 3
        if settings.thermostat == "nose-hoover":
            dynamics = NoseHooverChainNVT(atoms, **common, tdamp=relaxation)
        else:
            pressure, damping = (settings.pressure or 0.0) * units.GPa, settings.barostat_time * units.fs
            kind = IsotropicMTKNPT if settings.barostat == "isotropic" else MTKNPT
            dynamics = kind(atoms, **common, pressure_au=pressure, tdamp=relaxation, pdamp=damping)
            dynamics._num_atoms_global = count
        masses: Any = atoms.get_masses()[:, None]
        dynamics._thermostat = NoseHooverChainThermostat(count, masses, common["temperature_K"], tdamp=relaxation)  # type: ignore[arg-type]
    return Ensemble(dynamics, rng, num_degrees)


def prepare_velocities(atoms: Atoms, settings: MDSettings, rng: np.random.Generator) -> None:
    """Sets the momenta of ``atoms`` where the settings ask for it.

    Drawn velocities follow the Maxwell-Boltzmann distribution without net momentum and, for a molecule without periodic
    axes, without rotation, scaled to the exact temperature. A relaxed structure turns about half of the kinetic energy
    into potential energy.

    Raises:
        ConfigError: the structure has no velocities to keep, or there is no temperature to draw them at.
    """
    has_velocities = bool(np.any(atoms.get_momenta()))
    if settings.velocities == "keep" and not has_velocities:
        raise ConfigError("the structure has no velocities to keep: draw them at a temperature")
    if has_velocities and settings.velocities != "draw":
        return
    if settings.temperature is None:
        raise ConfigError("the structure has no velocities: give a temperature in K to draw them at")
    scale = np.sqrt(atoms.get_masses() * units.kB * settings.temperature)[:, None]
    momenta = rng.standard_normal((len(atoms), 3)) * scale
    if _is_free(atoms):
        momenta = _without_drift(atoms, momenta)
    atoms.set_momenta(momenta, apply_constraint=True)
    present = temperature(atoms, degrees_of_freedom(atoms))
    if present > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(settings.temperature / present))


def degrees_of_freedom(atoms: Atoms, conserves_momentum: bool = True) -> int:
    """Counts the velocities that can be thermal: all but those that constraints or conservation laws fix.

    All dynamics but Langevin's conserve total momentum and, without periodic axes, angular momentum.
    """
    if not _is_free(atoms) or not conserves_momentum:
        return int(atoms.get_number_of_degrees_of_freedom())
    rotations = 0 if atoms.pbc.any() else int((atoms.get_moments_of_inertia() > _LINEAR).sum())
    return max(3 * len(atoms) - 3 - rotations, 1)


def temperature(atoms: Atoms, num_degrees: int) -> float:
    """Returns the kinetic temperature in K."""
    return float(2.0 * atoms.get_kinetic_energy() / (num_degrees * units.kB))


def _is_free(atoms: Atoms) -> bool:
    """Whether total momentum is conserved, since no constraint holds the structure in space."""
    return not atoms.constraints and len(atoms) > 1


def _without_drift(atoms: Atoms, momenta: np.ndarray) -> np.ndarray:
    masses = atoms.get_masses()[:, None]
    velocities = (momenta - masses * momenta.sum(axis=0) / masses.sum()) / masses
    if not atoms.pbc.any():
        relative = atoms.positions - atoms.get_center_of_mass()
        moments, axes = atoms.get_moments_of_inertia(vectors=True)
        spin = axes @ np.cross(relative, masses * velocities).sum(axis=0)
        rate = np.divide(spin, moments, out=np.zeros(3), where=moments > _LINEAR) @ axes
        velocities = velocities - np.cross(rate, relative)
    return velocities * masses
