"""Models of other programs as potentials of this package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {"from_fairchem": "escaip.interop.fairchem", "read_fairchem": "escaip.interop.fairchem"}

__all__ = ["from_fairchem", "read_fairchem"]

if TYPE_CHECKING:
    from escaip.interop.fairchem import from_fairchem, read_fairchem


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'escaip.interop' has no attribute {name!r}")
