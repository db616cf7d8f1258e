"""escaip: attention-based interatomic potentials, from files to molecular dynamics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Name -> module: imported on first use, so that `import escaip` and the command line start fast.
_PUBLIC = {
    "EScAIP": "escaip.models.escaip",
    "EScAIPConfig": "escaip.models.escaip",
    "Potential": "escaip.potential",
    "load_potential": "escaip.potential.loading",
    "EScAIPCalculator": "escaip.calculators.ase",
}

__all__ = ["EScAIP", "EScAIPCalculator", "EScAIPConfig", "Potential", "__version__", "load_potential"]

if TYPE_CHECKING:
    from escaip.calculators.ase import EScAIPCalculator
    from escaip.models import EScAIP, EScAIPConfig
    from escaip.potential import Potential
    from escaip.potential.loading import load_potential


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'escaip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
