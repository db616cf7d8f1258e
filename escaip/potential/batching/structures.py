"""What users call structures, as :class:`~escaip.data.AtomicData` without labels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from escaip.errors import DataError, UsageError

if TYPE_CHECKING:
    from escaip.data import AtomicData


def check_iterable(structures: Any) -> None:
    """Refuses what is no series of structures, with what to pass instead.

    Raises:
        UsageError: a path, a batch, a single structure, or nothing to iterate over.
    """
    from ase import Atoms
    from torch_geometric.data import Batch

    from escaip.data import AtomicData

    if isinstance(structures, str | bytes | os.PathLike):
        raise UsageError(
            f"predict takes structures, not the path {os.fspath(structures)!r}: pass escaip.data.open_source(path) or "
            "ase.io.read(path, ':')"
        )
    if isinstance(structures, Batch):
        raise UsageError("predict takes structures, not a batch: call potential(batch), or pass batch.to_data_list()")
    if isinstance(structures, Atoms | AtomicData) or _is_pymatgen(structures):
        raise UsageError(f"predict takes several structures, got one {type(structures).__name__}: pass a list of it")
    if not isinstance(structures, Iterable):
        raise UsageError(f"predict takes structures, got {type(structures).__name__}: pass a list or an iterable")


def as_data(structure: Any, index: int) -> AtomicData:
    """A structure as the potential reads it, without labels.

    Raises:
        DataError: it is invalid.
        UsageError: it is none.
    """
    from ase import Atoms

    from escaip.data import AtomicData

    if isinstance(structure, AtomicData):
        if not structure.num_nodes:
            raise DataError(f"structure {index}: has no atoms: leave it out")
        return structure
    try:
        if isinstance(structure, Atoms):
            # Neither calculator nor constraints, whose contents would be read as labels.
            bare = Atoms(structure.numbers, structure.positions, cell=structure.cell, pbc=structure.pbc)
            bare.info = structure.info
            return AtomicData.from_ase(bare)
        if _is_pymatgen(structure):
            from escaip.data.readers.pymatgen import from_pymatgen

            return from_pymatgen(structure, labels=dict.fromkeys(("energy", "forces", "stress")))
    except DataError as error:
        raise naming(error, index) from error
    raise UsageError(
        f"structure {index} is a {type(structure).__name__}: predict takes ase.Atoms, AtomicData or pymatgen structures"
    )


def join_structures(structures: Sequence[AtomicData]) -> Any:
    """A batch of structures; neighbor lists that are attached to some of them only are left out."""
    from escaip.data import AtomicData, collate
    from escaip.data.atomic_data import EDGE_FIELDS

    attached = ["edge_index" in data._store for data in structures]
    if any(attached) and not all(attached):
        structures = [
            AtomicData.from_fields({key: value for key, value in data._store.items() if key not in EDGE_FIELDS})
            for data in structures
        ]
    return collate(structures)


def naming(error: Exception, index: int, name: str = "") -> Exception:
    """The same error with the structure at the head of its message."""
    return type(error)(f"structure {index}{f' ({name})' if name else ''}: {error}")


def _is_pymatgen(structure: Any) -> bool:
    if not hasattr(structure, "cart_coords"):  # spares the import
        return False
    from pymatgen.core import SiteCollection

    return isinstance(structure, SiteCollection)
