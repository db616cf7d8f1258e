"""Geometry optimisation, with or without the cell, of one structure or of many at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE
from ase.stress import full_3x3_to_voigt_6_stress

from escaip.calculators.ase import has_volume
from escaip.data import AtomicData
from escaip.errors import ConfigError, SimulationError
from escaip.potential import Potential
from escaip.potential.predict import as_data, iter_predict

OPTIMIZERS = {"bfgs": BFGS, "fire": FIRE}
_ATOMS_AT_ONCE = 4096
"""Atoms that are relaxed together; BFGS keeps ``(3n)²`` numbers of each structure."""
_MOST_DONE = 1024
"""Structures that may wait for an earlier one to be done."""


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


def copy_with_calculator(atoms: Atoms) -> Atoms:
    """Returns a copy with the same calculator; raises ConfigError for a structure without one."""
    if atoms.calc is None:
        raise ConfigError("the structure has no calculator: set atoms.calc")
    own = atoms.copy()
    own.calc = atoms.calc
    return own


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
    own = copy_with_calculator(atoms)
    target, dynamics = _start(own, fmax, steps, optimizer, cell, pressure)
    initial_energy = float(own.get_potential_energy())

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
    return _result(own, target, fmax, int(dynamics.nsteps), initial_energy)


def relax_all(
    potentials: Sequence[Potential],
    structures: Iterable[Atoms],
    *,
    fmax: float = 0.05,
    steps: int = 500,
    first: int = 0,
    **options: Any,
) -> Iterator[RelaxResult]:
    """Relaxes copies of any number of structures and yields the results in their order, in bounded memory.

    Each structure has an ASE optimiser of its own and takes the steps that it would take alone; energies and forces of
    some thousand atoms are evaluated together, and structures that are done make room for the next. A structure whose
    forces become NaN ends, not converged, where they last were numbers.

    Args:
        potentials: one, or the members of a committee, whose means are taken.
        structures: their constraints are kept, their calculators left aside.
        fmax: largest force at the end, eV/Å.
        steps: largest number of steps of each structure.
        first: index of the first structure, for messages.
        options: ``optimizer``, ``cell`` and ``pressure`` of ``relax``.

    Raises:
        ConfigError: as ``relax``, or ``cell`` with a direct-force model.
        SimulationError: forces of a structure are NaN before the first step; names its index.
        DataError, UnsupportedElementError: a structure that the potential cannot evaluate; names it.
    """
    if options.get("cell") and not all(potential.config.is_conservative for potential in potentials):
        raise ConfigError("relaxing the cell needs stress: a direct-force model has none")
    rest, active, done = enumerate(structures, first), list[_Relaxation](), dict[int, RelaxResult]()
    while True:
        entering = list[_Relaxation]()
        while sum(len(one.atoms) for one in active + entering) < _ATOMS_AT_ONCE and len(done) < _MOST_DONE:
            if (following := next(rest, None)) is None:
                break
            entering.append(_Relaxation(*following, fmax, steps, **options))
        if not active and not entering:
            return
        _evaluate(potentials, entering)
        active += entering
        done |= {one.index: one.result() for one in active if one.is_done()}
        active = [one for one in active if one.index not in done]
        while first in done:
            yield done.pop(first)
            first += 1
        for one in active:
            one.steps += 1
            one.dynamics.step()
        _evaluate(potentials, active)


class _Relaxation:
    """One structure on its way to a minimum; its calculator holds energy, forces and stress where it is."""

    def __init__(self, index: int, atoms: Atoms, fmax: float, steps: int, **options: Any) -> None:
        self.index, self.atoms, self.fmax, self.most_steps = index, atoms.copy(), fmax, steps
        self.target, self.dynamics = _start(self.atoms, fmax, steps, **options, name=f"structure {index}: ")
        self.data = as_data(self.atoms, index)
        self.steps, self.is_broken, self.initial_energy = 0, False, np.nan

    def moved(self) -> AtomicData:
        """Returns the structure where it is now."""
        positions, cell = torch.from_numpy(self.atoms.positions.copy()), torch.from_numpy(self.atoms.cell.array.copy())
        return AtomicData.from_fields({**self.data._store, "positions": positions, "cell": cell[None]})

    def receive(self, results: dict[str, Any]) -> None:
        """Takes the answers for where the structure is, or goes back to where it was."""
        if all(np.isfinite(value).all() for value in results.values()):
            self.atoms.calc = SinglePointCalculator(self.atoms, **results)
            self.initial_energy = self.initial_energy if self.steps else results["energy"]
            return
        if self.atoms.calc is None:
            raise SimulationError(f"structure {self.index}: forces are NaN: check the starting structure")
        before, self.is_broken = self.atoms.calc.atoms, True
        self.atoms.set_cell(before.cell)
        self.atoms.set_positions(before.positions, apply_constraint=False)

    def is_done(self) -> bool:
        return self.is_broken or self.steps >= self.most_steps or _largest(self.target.get_forces()) <= self.fmax

    def result(self) -> RelaxResult:
        return _result(self.atoms, self.target, self.fmax, self.steps, self.initial_energy)


def _evaluate(potentials: Sequence[Potential], moving: Sequence[_Relaxation]) -> None:
    """Hands every structure its energy, forces and, where it is defined, stress."""
    if not moving:
        return
    structures, first = [one.moved() for one in moving], moving[0].index
    stress = all(potential.config.is_conservative for potential in potentials)
    found = [[*iter_predict(one, structures, compute_stress=stress, first=first)] for one in potentials]
    for one, *members in zip(moving, *found, strict=True):
        names = ("energy", "forces", "stress") if stress and has_volume(one.atoms) else ("energy", "forces")
        results = {
            name: np.mean([np.asarray(member.of_target(name), dtype=np.float64) for member in members], axis=0)
            for name in names
        }
        if "stress" in results:
            results["stress"] = full_3x3_to_voigt_6_stress(results["stress"])
        one.receive({**results, "energy": float(results["energy"])})


def _start(
    atoms: Atoms, fmax: float, steps: int, optimizer: str = "bfgs", cell: bool = False, pressure: float = 0.0,
    name: str = "",
) -> tuple[Any, Any]:  # fmt: skip
    """Checks the settings; returns what is optimised and its optimiser."""
    if not fmax > 0:
        raise ConfigError(f"fmax is {fmax} eV/Å: it must be above 0")
    if steps < 1:
        raise ConfigError(f"steps is {steps}: it must be at least 1")
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer is {optimizer!r}: choose {' or '.join(OPTIMIZERS)}")
    if cell and not (atoms.pbc.all() and atoms.cell.rank == 3):
        raise ConfigError(f"{name}relaxing the cell needs three periodic axes: leave cell out, or set cell and pbc")
    if pressure and not cell:
        raise ConfigError("pressure acts on the cell: relax it with --cell, or leave pressure out")
    target = FrechetCellFilter(atoms, scalar_pressure=pressure * units.GPa) if cell else atoms
    return target, OPTIMIZERS[optimizer](target, logfile=None)


def _result(atoms: Atoms, target: Any, fmax: float, steps: int, initial_energy: float) -> RelaxResult:
    largest, pressure = _largest(target.get_forces()), float("nan")
    if atoms.pbc.all():
        with contextlib.suppress(NotImplementedError):  # ASE's PropertyNotImplementedError is one
            pressure = float(-np.mean(atoms.get_stress()[:3]) / units.GPa)
    return RelaxResult(
        atoms=atoms, converged=bool(largest <= fmax), steps=steps, energy=float(atoms.get_potential_energy()),
        initial_energy=initial_energy, largest_force=largest,
        volume=float(atoms.get_volume()) if atoms.cell.rank == 3 else float("nan"), pressure=pressure,
    )  # fmt: skip


def _largest(forces: np.ndarray) -> float:
    return float(np.sqrt((forces**2).sum(axis=1).max()))
