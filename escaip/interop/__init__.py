"""Models of other programs as potentials of this one (docs/fairchem.md)."""

from escaip.interop.fairchem import from_fairchem, read_fairchem

__all__ = ["from_fairchem", "read_fairchem"]
