"""Conversion factors into the package's units: Å, eV, eV/Å, eV/Å³ (stress positive in tension).

Values are those of ``ase.units`` (CODATA 2014), so that numbers agree with ASE to the last digit;
multiply by a factor to convert into the package's unit, for example ``energy_in_hartree * HARTREE``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from escaip.errors import ConfigError

BOHR = 0.5291772105638411
"""Å."""
NANOMETER = 10.0
"""Å."""
HARTREE = 27.211386024367243
"""eV."""
RYDBERG = 13.605693012183622
"""eV."""
MEV = 1e-3
"""eV."""
KCAL_PER_MOL = 0.04336410390059322
"""eV."""
KJ_PER_MOL = 0.010364269574711572
"""eV."""
GPA = 0.006241509125883258
"""eV/Å³."""
KBAR = 0.0006241509125883258
"""eV/Å³."""

LENGTH = {"angstrom": 1.0, "bohr": BOHR, "nm": NANOMETER}
ENERGY = {
    "eV": 1.0,
    "meV": MEV,
    "hartree": HARTREE,
    "rydberg": RYDBERG,
    "kcal/mol": KCAL_PER_MOL,
    "kJ/mol": KJ_PER_MOL,
}
PRESSURE = {"GPa": GPA, "kbar": KBAR, "MPa": GPA * 1e-3}

_ALIASES = {
    "a": "angstrom",
    "ang": "angstrom",
    "å": "angstrom",
    "a0": "bohr",
    "nanometer": "nm",
    "nanometers": "nm",
    "ha": "hartree",
    "eh": "hartree",
    "ry": "rydberg",
    "kcal": "kcal/mol",
    "kj": "kJ/mol",
}


@dataclass(frozen=True)
class Units:
    """Factors that turn a source's numbers into the package's units.

    Attributes:
        length: Å per length unit of the source.
        energy: eV per energy unit.
        forces: eV/Å per force unit.
        stress: eV/Å³ per stress unit.
    """

    length: float = 1.0
    energy: float = 1.0
    forces: float = 1.0
    stress: float = 1.0

    @classmethod
    def parse(cls, spec: Mapping[str, str] | Units | None) -> Units:
        """Reads ``{"energy": "meV", "length": "angstrom", ...}``.

        Keys are ``length``, ``energy``, ``forces`` and ``stress``; forces default to energy per length and
        stress to energy per length cubed. Compound units are written ``hartree/bohr``, ``eV/angstrom^3``.

        Raises:
            ConfigError: an unknown key or unit.
        """
        if isinstance(spec, Units):
            return spec
        spec = dict(spec or {})
        unknown = sorted(set(spec) - {"length", "energy", "forces", "stress"})
        if unknown:
            raise ConfigError(f"units: unknown key {unknown[0]!r}; use length, energy, forces or stress")
        length = _lookup(spec.get("length", "angstrom"), LENGTH, "length")
        energy = _lookup(spec.get("energy", "eV"), ENERGY, "energy")
        forces = _compound(spec["forces"], 1, "forces") if "forces" in spec else energy / length
        stress = _compound(spec["stress"], 3, "stress") if "stress" in spec else energy / length**3
        return cls(length=length, energy=energy, forces=forces, stress=stress)


def _lookup(name: str, table: Mapping[str, float], what: str) -> float:
    lowered = {key.lower(): value for key, value in table.items()}
    key = str(name).strip().lower()
    key = _ALIASES.get(key, key).lower()
    if key not in lowered:
        raise ConfigError(f"units: unknown {what} unit {name!r}; use one of {', '.join(table)}")
    return lowered[key]


def _compound(name: str, power: int, what: str) -> float:
    """``energy/length`` or ``energy/length^3``, or the name of a pressure when ``power`` is 3."""
    text = str(name).strip()
    if power == 3 and text.lower() in {key.lower() for key in PRESSURE}:
        return _lookup(text, PRESSURE, what)
    match = re.fullmatch(r"(.+)/([A-Za-zÅå0]+?)(?:\^|\*\*)?(\d?)", text)
    if match is None or int(match[3] or 1) != power:
        example = "hartree/bohr" if power == 1 else "kbar, GPa or eV/angstrom^3"
        raise ConfigError(f"units: unknown {what} unit {name!r}; write it like {example}")
    return _lookup(match[1], ENERGY, "energy") / _lookup(match[2], LENGTH, "length") ** power
