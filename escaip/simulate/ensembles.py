"""ASE's integrators, and the whole of their state as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT, NoseHooverChainThermostat
from ase.md.verlet import VelocityVerlet

from escaip.simulate.settings import MDSettings
from escaip.simulate.velocities import degrees_of_freedom

# What an integrator carries from one step to the next beside positions, momenta, cell and random numbers.
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
class Ensemble:
    """An integrator bound to atoms.

    Attributes:
        dynamics: ASE's integrator.
        rng: random numbers of velocities and thermostat.
        num_degrees: thermal degrees of freedom, for the temperature.
    """

    dynamics: MolecularDynamics
    rng: np.random.Generator
    num_degrees: int

    def conserved_energy(self) -> float:
        """What the equations of motion conserve in eV; NaN for Langevin, which conserves nothing."""
        dynamics = self.dynamics
        if isinstance(dynamics, Langevin):
            return float("nan")
        if isinstance(dynamics, (NoseHooverChainNVT, IsotropicMTKNPT, MTKNPT)):
            return float(dynamics.get_conserved_energy())
        energy = float(dynamics.atoms.get_potential_energy() + dynamics.atoms.get_kinetic_energy())
        return energy - float(dynamics.transferred_energy) if isinstance(dynamics, Bussi) else energy

    def state(self) -> dict[str, np.ndarray]:
        """Returns the internal variables, by name; scalars as 0-d arrays."""
        return {name: np.array(_get(self.dynamics, name), dtype=np.float64) for name in _STATE[type(self.dynamics)]}

    def restore(self, state: dict[str, np.ndarray], step: int) -> None:
        """Puts internal variables back."""
        for name in _STATE[type(self.dynamics)]:
            value = state[name]
            _set(self.dynamics, name, value.copy() if value.ndim else float(value))
        self.dynamics.nsteps = step


def make_ensemble(atoms: Atoms, settings: MDSettings, rng: np.random.Generator) -> Ensemble:
    """Builds the integrator for ``atoms``, which it moves.

    Thermostats act on the degrees of freedom that are free: where total momentum is conserved ASE's own count of
    ``3N`` would heat a nine-atom molecule by a quarter.
    """
    step = settings.timestep * units.fs
    if settings.ensemble == "nve":
        return Ensemble(VelocityVerlet(atoms, step), rng, degrees_of_freedom(atoms))
    assert settings.temperature is not None
    relaxation = settings.thermostat_time * units.fs
    if settings.thermostat == "langevin":
        dynamics = Langevin(
            atoms, step, temperature_K=settings.temperature, friction=1.0 / relaxation, fixcm=False, rng=rng
        )
        return Ensemble(dynamics, rng, degrees_of_freedom(atoms, conserves_momentum=False))
    num_degrees = degrees_of_freedom(atoms)
    if settings.thermostat == "bussi":
        bussi = Bussi(atoms, step, temperature_K=settings.temperature, taut=relaxation, rng=rng)
        bussi.ndof = num_degrees
        bussi.target_kinetic_energy = 0.5 * bussi.temp * num_degrees
        return Ensemble(bussi, rng, num_degrees)
    if settings.thermostat == "nose-hoover":
        chain = NoseHooverChainNVT(atoms, step, temperature_K=settings.temperature, tdamp=relaxation)
        chain._thermostat = _chain_for(num_degrees, atoms, settings.temperature, relaxation)
        return Ensemble(chain, rng, num_degrees)
    return Ensemble(_constant_pressure(atoms, settings, step, relaxation, num_degrees), rng, num_degrees)


def _constant_pressure(
    atoms: Atoms, settings: MDSettings, step: float, relaxation: float, num_degrees: int
) -> MolecularDynamics:
    assert settings.temperature is not None
    kind = IsotropicMTKNPT if settings.barostat == "isotropic" else MTKNPT
    dynamics = kind(
        atoms,
        step,
        temperature_K=settings.temperature,
        pressure_au=(settings.pressure or 0.0) * units.GPa,
        tdamp=relaxation,
        pdamp=settings.barostat_time * units.fs,
    )
    # In their equations the number of atoms stands for a third of the degrees of freedom.
    dynamics._num_atoms_global = num_degrees / 3
    dynamics._thermostat = _chain_for(num_degrees, atoms, settings.temperature, relaxation)
    return dynamics


def _chain_for(num_degrees: int, atoms: Atoms, temperature: float, relaxation: float) -> NoseHooverChainThermostat:
    return NoseHooverChainThermostat(
        num_atoms_global=num_degrees / 3,  # type: ignore[arg-type]
        masses=atoms.get_masses()[:, None],
        temperature_K=temperature,
        tdamp=relaxation,
    )


def _get(owner: Any, name: str) -> Any:
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def _set(owner: Any, name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, value)
