from __future__ import annotations

import ase.units
import pytest

from escaip import units
from escaip.errors import ConfigError
from escaip.units import Units


def test_factors_are_those_of_ase() -> None:
    assert ase.units.Bohr == units.BOHR
    assert ase.units.Hartree == units.HARTREE
    assert ase.units.Rydberg == units.RYDBERG
    assert ase.units.kcal / ase.units.mol == units.KCAL_PER_MOL
    assert ase.units.kJ / ase.units.mol == units.KJ_PER_MOL
    assert ase.units.GPa == units.GPA
    assert pytest.approx(1e8 * ase.units.Pascal, rel=1e-14) == units.KBAR


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
