"""escaip: attention-based interatomic potentials, from files to molecular dynamics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip.lazy import lazy_names

__version__ = "0.1.0"
__all__ = ["EScAIP", "EScAIPCalculator", "EScAIPConfig", "Potential", "__version__", "load_potential"]

if TYPE_CHECKING:
    from escaip.calculators.ase import EScAIPCalculator
    from escaip.models import EScAIP, EScAIPConfig
    from escaip.potential import Potential
    from escaip.potential.loading import load_potential


__getattr__ = lazy_names(__name__, {
    "models": ("EScAIP", "EScAIPConfig"), "potential": ("Potential",), "potential.loading": ("load_potential",),
    "calculators.ase": ("EScAIPCalculator",),
})[0]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
