"""What all properties share: checks and relaxation of the structure, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from matplotlib.figure import Figure

from escaip.errors import ConfigError, SimulationError
from escaip.files import aligned
from escaip.simulate.relaxation import copy_with_calculator, relax

MODEL, MUTED, ACCENT = "#2a6f97", "#b0b0b0", "#c1121f"
RELAXATIONS = ("full", "ions", "none")


def check_crystal(atoms: Atoms, what: str) -> None:
    """Raises ConfigError unless a structure has three periodic axes and no constraint."""
    if not (atoms.pbc.all() and atoms.cell.rank == 3):
        raise ConfigError(f"{what} need a crystal with three periodic axes: set atoms.cell and atoms.pbc")
    if atoms.constraints:
        raise ConfigError(f"{what} need a crystal whose atoms may all move: remove the constraints")


def at_rest(atoms: Atoms, relaxation: str, fmax: float, steps: int, what: str = "the structure") -> Atoms:
    """Returns a copy with the same calculator, relaxed to forces below ``fmax`` eV/Å; ``what`` names it in messages.

    Raises:
        ConfigError: no calculator, ``relaxation`` is neither ``"full"`` (atoms and cell), ``"ions"`` nor ``"none"``, or
            a setting is out of range.
        SimulationError: the relaxation did not converge.
    """
    if relaxation not in RELAXATIONS:
        raise ConfigError(f"relaxation is {relaxation!r}: choose {', '.join(RELAXATIONS)}")
    if relaxation == "none":
        return copy_with_calculator(atoms)
    result = relax(atoms, fmax=fmax, steps=steps, cell=relaxation == "full")
    if not result.converged:
        raise SimulationError(
            f"{what} is not relaxed after {result.steps} steps (largest force {result.largest_force:.2g} of {fmax:g} "
            "eV/Å): start nearer to the minimum, or raise fmax or steps"
        )
    return result.atoms


def deformed(atoms: Atoms, deformation: np.ndarray) -> Atoms:
    """Returns a copy with the same calculator, its cell rows and positions times ``deformation (3, 3)``."""
    own = copy_with_calculator(atoms)
    own.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    return own


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns, the first to the left and the others to the right."""
    return "\n".join(aligned(rows, numbers=True))


def new_figure(panels: int = 1, width: float = 5.2, height: float = 4.0) -> Figure:
    """Returns a figure outside of matplotlib's global state."""
    return Figure(figsize=(width * panels, height), layout="constrained")
