"""A potential: model, atomic energies, scale and derivatives; its files; faster forms of its evaluation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Potential": "escaip.potential.potential",
    "PotentialMetadata": "escaip.potential.model_file",
    "load_potential": "escaip.potential.loading",
}

__all__ = ["Potential", "PotentialMetadata", "load_potential"]

if TYPE_CHECKING:
    from escaip.potential.loading import load_potential
    from escaip.potential.model_file import PotentialMetadata
    from escaip.potential.potential import Potential


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'escaip.potential' has no attribute {name!r}")
