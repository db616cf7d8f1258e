"""The structure that a property is of: checked, and at rest where that is wanted."""

from __future__ import annotations

import numpy as np
from ase import Atoms

from escaip.errors import ConfigError, SimulationError
from escaip.simulate.relaxation import relax

RELAXATIONS = ("full", "ions", "none")


def check_crystal(atoms: Atoms, what: str) -> None:
    """Raises ConfigError for what has no calculator, or is not periodic along three axes."""
    check_calculator(atoms)
    if not (atoms.pbc.all() and atoms.cell.rank == 3):
        raise ConfigError(f"{what} need a crystal with three periodic axes: set atoms.cell and atoms.pbc")
    if atoms.constraints:
        raise ConfigError(f"{what} are of a crystal whose atoms may all move: remove the constraints")


def check_calculator(atoms: Atoms) -> None:
    """Raises ConfigError for a structure without a calculator."""
    if atoms.calc is None:
        raise ConfigError("the structure has no calculator: set atoms.calc")


def at_rest(atoms: Atoms, relaxation: str, fmax: float, steps: int, what: str = "the structure") -> Atoms:
    """A relaxed copy with the same calculator.

    Args:
        atoms: structure with a calculator.
        relaxation: ``"full"`` (atoms and cell), ``"ions"`` or ``"none"``.
        fmax: largest force at the end, eV/Å.
        steps: give up after so many.
        what: for the message.

    Raises:
        ConfigError: an unknown ``relaxation``, or a setting out of range.
        SimulationError: not converged.
    """
    if relaxation not in RELAXATIONS:
        raise ConfigError(f"relaxation is {relaxation!r}: choose {', '.join(RELAXATIONS)}")
    if relaxation == "none":
        own = atoms.copy()
        own.calc = atoms.calc
        return own
    result = relax(atoms, fmax=fmax, steps=steps, cell=relaxation == "full")
    if not result.converged:
        raise SimulationError(
            f"{what} is not relaxed after {result.steps} steps (largest force {result.largest_force:.2g} of {fmax:g} "
            "eV/Å): start nearer to the minimum, or raise fmax or steps"
        )
    return result.atoms


def largest_force(atoms: Atoms) -> float:
    """eV/Å; constrained atoms do not count."""
    return float(np.sqrt((atoms.get_forces() ** 2).sum(axis=1).max()))


def deformed(atoms: Atoms, deformation: np.ndarray) -> Atoms:
    """A copy with the same calculator: cell rows and positions times ``deformation`` from the right."""
    own = atoms.copy()
    own.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    own.calc = atoms.calc
    return own
