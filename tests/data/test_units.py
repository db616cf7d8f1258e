from __future__ import annotations

import ase.units
import pytest

from escaip import units
from escaip.errors import ConfigError
from escaip.units import Units


def test_factors_are_those_of_ase() -> None:
    assert units.BOHR == ase.units.Bohr
    assert units.HARTREE == ase.units.Hartree
    assert units.RYDBERG == ase.units.Rydberg
    assert units.KCAL_PER_MOL == ase.units.kcal / ase.units.mol
    assert units.KJ_PER_MOL == ase.units.kJ / ase.units.mol
    assert units.GPA == ase.units.GPa
    assert units.KBAR == pytest.approx(1e8 * ase.units.Pascal, rel=1e-14)
    assert units.BOLTZMANN == ase.units.kB


def test_forces_and_stress_follow_energy_and_length() -> None:
    parsed = Units.parse({"energy": "hartree", "length": "bohr"})
    assert parsed.forces == pytest.approx(units.HARTREE / units.BOHR)
    assert parsed.stress == pytest.approx(units.HARTREE / units.BOHR**3)


@pytest.mark.parametrize(
    ("spec", "field", "expected"),
    [
        ({"forces": "hartree/bohr"}, "forces", units.HARTREE / units.BOHR),
        ({"forces": "kcal/mol/angstrom"}, "forces", units.KCAL_PER_MOL),
        ({"stress": "kbar"}, "stress", units.KBAR),
        ({"stress": "GPa"}, "stress", units.GPA),
        ({"stress": "meV/angstrom^3"}, "stress", 1e-3),
        ({"energy": "kcal"}, "energy", units.KCAL_PER_MOL),
        ({"length": "nm"}, "length", 10.0),
    ],
)
def test_parsing(spec: dict[str, str], field: str, expected: float) -> None:
    assert getattr(Units.parse(spec), field) == pytest.approx(expected, rel=1e-14)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "spec", [{"energy": "furlong"}, {"colour": "eV"}, {"stress": "eV/angstrom"}, {"forces": "eV/angstrom^3"}]
)
def test_unknown_units_are_refused(spec: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"units: unknown"):
        Units.parse(spec)
