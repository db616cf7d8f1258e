"""`AtomicData`, one structure with its labels, and `collate`, which makes a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch_geometric.data import Batch, Data

from escaip.data.validation import check_structure
from escaip.errors import DataError
from escaip.units import Units

if TYPE_CHECKING:
    from ase import Atoms

    from escaip.data.labels import LabelKeys

TENSOR_FIELDS = (
    "positions",
    "atomic_numbers",
    "cell",
    "pbc",
    "charge",
    "spin_multiplicity",
    "energy",
    "forces",
    "stress",
    "fixed",
    "tags",
    "dataset",
)
TEXT_FIELDS = ("structure_id", "group")
EDGE_FIELDS = ("edge_index", "edge_shift", "edge_cutoff")
PER_ATOM_FIELDS = ("positions", "atomic_numbers", "forces", "fixed", "tags")
LABELS = ("energy", "forces", "stress")

_NO_UNITS = Units()


class AtomicData(Data):
    """One structure: Å, eV, eV/Å, eV/Å³. Every field is always there; a missing label is NaN.

    Attributes:
        positions: ``(n, 3)`` float64 Å.
        atomic_numbers: ``(n,)`` int64, 1..118.
        cell: ``(1, 3, 3)`` float64 Å, rows are lattice vectors, zeros when absent.
        pbc: ``(1, 3)`` bool; decides, per axis, whether the cell counts.
        charge: ``(1,)`` int64 total charge in e.
        spin_multiplicity: ``(1,)`` int64.
        energy: ``(1,)`` float64 eV.
        forces: ``(n, 3)`` float64 eV/Å.
        stress: ``(1, 3, 3)`` float64 eV/Å³, positive in tension.
        fixed: ``(n,)`` bool, atoms held by a constraint.
        tags: ``(n,)`` int64, 0 subsurface, 1 surface, 2 adsorbate in OC20.
        dataset: ``(1,)`` int64, which of the sets that a potential was trained on, for those with element references
            of their own; −1 unstated.
        structure_id: unique name, for messages.
        group: key of what must not be split (molecule, material).
        num_nodes: ``n``.
        magnetic_moments: optional ``(n,)`` float64 μB, kept through stores and conversions; batches leave them out.
        edge_index: optional ``(2, E)`` int64 candidate pairs (center, neighbor).
        edge_shift: optional ``(E, 3)`` int64 cell translations of the neighbor.
        edge_cutoff: optional ``(1,)`` float64 Å up to which the pairs are complete.
    """

    @classmethod
    def from_arrays(
        cls,
        atomic_numbers: ArrayLike,
        positions: ArrayLike,
        *,
        cell: ArrayLike | None = None,
        pbc: ArrayLike | bool = False,
        energy: float | None = None,
        forces: ArrayLike | None = None,
        stress: ArrayLike | None = None,
        charge: int = 0,
        spin_multiplicity: int = 1,
        fixed: ArrayLike | None = None,
        tags: ArrayLike | None = None,
        magnetic_moments: ArrayLike | None = None,
        structure_id: str = "",
        group: str = "",
        units: Units = _NO_UNITS,
    ) -> AtomicData:
        """Builds a validated structure; ``units`` converts lengths and labels, nothing is shared with the caller.

        Stress is ``(3, 3)``, ``(9,)`` or Voigt ``(6,)`` (xx, yy, zz, yz, xz, xy), and dropped without any periodic
        axis, where it has no meaning.

        Raises:
            DataError: a structure that no potential can mean (see :mod:`escaip.data.validation`), a label with a wrong
                shape, NaN or Inf.
        """
        name = structure_id or "structure"
        numbers = np.atleast_1d(np.array(atomic_numbers, dtype=np.int64))
        place = np.array(positions, dtype=np.float64) * units.length
        box = np.zeros((3, 3)) if cell is None else np.array(cell, dtype=np.float64) * units.length
        periodic = np.array(np.broadcast_to(np.asarray(pbc, dtype=bool), (3,)))
        check_structure(numbers, place, box, periodic, name)
        n = len(numbers)
        tension = _label(stress_matrix(stress, name), (3, 3), "stress", name, units.stress)
        if not periodic.any():
            tension = np.full((3, 3), np.nan)
        fields: dict[str, Any] = {
            "positions": torch.from_numpy(place),
            "atomic_numbers": torch.from_numpy(numbers),
            "cell": torch.from_numpy(box).reshape(1, 3, 3),
            "pbc": torch.from_numpy(periodic).reshape(1, 3),
            "charge": torch.tensor([integer(charge, "charge", name)]),
            "spin_multiplicity": torch.tensor([_multiplicity(spin_multiplicity, name)]),
            "energy": torch.from_numpy(_label(energy, (1,), "energy", name, units.energy)),
            "forces": torch.from_numpy(_label(forces, (n, 3), "forces", name, units.forces)),
            "stress": torch.from_numpy(tension).reshape(1, 3, 3),
            "fixed": torch.from_numpy(_per_atom(fixed, n, np.bool_, "fixed", name)),
            "tags": torch.from_numpy(_per_atom(tags, n, np.int64, "tags", name)),
            "dataset": torch.tensor([-1]),
            "structure_id": structure_id,
            "group": group,
            "num_nodes": n,
        }
        if magnetic_moments is not None:
            moments = _label(magnetic_moments, (n,), "magnetic moments", name, 1.0)
            fields["magnetic_moments"] = torch.from_numpy(moments)
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> AtomicData:
        """A structure of fields that were validated before, for example those of a store; nothing is copied."""
        data = cls()
        data._store._mapping.update(fields)
        return data

    @classmethod
    def from_ase(
        cls,
        atoms: Atoms,
        *,
        keys: LabelKeys | None = None,
        structure_id: str | None = None,
        group: str | None = None,
        units: Units = _NO_UNITS,
    ) -> AtomicData:
        """Reads an :class:`ase.Atoms`, which is not changed.

        Without ``keys`` labels come from an attached single-point calculator (forces without constraints), charge
        from ``info["charge"]`` and spin multiplicity from ``info["spin_multiplicity"]`` or ``info["spin"]``. A
        calculator that would have to compute is left alone.

        Raises:
            DataError: a named key that is absent (the labels found are listed) or an invalid structure.
        """
        from escaip.data.labels import structure_from_ase

        return structure_from_ase(cls, atoms, keys=keys, structure_id=structure_id, group=group, units=units)

    def to_ase(self) -> Atoms:
        """An :class:`ase.Atoms` with labels in a single-point calculator, constraints and tags; edges are dropped."""
        from escaip.data.labels import structure_to_ase

        return structure_to_ase(self)

    def has_label(self, name: str) -> bool:
        """Whether ``energy``, ``forces`` or ``stress`` is given."""
        return not bool(torch.isnan(getattr(self, name)).any())

    def _describe(self) -> str:
        return str(self.structure_id) or "structure"


def collate(structures: Sequence[AtomicData]) -> Batch:
    """A PyG ``Batch``: fields concatenated, ``batch (N,)``, ``ptr (B+1,)``, ``num_graphs``, lists of names.

    Equal to ``Batch.from_data_list`` (and undone by ``to_data_list``), without its cost per attribute. The
    structures are not changed.

    Raises:
        DataError: no structures, or edges attached to some of them only.
    """
    if len(structures) == 0:
        raise DataError("collate: no structures to batch")
    fields: dict[str, Any] = {key: torch.cat([data._store[key] for data in structures]) for key in TENSOR_FIELDS}
    fields.update({key: [data._store[key] for data in structures] for key in TEXT_FIELDS})
    batch = make_batch(fields, torch.tensor([data.num_nodes for data in structures]))
    _collate_edges(structures, batch)
    return batch


def make_batch(fields: dict[str, Any], counts: Tensor) -> Batch:
    """A PyG ``Batch`` of fields that are joined already: tensors of all structures, lists of their names.

    Args:
        fields: :data:`TENSOR_FIELDS` and :data:`TEXT_FIELDS`.
        counts: ``(B,)`` int64 atoms of each structure.
    """
    pointer = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    per_graph = torch.arange(len(counts) + 1)
    no_increment = torch.zeros(len(counts), dtype=torch.long)
    batch = Batch(_base_cls=AtomicData)
    store = batch._store
    store._mapping.update({key: fields[key] for key in (*TENSOR_FIELDS, *TEXT_FIELDS)})
    store["num_nodes"] = int(pointer[-1])
    store._num_nodes = counts.tolist()
    store["batch"] = torch.repeat_interleave(torch.arange(len(counts)), counts)
    store["ptr"] = pointer
    batch._num_graphs = len(counts)
    batch._slice_dict = {
        key: pointer if key in PER_ATOM_FIELDS else per_graph for key in (*TENSOR_FIELDS, *TEXT_FIELDS)
    }
    batch._inc_dict = {**dict.fromkeys(TENSOR_FIELDS, no_increment), **dict.fromkeys(TEXT_FIELDS)}
    return batch


def join_batches(batches: Sequence[Batch]) -> Batch:
    """One batch of several that carry no edges, in their order."""
    if len(batches) == 1:
        return batches[0]
    fields: dict[str, Any] = {key: torch.cat([batch._store[key] for batch in batches]) for key in TENSOR_FIELDS}
    fields.update({key: [name for batch in batches for name in batch._store[key]] for key in TEXT_FIELDS})
    return make_batch(fields, torch.cat([batch.ptr.diff() for batch in batches]))


def _collate_edges(structures: Sequence[AtomicData], batch: Batch) -> None:
    """Candidate pairs, when all structures carry them."""
    attached = ["edge_index" in data._store for data in structures]
    if not any(attached):
        return
    if not all(attached):
        lacking = structures[attached.index(False)]._describe()
        raise DataError(f"collate: {lacking} has no neighbor list but others in the batch do; attach it to all or none")
    store, starts = batch._store, batch.ptr[:-1]
    num_edges = torch.tensor([data.edge_index.shape[1] for data in structures])
    edge_pointer = torch.cat([num_edges.new_zeros(1), num_edges.cumsum(0)])
    store["edge_index"] = torch.cat([data.edge_index for data in structures], dim=1)
    store["edge_index"] += torch.repeat_interleave(starts, num_edges)
    store["edge_shift"] = torch.cat([data.edge_shift for data in structures])
    store["edge_cutoff"] = torch.cat([data.edge_cutoff for data in structures])
    zeros = torch.zeros_like(starts)
    batch._slice_dict.update(
        edge_index=edge_pointer, edge_shift=edge_pointer, edge_cutoff=torch.arange(len(structures) + 1)
    )
    batch._inc_dict.update(edge_index=starts, edge_shift=zeros, edge_cutoff=zeros)


def stress_matrix(stress: ArrayLike | None, name: str) -> NDArray[np.float64] | None:
    """``(3, 3)`` from ``(3, 3)``, ``(9,)`` or Voigt ``(6,)``; the antisymmetric rounding of a code is averaged out.

    Raises:
        DataError: another shape, or a tensor that is not symmetric to 1 %.
    """
    if stress is None:
        return None
    array = _numbers(stress, "stress", name)
    if array.shape == (6,):
        array = array[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
    if array.shape == (9,):
        array = array.reshape(3, 3)
    if array.shape != (3, 3):
        raise DataError(f"{name}: stress has shape {array.shape}; give (3, 3), (9,) or Voigt (6,)")
    if np.isfinite(array).all() and np.abs(array - array.T).max() > max(0.01 * np.abs(array).max(), 1e-5):
        raise DataError(f"{name}: stress is not symmetric; check its key and order of components")
    return 0.5 * (array + array.T)


def integer(value: Any, what: str, name: str) -> int:
    """``value`` as an integer.

    Raises:
        DataError: it is not one.
    """
    try:
        number = float(np.asarray(value).reshape(-1)[0]) if np.size(value) == 1 else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number) or abs(number - round(number)) > 1e-6:
        raise DataError(f"{name}: {what} is {value!r}, expected an integer")
    return round(number)


def _multiplicity(value: Any, name: str) -> int:
    multiplicity = integer(value, "spin multiplicity", name)
    if multiplicity < 1:
        raise DataError(
            f"{name}: spin multiplicity is {multiplicity}, which looks like a number of unpaired electrons; "
            "write that plus 1, or leave it aside with keys: {spin: ignore}"
        )
    return multiplicity


def _label(value: ArrayLike | None, shape: tuple[int, ...], what: str, name: str, factor: float) -> NDArray[np.float64]:
    if value is None:
        return np.full(shape, np.nan)
    array = _numbers(value, what, name)
    if shape == (1,) and array.size == 1:
        array = array.reshape(1)
    if array.shape != shape:
        raise DataError(f"{name}: {what} has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{name}: {what} holds NaN or Inf; repair the file or set on_error: skip")
    return array * factor


def _numbers(value: ArrayLike, what: str, name: str) -> NDArray[np.float64]:
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: {what} holds something else than numbers; check its key") from error


def _per_atom(value: ArrayLike | None, n: int, dtype: Any, what: str, name: str) -> NDArray[Any]:
    if value is None:
        return np.zeros(n, dtype=dtype)
    array = np.array(value, dtype=dtype)
    if array.shape != (n,):
        raise DataError(f"{name}: {what} has shape {array.shape}, expected ({n},)")
    return array
