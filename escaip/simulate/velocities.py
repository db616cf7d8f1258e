"""Initial velocities, and how many degrees of freedom they have."""

from __future__ import annotations

import numpy as np
from ase import Atoms, units

from escaip.errors import ConfigError
from escaip.simulate.settings import MDSettings

_LINEAR = 1e-6


def prepare_velocities(atoms: Atoms, settings: MDSettings, rng: np.random.Generator) -> None:
    """Draws velocities where the settings say so; sets momenta of ``atoms``, the run's own copy.

    Drawn velocities follow Maxwell-Boltzmann, without net momentum and, for a molecule without periodic axes,
    without rotation, scaled to the exact temperature. A relaxed structure turns about half of that into potential
    energy.

    Raises:
        ConfigError: there are none to keep, or no temperature to draw them at.
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
    if is_free(atoms):
        momenta = _without_drift(atoms, momenta)
    atoms.set_momenta(momenta, apply_constraint=True)
    present = temperature(atoms, degrees_of_freedom(atoms))
    if present > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(settings.temperature / present))


def is_free(atoms: Atoms) -> bool:
    """Whether nothing holds the structure in space, so that its total momentum stays what it is."""
    return not atoms.constraints and len(atoms) > 1


def degrees_of_freedom(atoms: Atoms, conserves_momentum: bool = True) -> int:
    """Number of velocities that can be thermal: without those that constraints or conservation laws fix.

    Args:
        atoms: the structure.
        conserves_momentum: whether the dynamics conserves total momentum (all but Langevin's) and, without
            periodic axes, angular momentum.
    """
    if not is_free(atoms) or not conserves_momentum:
        return int(atoms.get_number_of_degrees_of_freedom())
    rotations = 0 if atoms.pbc.any() else int((_moments_of_inertia(atoms)[0] > _LINEAR).sum())
    return max(3 * len(atoms) - 3 - rotations, 1)


def temperature(atoms: Atoms, num_degrees: int) -> float:
    """Kinetic temperature in K."""
    return float(2.0 * atoms.get_kinetic_energy() / (num_degrees * units.kB))


def _without_drift(atoms: Atoms, momenta: np.ndarray) -> np.ndarray:
    masses = atoms.get_masses()[:, None]
    velocities = (momenta - masses * momenta.sum(axis=0) / masses.sum()) / masses
    if not atoms.pbc.any():
        place = atoms.positions - atoms.get_center_of_mass()
        moments, axes = _moments_of_inertia(atoms)
        spin = axes @ np.cross(place, masses * velocities).sum(axis=0)
        rate = np.divide(spin, moments, out=np.zeros(3), where=moments > _LINEAR) @ axes
        velocities = velocities - np.cross(rate, place)
    return velocities * masses


def _moments_of_inertia(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Principal moments in amu Å², and their axes as rows."""
    place = atoms.positions - atoms.get_center_of_mass()
    masses = atoms.get_masses()
    tensor = np.einsum("i,ij,ij->", masses, place, place) * np.eye(3) - np.einsum("i,ij,ik->jk", masses, place, place)
    moments, axes = np.linalg.eigh(tensor)
    return moments, axes.T
