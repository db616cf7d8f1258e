"""Models of other programs as potentials of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip.lazy import lazy_names

__all__ = ["from_fairchem", "read_fairchem"]

if TYPE_CHECKING:
    from escaip.interop.fairchem import from_fairchem, read_fairchem

__getattr__, __dir__ = lazy_names(__name__, {"fairchem": ("from_fairchem", "read_fairchem")})
