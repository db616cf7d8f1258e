"""Calculators that the tests distil; `worker.py` imports this module by its name."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT


class Faulty(EMT):
    """EMT, or a failure of the kind that ``fault`` names for structures of ``size`` atoms."""

    def __init__(self, fault: str = "", size: int = 0) -> None:
        super().__init__()
        self.fault, self.size = fault, size

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.converged = not (self.fault == "unconverged" and len(atoms) == self.size)
        if len(atoms) == self.size:
            if self.fault == "nan":
                self.results["forces"][0, 0] = np.nan
            if self.fault == "raise":
                raise RuntimeError("the SCF did not converge\nand said so twice")
            if self.fault == "die":
                os._exit(3)
            if self.fault == "hang":
                time.sleep(60)
            print("a calculator that prints")


class Charged(Calculator):
    """Energy in eV: 100 times the charge, 10 times the spin multiplicity, in the places where calculators read them."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms: Any = None, properties: Any = (), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        assert atoms.get_initial_charges().sum() == atoms.info["charge"]
        assert atoms.get_initial_magnetic_moments().sum() == atoms.info["spin"] - 1
        energy = 100.0 * atoms.info["charge"] + 10.0 * atoms.info["spin"]
        self.results = {"energy": energy, "forces": np.zeros((len(atoms), 3))}


class Hollow(Calculator):
    """A crystal that is without force and collapses, as fitted potentials do beyond what they were fitted to."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def calculate(self, atoms: Any = None, properties: Any = (), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        volume = atoms.get_volume()
        energy = -1e5 / volume**2
        pressure = 2 * energy / volume  # −dE/dV
        stress = -pressure * np.array([1.0, 1, 1, 0, 0, 0])
        self.results = {"energy": energy, "forces": np.zeros((len(atoms), 3)), "stress": stress}


def slow(seconds: float = 0.02) -> EMT:
    """EMT that takes its time."""

    class Slow(EMT):
        def calculate(self, *arguments: Any, **named: Any) -> None:
            time.sleep(seconds)
            super().calculate(*arguments, **named)

    return Slow()
