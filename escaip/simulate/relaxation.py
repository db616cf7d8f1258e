"""Geometry optimisation, with or without the cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE

from escaip.errors import ConfigError, SimulationError

OPTIMIZERS = {"bfgs": BFGS, "fire": FIRE}


@dataclass(frozen=True)
class RelaxResult:
    """Result of a relaxation.

    Attributes:
        atoms: the relaxed structure, with its calculator.
        energy: eV.
        initial_energy: eV.
        largest_force: eV/Å; includes the generalised forces of a relaxed cell.
        volume: Å³; NaN without a cell.
        pressure: GPa; NaN without three periodic axes or without stress.
    """

    atoms: Atoms
    converged: bool
    steps: int
    energy: float
    initial_energy: float
    largest_force: float
    volume: float
    pressure: float

    def summary(self) -> str:
        """Returns a few lines for people."""
        state = "converged" if self.converged else "NOT converged"
        lines = [
            f"{state} after {self.steps} steps: energy {self.energy:.6f} eV "
            f"({self.energy - self.initial_energy:+.6f} eV), largest force {self.largest_force:.4f} eV/Å"
        ]
        if np.isfinite(self.pressure):
            lines.append(f"volume {self.volume:.3f} Å³, pressure {self.pressure:.4f} GPa")
        return "\n".join(lines)


def relax(
    atoms: Atoms,
    *,
    fmax: float = 0.05,
    steps: int = 500,
    optimizer: str = "bfgs",
    cell: bool = False,
    pressure: float = 0.0,
    report: Callable[[int, float, float], None] | None = None,
) -> RelaxResult:
    """Relaxes a copy of ``atoms`` with its calculator.

    Args:
        atoms: structure with a calculator; constraints are kept.
        fmax: largest force at the end, eV/Å.
        steps: largest number of steps.
        optimizer: ``"bfgs"`` or ``"fire"``.
        cell: relax the cell as well (Fréchet filter); needs three periodic axes.
        pressure: GPa, with ``cell``.
        report: called after each step with the step, the energy in eV and the largest force in eV/Å.

    Raises:
        ConfigError: a setting is out of range or does not fit the structure.
        SimulationError: energy or forces became NaN.
    """
    if atoms.calc is None:
        raise ConfigError("the structure has no calculator: set atoms.calc")
    if not fmax > 0:
        raise ConfigError(f"fmax is {fmax} eV/Å: it must be above 0")
    if steps < 1:
        raise ConfigError(f"steps is {steps}: it must be at least 1")
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer is {optimizer!r}: choose {' or '.join(OPTIMIZERS)}")
    if cell and not (atoms.pbc.all() and atoms.cell.rank == 3):
        raise ConfigError("relaxing the cell needs three periodic axes: leave cell out, or set cell and pbc")
    if pressure and not cell:
        raise ConfigError("pressure acts on the cell: relax it with --cell, or leave pressure out")
    own = atoms.copy()
    own.calc = atoms.calc
    target = FrechetCellFilter(own, scalar_pressure=pressure * units.GPa) if cell else own
    initial_energy = float(own.get_potential_energy())
    dynamics = OPTIMIZERS[optimizer](target, logfile=None)

    def watch() -> None:
        forces = target.get_forces()
        if not (np.isfinite(forces).all() and np.isfinite(own.get_potential_energy())):
            raise SimulationError(f"stopped at step {dynamics.nsteps}: forces are NaN: check the starting structure")
        if report is not None:
            report(int(dynamics.nsteps), float(own.get_potential_energy()), _largest(forces))

    dynamics.attach(watch)
    try:
        dynamics.run(fmax=fmax, steps=steps)
    except NotImplementedError as error:  # ASE's PropertyNotImplementedError is one
        raise ConfigError(f"relaxing the cell needs stress: {error or 'this calculator has none'}") from error
    largest = _largest(target.get_forces())
    has_pressure = own.pbc.all() and "stress" in own.calc.implemented_properties
    return RelaxResult(
        atoms=own, converged=bool(largest <= fmax), steps=int(dynamics.nsteps),
        energy=float(own.get_potential_energy()), initial_energy=initial_energy, largest_force=largest,
        volume=float(own.get_volume()) if own.cell.rank == 3 else float("nan"),
        pressure=float(-np.mean(own.get_stress()[:3]) / units.GPa) if has_pressure else float("nan"),
    )  # fmt: skip


def _largest(forces: np.ndarray) -> float:
    return float(np.sqrt((forces**2).sum(axis=1).max()))
