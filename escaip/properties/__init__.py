"""Properties of molecules and crystals from any ASE calculator, each in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, {
    "elastic": ("ElasticConstants", "elastic_constants"),
    "equation_of_state": ("EquationOfState", "fit_equation_of_state"),
    "neb": ("MinimumEnergyPath", "minimum_energy_path"),
    "phonons": ("Phonons", "crystal_phonons"),
    "vibrations": ("Vibrations", "molecular_vibrations"),
})  # fmt: skip
