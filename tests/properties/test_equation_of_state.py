"""Equation of state: against curves that are known and the relaxed cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.eos
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

from escaip.errors import ConfigError, SimulationError
from escaip.properties import fit_equation_of_state
from escaip.simulate import relax

V0, B0, PRIME, E0 = 20.0, 90.0, 4.7, -123456.0


class Curve(Calculator):
    """Energy that follows a Birch–Murnaghan curve of the volume, far from zero."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms: Atoms | None = None, properties: Any = (), system_changes: Any = ()) -> None:
        super().calculate(atoms, properties, system_changes or all_changes)
        assert self.atoms is not None
        volume = self.atoms.get_volume()
        energy = float(ase.eos.birchmurnaghan(volume, 0.0, B0 * units.GPa, PRIME, V0)) + E0
        self.results = {"energy": energy, "forces": np.zeros((len(self.atoms), 3))}


def crystal(volume: float = 20.5) -> Atoms:
    atoms = bulk("Ge", "sc", a=volume ** (1 / 3))
    atoms.calc = Curve()
    return atoms


def test_a_known_curve_comes_back(tmp_path: Path) -> None:
    found = fit_equation_of_state(crystal(), relaxation="none")
    assert found.volume == pytest.approx(V0, rel=1e-5)
    assert found.bulk_modulus == pytest.approx(B0, rel=1e-3)
    assert found.derivative == pytest.approx(PRIME, rel=1e-2)
    assert found.energy == pytest.approx(E0, abs=1e-7)
    assert found.residual < 1e-4
    assert found.atoms.get_volume() == pytest.approx(found.volume, rel=1e-12)
    np.testing.assert_allclose(found(found.volumes), found.energies, atol=1e-7)
    found.write(tmp_path)
    written = json.loads((tmp_path / "eos.json").read_text())
    assert written["B0_GPa"] == found.bulk_modulus
    assert len(ase.io.read(tmp_path / "eos.extxyz", ":")) == 9
    assert (tmp_path / "eos.png").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eos.extxyz", "eos.json", "eos.png"]


def test_copper_is_where_its_cell_relaxes() -> None:
    atoms = bulk("Cu", a=3.7)
    atoms.calc = EMT()
    found = fit_equation_of_state(atoms)
    assert found.volume == pytest.approx(relax(atoms, cell=True, fmax=1e-4).volume, rel=1e-4)
    assert 3 < found.derivative < 7
    assert "B0" in found.summary()
    assert atoms.cell.lengths()[0] == pytest.approx(3.7 / np.sqrt(2))


def test_atoms_relax_at_each_volume() -> None:
    """Around a vacancy they move with the volume, and not in the same proportion."""
    atoms = bulk("Cu", a=3.59, cubic=True).repeat((2, 2, 1))[1:]
    atoms.calc = EMT()
    relaxed, clamped = (fit_equation_of_state(atoms, relaxation=way, points=5, fmax=0.01) for way in ("ions", "none"))
    largest = [max(np.abs(frame.get_forces()).max() for frame in found.frames) for found in (relaxed, clamped)]
    assert largest[0] < 0.01 < 0.1 < largest[1]
    assert relaxed.energy < clamped.energy


@pytest.mark.bad_input
def test_settings_and_ranges() -> None:
    with pytest.raises(ConfigError, match="points is 4"):
        fit_equation_of_state(crystal(), points=4)
    with pytest.raises(ConfigError, match=r"span is 0\.9"):
        fit_equation_of_state(crystal(), span=0.9)
    with pytest.raises(SimulationError, match=r"still falls at .* smallest volume: start nearer"):
        fit_equation_of_state(crystal(24.0), relaxation="none")
    with pytest.raises(SimulationError, match="largest volume"):
        fit_equation_of_state(crystal(17.0), relaxation="none")
    with pytest.raises(ConfigError, match="needs stress"):
        fit_equation_of_state(crystal())
