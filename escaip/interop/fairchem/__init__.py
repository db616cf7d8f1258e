"""EScAIP models of fairchem-core as potentials of this package (docs/howto/fairchem.md)."""

from escaip.interop.fairchem.importing import from_fairchem, read_fairchem

__all__ = ["from_fairchem", "read_fairchem"]
