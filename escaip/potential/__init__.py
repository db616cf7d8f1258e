"""A potential: model, atomic energies, scale and derivatives; its files; faster forms of its evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip.lazy import lazy_names

__all__ = ["Potential", "PotentialMetadata", "load_potential"]

if TYPE_CHECKING:
    from escaip.potential.loading import load_potential
    from escaip.potential.model_file import PotentialMetadata
    from escaip.potential.potential import Potential

__getattr__, __dir__ = lazy_names(
    __name__,
    {"loading": ("load_potential",), "model_file": ("PotentialMetadata",), "potential": ("Potential",)},
)
