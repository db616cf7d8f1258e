"""D3 dispersion added to any ASE calculator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator, Calculator, all_changes
from ase.cell import Cell
from ase.stress import full_3x3_to_voigt_6_stress

from escaip.calculators.ase import has_volume
from escaip.errors import ConfigError, DataError

# Name -> class of dftd3.interface.
DAMPINGS = {
    "bj": "RationalDampingParam",
    "zero": "ZeroDampingParam",
    "bjm": "ModifiedRationalDampingParam",
    "zerom": "ModifiedZeroDampingParam",
    "op": "OptimizedPowerDampingParam",
}
_ADDED = ("energy", "free_energy", "forces", "stress")
_PASSED = ("energy_spread", "forces_spread")
_STATE = ("charge", "spin", "spin_multiplicity")
_CUTOFF_COORDINATION = 40.0 * units.Bohr


def with_dispersion(
    calculator: BaseCalculator,
    functional: str = "pbe",
    damping: str = "bj",
    *,
    three_body: bool = False,
    cutoff: float | None = None,
) -> DispersionCalculator:
    """Adds D3 dispersion to a calculator; energy, forces and stress are sums.

    Only where the training data know no dispersion: a model that was trained on PBE-D3, ωB97M-V or other energies that
    hold it would count it twice.

    Args:
        calculator: any of ASE's, :class:`~escaip.EScAIPCalculator` for example.
        functional: whose parameters; that of the training data, ``"pbe"`` for example.
        damping: ``"bj"`` (Grimme et al., J. Comput. Chem. 32, 1456, 2011), ``"zero"`` (Grimme et al., J. Chem. Phys.
            132, 154104, 2010), ``"bjm"``, ``"zerom"`` (Smith et al., J. Phys. Chem. Lett. 7, 2197, 2016) or ``"op"``
            (Witte et al., J. Chem. Theory Comput. 13, 2043, 2017).
        three_body: with the Axilrod-Teller-Muto term, which most published D3 energies leave out.
        cutoff: Å of pairs; by default the library's, 31.8. A shorter one costs less and leaves out more. The sum ends
            there without a taper, so that stress is that of the pairs within: in NaCl it differs by 3e-5 eV/Å³ from
            what differences of the energy say, since under strain pairs come and go.

    Raises:
        ConfigError: the library is missing, or it has no such parameters.
    """
    return DispersionCalculator(calculator, functional, damping, three_body, cutoff)


class DispersionCalculator(Calculator):
    """A calculator and D3 by the library of its authors (s-dftd3); see :func:`with_dispersion`.

    Spreads of a committee are passed on, since every member gets the same dispersion. Energies and stresses of single
    atoms are not: D3 has none of its own here.

    Attributes:
        calculator: what it was added to.
    """

    def __init__(
        self, calculator: BaseCalculator, functional: str, damping: str, three_body: bool, cutoff: float | None
    ) -> None:
        super().__init__()
        if damping not in DAMPINGS:
            raise ConfigError(f"D3 damping is {damping!r}: choose {', '.join(DAMPINGS)}")
        if cutoff is not None and not cutoff > 0:
            raise ConfigError(f"cutoff of D3 is {cutoff}: it must be above 0 Å")
        self.calculator = calculator
        self.functional, self.damping, self.three_body, self.cutoff = functional, damping, three_body, cutoff
        known = calculator.implemented_properties
        self.implemented_properties = [name for name in (*_ADDED, *_PASSED) if name in known]
        self.ignored_changes = getattr(calculator, "ignored_changes", set())
        self._model: Any = None
        self._parameters: Any = self._load_parameters()

    def _load_parameters(self) -> Any:
        interface = _library()
        try:
            return getattr(interface, DAMPINGS[self.damping])(method=self.functional, atm=self.three_body)
        except RuntimeError as error:
            raise ConfigError(
                f"D3 has no parameters for functional {self.functional!r} with {self.damping} damping: name the "
                "functional of the training data, pbe, r2scan or b3lyp for example"
            ) from error

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Says what changed since the last evaluation, total charge and spin included."""
        changes = list(super().check_state(atoms, tol))
        before = self.atoms
        if before is not None and any(atoms.info.get(key) != before.info.get(key) for key in _STATE):
            changes.append("charge_and_spin")
        return changes

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """ASE's entry; where the calculator below has no stress, it says why."""
        if name == "stress" and allow_calculation:
            self.calculator.get_property(name, atoms if atoms is not None else self.atoms)
        return super().get_property(name, atoms, allow_calculation)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Evaluates both; ``atoms`` is not changed.

        Raises:
            DataError: D3 has no parameters for an element, or cannot evaluate the structure.
        """
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        names = [name for name in self.implemented_properties if name != "stress" or has_volume(self.atoms)]
        results = {name: self.calculator.get_property(name, self.atoms) for name in names}
        for name, value in self._dispersion(self.atoms, set(system_changes) <= {"positions", "cell"}).items():
            if name in results:
                results[name] = results[name] + value
        self.results = results

    def _dispersion(self, atoms: Atoms, same: bool) -> dict[str, Any]:
        """Energy eV, forces ``(N, 3)`` eV/Å and, with a volume, stress ``(6,)`` eV/Å³ of D3 alone."""
        positions, cell = atoms.positions / units.Bohr, _wide_cell(atoms) / units.Bohr
        try:
            if same and self._model is not None:
                self._model.update(positions, cell)
            else:
                self._model = _library().DispersionModel(atoms.numbers, positions, cell, atoms.pbc)
                if self.cutoff is not None:
                    coordination = _CUTOFF_COORDINATION / units.Bohr
                    self._model.set_realspace_cutoff(self.cutoff / units.Bohr, coordination, coordination)
            found = self._model.get_dispersion(self._parameters, grad=True)
        except RuntimeError as error:
            self._model = None
            raise DataError(f"{atoms.symbols}: D3 cannot evaluate it ({error}): leave D3 out") from error
        energy = float(found["energy"]) * units.Hartree
        values: dict[str, Any] = {"energy": energy, "free_energy": energy}
        values["forces"] = np.array(found["gradient"]) * (-units.Hartree / units.Bohr)
        if has_volume(atoms):
            virial = np.array(found["virial"]) * units.Hartree
            values["stress"] = full_3x3_to_voigt_6_stress(0.5 * (virial + virial.T)) / atoms.get_volume()
        return values

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the library's objects."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_model", "_parameters")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = None
        self._parameters = self._load_parameters()


def _wide_cell(atoms: Atoms) -> np.ndarray:
    """``(3, 3)`` Å: the cell with open axes as long as all atoms need, within which the library wraps them."""
    extent = float(np.linalg.norm(np.ptp(atoms.positions, axis=0)))
    cell = Cell(np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)).complete().array
    return np.where(atoms.pbc[:, None], cell, cell * (2.0 * extent + 10.0))


def _library() -> Any:
    try:
        from dftd3 import interface
    except ImportError as error:
        raise ConfigError(f"D3 needs a library ({error}): pip install dftd3") from error
    return interface
