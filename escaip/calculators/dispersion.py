"""D3 dispersion added to an ASE calculator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, CalculationFailed, InputError
from ase.cell import Cell

from escaip.calculators.ase import PotentialCalculator, has_volume
from escaip.errors import ConfigError, DataError
from escaip.potential import Potential
from escaip.types import TARGETS

DAMPINGS = ("bj", "zero", "bjm", "zerom", "op")
_SUMMED = ("forces", "energy", "free_energy", "stress")  # forces first: dftd3 then evaluates once
_PASSED = ("energy_spread", "forces_spread")


class DispersionCalculator(PotentialCalculator):
    """Sum of a calculator and D3 dispersion, which ``dftd3.ase.DFTD3`` evaluates.

    Use it only where the training data contain no dispersion: a model trained on PBE-D3, ωB97M-V or other energies with
    dispersion would count it twice. The spreads of a committee and further targets are passed on.

    Args:
        calculator: the calculator without dispersion.
        functional: functional of the training data, whose D3 parameters are used.
        damping: one of ``DAMPINGS``.
        **options: further options of ``dftd3.ase.DFTD3``, such as ``realspace_cutoff={"disp2": 20.0}``.

    Raises:
        ConfigError: dftd3 is not installed, or has no such parameters.
    """

    _rebuilt = ("_lock", "_dispersion")
    _has_warned = True  # the calculator below warns

    def __init__(
        self, calculator: BaseCalculator, functional: str = "pbe", damping: str = "bj", **options: Any
    ) -> None:
        super().__init__()
        if damping not in DAMPINGS:
            raise ConfigError(f"D3 damping is {damping!r}: choose {', '.join(DAMPINGS)}")
        self.calculator = calculator
        self.options = {"method": functional, "damping": f"d3{damping}", **options}
        known = calculator.implemented_properties
        passed = [name for name in known if name in (*TARGETS, *_PASSED) and name not in _SUMMED]
        self.implemented_properties = [*(name for name in _SUMMED if name in known), *passed]
        self._forget()

    @property
    def potentials(self) -> Sequence[Potential]:
        """The potentials of the calculator below; none for a calculator of another program."""
        found: Sequence[Potential] = getattr(self.calculator, "potentials", ())
        return found

    @property
    def origin(self) -> dict[str, Any]:
        """Origin of the calculator below, where it states one, and the dispersion."""
        text = f"{self.options['damping']} of {self.options['method']}"
        return {**getattr(self.calculator, "origin", {}), "dispersion": text}

    def _forget(self) -> None:
        super()._forget()
        try:
            from dftd3.ase import DFTD3
        except ImportError as error:
            raise ConfigError(f"D3 needs a library ({error}): pip install dftd3") from error
        self._dispersion = DFTD3(**self.options)
        try:
            self._dispersion.get_property("energy", Atoms("He"))
        except InputError as error:
            raise ConfigError(
                f"D3 has no parameters for functional {self.options['method']!r} with this damping: name that of the "
                "training data, such as pbe, r2scan or b3lyp"
            ) from error

    def _evaluate(self, atoms: Atoms, properties: Sequence[str], changes: Sequence[str]) -> dict[str, Any]:
        names = [name for name in self.implemented_properties if name != "stress" or has_volume(atoms)]
        results = {name: self.calculator.get_property(name, atoms) for name in names}
        wide = _with_room(atoms)
        for name in (name for name in names if name in _SUMMED):
            try:
                added = self._dispersion.get_property("energy" if name == "free_energy" else name, wide)
            except (InputError, CalculationFailed) as error:
                raise DataError(f"{atoms.symbols}: D3 cannot evaluate it ({error}): leave D3 out") from error
            results[name] += added * (wide.get_volume() / atoms.get_volume() if name == "stress" else 1.0)
        return results


def _with_room(atoms: Atoms) -> Atoms:
    """Returns a copy whose open axes are longer than the structure, since dftd3 wraps atoms into the cell."""
    wide = atoms.copy()
    room = 2.0 * float(np.linalg.norm(np.ptp(atoms.positions, axis=0))) + 10.0
    cell = Cell(np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)).complete().array
    wide.cell = np.where(atoms.pbc[:, None], cell, cell * room)
    return wide
