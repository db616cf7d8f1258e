"""Properties of molecules and crystals from any ASE calculator, each in one call."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module: imported on first use, so that one of them does not import the libraries of all.
_PUBLIC = {
    "ElasticConstants": "escaip.properties.elastic",
    "EquationOfState": "escaip.properties.equation_of_state",
    "MinimumEnergyPath": "escaip.properties.neb",
    "Phonons": "escaip.properties.phonons",
    "Vibrations": "escaip.properties.vibrations",
    "crystal_phonons": "escaip.properties.phonons",
    "elastic_constants": "escaip.properties.elastic",
    "fit_equation_of_state": "escaip.properties.equation_of_state",
    "minimum_energy_path": "escaip.properties.neb",
    "molecular_vibrations": "escaip.properties.vibrations",
}

__all__ = [
    "ElasticConstants", "EquationOfState", "MinimumEnergyPath", "Phonons", "Vibrations", "crystal_phonons",
    "elastic_constants", "fit_equation_of_state", "minimum_energy_path", "molecular_vibrations",
]  # fmt: skip

if TYPE_CHECKING:
    from escaip.properties.elastic import ElasticConstants, elastic_constants
    from escaip.properties.equation_of_state import EquationOfState, fit_equation_of_state
    from escaip.properties.neb import MinimumEnergyPath, minimum_energy_path
    from escaip.properties.phonons import Phonons, crystal_phonons
    from escaip.properties.vibrations import Vibrations, molecular_vibrations


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'escaip.properties' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
