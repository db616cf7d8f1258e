"""`AtomicData`, one structure with its labels, to and from ASE, and `collate`, which makes a batch of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch_geometric.data import Batch, Data

from escaip.data.validation import check_structure
from escaip.errors import ConfigError, DataError
from escaip.types import TARGETS, Target
from escaip.units import Units

if TYPE_CHECKING:
    from ase import Atoms

LABELS = ("energy", "forces", "stress")
"""Targets that every structure carries; further ones are in ``escaip.types.TARGETS``."""

INPUT_FIELDS = (
    "positions", "atomic_numbers", "cell", "pbc", "charge", "spin_multiplicity", "fixed", "tags", "dataset",
)  # fmt: skip
TENSOR_FIELDS = (*INPUT_FIELDS, *LABELS)
TEXT_FIELDS = ("structure_id", "group")
EDGE_FIELDS = ("edge_index", "edge_shift", "edge_cutoff")
PER_ATOM_FIELDS = ("positions", "atomic_numbers", "forces", "fixed", "tags")

IGNORE = "ignore"
"""The key of the spin multiplicity that leaves it at 1 whatever the file says."""

VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])
"""Rows and columns of the components xx, yy, zz, yz, xz, xy."""

_NO_UNITS = Units()


def is_per_atom(name: str) -> bool:
    """Whether a field or target has one row for each atom; the others have one for each structure."""
    return name in PER_ATOM_FIELDS or (name in TARGETS and TARGETS[name].per_atom)


def missing_label(target: Target, rows: int) -> Tensor:
    """Returns ``rows`` missing values of a target, ``(rows, *target.shape)`` float64 NaN."""
    return torch.full((rows, *target.shape), torch.nan, dtype=torch.float64)


@dataclass(frozen=True)
class LabelKeys:
    """Names under which a file keeps its labels, in ``atoms.info``, ``atoms.arrays`` or the attached calculator.

    A key that is named must be there, but see ``missing``. Unless energy, forces, stress or virial is named, all three
    labels are those that the attached calculator holds. Further targets are looked for under their own name where no
    key is given.

    Attributes:
        targets: key by name of a target of ``escaip.types.TARGETS``; a stress is ``(3, 3)``, ``(9,)`` or Voigt
            ``(6,)``, positive in tension.
        virial: ``(3, 3)``, ``(9,)`` or Voigt ``(6,)`` in energy units; ``stress = −virial / V``.
        charge: total charge; default ``charge`` where present.
        spin: spin multiplicity; default ``spin_multiplicity`` or ``spin`` where present; ``ignore`` leaves it 1.
        group: molecule or material, the unit of splits; default the chemical formula.
        structure_id: unique name; default file name and index.
        missing: called with the name of a target, and a message, where a structure has nothing under its key and the
            label is left out; by default an error. Readers of files count such structures.
    """

    targets: Mapping[str, str] = field(default_factory=dict)
    virial: str | None = None
    charge: str | None = None
    spin: str | None = None
    group: str | None = None
    structure_id: str | None = None
    missing: Callable[[str, str], object] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, spec: Mapping[str, str | None] | LabelKeys | None) -> LabelKeys | None:
        """Reads a flat mapping such as ``{"energy": "REF_energy", "charge": "q"}``; None stays None.

        Raises:
            ConfigError: an unknown name, or both ``stress`` and ``virial``.
        """
        if spec is None or isinstance(spec, LabelKeys):
            return spec
        own = [field.name for field in fields(cls) if field.name not in ("targets", "missing")]
        for key in spec:
            if key not in own and key not in TARGETS:
                raise ConfigError(f"keys: unknown label {key!r}; use one of {', '.join([*TARGETS, *own])}")
        given = {key: value for key, value in spec.items() if value is not None}
        if "stress" in given and "virial" in given:
            raise ConfigError("keys: name stress or virial, not both")
        targets = {key: given.pop(key) for key in TARGETS if key in given}
        return cls(targets, **given)  # type: ignore[arg-type]


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
        dataset: ``(1,)`` int64, index of the data set among those a potential is trained on; −1 unstated.
        structure_id: unique name, for messages.
        group: key of what must not be split (molecule, material).
        num_nodes: ``n``.
        edge_index: optional ``(2, E)`` int64 candidate pairs (center, neighbor).
        edge_shift: optional ``(E, 3)`` int64 cell translations of the neighbor.
        edge_cutoff: optional ``(1,)`` float64 Å up to which the pairs are complete.

    Every further target of ``escaip.types.TARGETS`` is an attribute too, ``(n, ...)`` or ``(1, ...)`` float64.
    """

    @classmethod
    def from_arrays(
        cls,
        atomic_numbers: ArrayLike,
        positions: ArrayLike,
        *,
        cell: ArrayLike | None = None,
        pbc: ArrayLike | bool = False,
        energy: ArrayLike | None = None,
        forces: ArrayLike | None = None,
        stress: ArrayLike | None = None,
        labels: Mapping[str, ArrayLike | None] | None = None,
        charge: int = 0,
        spin_multiplicity: int = 1,
        fixed: ArrayLike | None = None,
        tags: ArrayLike | None = None,
        structure_id: str = "",
        group: str = "",
        units: Units = _NO_UNITS,
    ) -> AtomicData:
        """Builds a validated structure that shares no memory with the caller.

        ``units`` converts lengths, energy, forces and stress; ``labels`` holds any targets by name, further ones in
        their own unit. A stress is ``(3, 3)``, ``(9,)`` or Voigt ``(6,)`` (xx, yy, zz, yz, xz, xy). Targets that need
        a cell are dropped without any periodic axis.

        Raises:
            DataError: an invalid structure (see ``escaip.data.validation``), a label with a wrong shape, NaN or Inf,
                a label that is no registered target.
        """
        name = structure_id or "structure"
        numbers = np.atleast_1d(np.array(atomic_numbers, dtype=np.int64))
        place = np.array(positions, dtype=np.float64) * units.length
        box = np.zeros((3, 3)) if cell is None else np.array(cell, dtype=np.float64) * units.length
        periodic = np.array(np.broadcast_to(np.asarray(pbc, dtype=bool), (3,)))
        check_structure(numbers, place, box, periodic, name)
        n = len(numbers)
        values = {"energy": energy, "forces": forces, "stress": stress, **(labels or {})}
        for label in values:
            if label not in TARGETS:
                raise DataError(f"{name}: label {label!r} is no target; register it (escaip.types.register_target)")
        values["stress"] = stress_matrix(values["stress"], name)
        factors = {"energy": units.energy, "forces": units.forces, "stress": units.stress}
        fields: dict[str, Any] = {
            "positions": torch.from_numpy(place),
            "atomic_numbers": torch.from_numpy(numbers),
            "cell": torch.from_numpy(box).reshape(1, 3, 3),
            "pbc": torch.from_numpy(periodic).reshape(1, 3),
            "charge": torch.tensor([integer(charge, "charge", name)]),
            "spin_multiplicity": torch.tensor([_multiplicity(spin_multiplicity, name)]),
        }
        for key, target in TARGETS.items():
            value = _label(values.get(key), target, n, name, factors.get(key, 1.0))
            if target.needs_cell and not periodic.any():
                value = np.full_like(value, np.nan)
            fields[key] = torch.from_numpy(value)
        fields |= {
            "fixed": torch.from_numpy(_per_atom(fixed, n, np.bool_, "fixed", name)),
            "tags": torch.from_numpy(_per_atom(tags, n, np.int64, "tags", name)),
            "dataset": torch.tensor([-1]),
            "structure_id": structure_id,
            "group": group,
            "num_nodes": n,
        }
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> AtomicData:
        """Wraps fields that were validated before, for example those of a store; nothing is copied."""
        data = cls()
        data._store._mapping.update(fields)
        return data

    @classmethod
    def from_ase(
        cls,
        atoms: Atoms,
        *,
        keys: LabelKeys | Mapping[str, str | None] | None = None,
        structure_id: str | None = None,
        group: str | None = None,
        units: Units = _NO_UNITS,
    ) -> AtomicData:
        """Reads an ``ase.Atoms``, which is not changed.

        Without ``keys`` labels come from an attached single-point calculator (forces without constraints), charge
        from ``info["charge"]`` and spin multiplicity from ``info["spin_multiplicity"]`` or ``info["spin"]``. A
        calculator that would have to compute is left alone.

        Raises:
            DataError: a named key that is absent (the labels found are listed) or an invalid structure.
            ConfigError: an unknown name in ``keys``.
        """
        keys = LabelKeys.parse(keys) or LabelKeys()
        results = _held_results(atoms)
        name = (
            structure_id
            or (_text(atoms, keys.structure_id, "structure_id") if keys.structure_id else "")
            or _formula(atoms)
        )
        find, places = partial(_find, atoms, results, name=name), (results, atoms.info, atoms.arrays)
        held = {target: next((one[target] for one in places if target in one), None) for target in TARGETS}
        held |= {label: results.get(label) for label in LABELS}  # these in a calculator alone
        labels = named_labels(keys, held, find, np.asarray(atoms.cell), units, name)
        charge = atoms.info.get("charge", 0) if keys.charge is None else find(keys.charge, "charge")
        spin: Any = atoms.info.get("spin_multiplicity", atoms.info.get("spin", 1))
        if keys.spin is not None:
            spin = 1 if keys.spin == IGNORE else find(keys.spin, "spin")
        if group is None:
            group = _text(atoms, keys.group, "group") if keys.group else _formula(atoms)
        return cls.from_arrays(
            atoms.numbers,
            atoms.positions,
            cell=np.asarray(atoms.cell),
            pbc=atoms.pbc,
            labels=labels,
            charge=charge,
            spin_multiplicity=spin,
            fixed=_fixed_atoms(atoms),
            tags=atoms.arrays.get("tags"),
            structure_id=name,
            group=group,
            units=units,
        )

    def to_ase(self) -> Atoms:
        """Returns an ``ase.Atoms`` with labels in a single-point calculator, constraints and tags, without edges.

        Targets that are no property of ASE go to ``info`` or ``arrays`` under their name.
        """
        from ase import Atoms
        from ase.calculators.calculator import all_properties
        from ase.calculators.singlepoint import SinglePointCalculator
        from ase.constraints import FixAtoms

        atoms = Atoms(
            numbers=self.atomic_numbers.numpy(),
            positions=self.positions.numpy(),
            cell=self.cell[0].numpy(),
            pbc=self.pbc[0].numpy(),
        )
        if bool(self.tags.any()):
            atoms.set_tags(self.tags.numpy())
        if bool(self.fixed.any()):
            atoms.set_constraint(FixAtoms(mask=self.fixed.numpy()))
        if int(self.charge) != 0:
            atoms.info["charge"] = int(self.charge)
        if int(self.spin_multiplicity) != 1:
            atoms.info["spin_multiplicity"] = int(self.spin_multiplicity)
        atoms.info["structure_id"] = self.structure_id
        atoms.info["group"] = self.group
        results: dict[str, Any] = {}
        for name, target in TARGETS.items():
            if not self.has_label(name):
                continue
            value: Any = self._store[name].numpy().copy()
            place = results if name in all_properties else atoms.arrays if target.per_atom else atoms.info
            if not target.per_atom:
                value = value[0] if target.shape else float(value[0])
            elif len(target.shape) > 1:
                value = value.reshape(len(value), -1)  # extxyz has no columns of matrices
            place[name] = value[VOIGT] if name == "stress" else value
        if results:
            atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms

    def has_label(self, name: str) -> bool:
        """Whether the target of this name is given."""
        return name in self._store and not bool(torch.isnan(self._store[name]).any())


def collate(structures: Sequence[AtomicData]) -> Batch:
    """Returns a PyG ``Batch``: fields concatenated, ``batch (N,)``, ``ptr (B+1,)``, ``num_graphs``, lists of names.

    Equal to ``Batch.from_data_list`` (and undone by ``to_data_list``), without its cost per attribute. The structures
    are not changed. A target that a structure lacks is NaN in its rows.

    Raises:
        DataError: no structures, or edges attached to some of them only.
    """
    if len(structures) == 0:
        raise DataError("collate: no structures to batch")
    fields: dict[str, Any] = {key: torch.cat([data._store[key] for data in structures]) for key in INPUT_FIELDS}
    for key, target in TARGETS.items():
        fields[key] = torch.cat([
            data._store[key] if key in data._store else missing_label(target, data.num_nodes if target.per_atom else 1)
            for data in structures
        ])  # fmt: skip
    fields.update({key: [data._store[key] for data in structures] for key in TEXT_FIELDS})
    batch = make_batch(fields, torch.tensor([data.num_nodes for data in structures]))
    _collate_edges(structures, batch)
    return batch


def make_batch(fields: Mapping[str, Any], counts: Tensor) -> Batch:
    """Returns a PyG ``Batch`` of fields that are joined already: tensors of all structures, lists of their names.

    Args:
        fields: ``INPUT_FIELDS``, ``TEXT_FIELDS`` and any targets; those that are not there are missing.
        counts: ``(B,)`` int64 atoms of each structure.
    """
    pointer = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    per_graph = torch.arange(len(counts) + 1)
    no_increment = torch.zeros(len(counts), dtype=torch.long)
    num_nodes = int(pointer[-1])
    tensors = {key: fields[key] for key in INPUT_FIELDS}
    for key, target in TARGETS.items():
        given = fields.get(key)
        tensors[key] = missing_label(target, num_nodes if target.per_atom else len(counts)) if given is None else given
    batch = Batch(_base_cls=AtomicData)
    store = batch._store
    store._mapping.update(tensors)
    store._mapping.update({key: fields[key] for key in TEXT_FIELDS})
    store["num_nodes"] = num_nodes
    store._num_nodes = counts.tolist()
    store["batch"] = torch.repeat_interleave(torch.arange(len(counts)), counts)
    store["ptr"] = pointer
    batch._num_graphs = len(counts)
    batch._slice_dict = {key: pointer if is_per_atom(key) else per_graph for key in (*tensors, *TEXT_FIELDS)}
    batch._inc_dict = {**dict.fromkeys(tensors, no_increment), **dict.fromkeys(TEXT_FIELDS)}
    return batch


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Joins batches that carry no edges, in their order."""
    if len(batches) == 1:
        return batches[0]
    fields: dict[str, Any] = {
        key: torch.cat([batch._store[key] for batch in batches])
        for key in (*INPUT_FIELDS, *TARGETS)
        if all(key in batch._store for batch in batches)
    }
    fields.update({key: [name for batch in batches for name in batch._store[key]] for key in TEXT_FIELDS})
    return make_batch(fields, torch.cat([batch.ptr.diff() for batch in batches]))


def _collate_edges(structures: Sequence[AtomicData], batch: Batch) -> None:
    """Joins candidate pairs when all structures carry them."""
    attached = ["edge_index" in data._store for data in structures]
    if not any(attached):
        return
    if not all(attached):
        lacking = str(structures[attached.index(False)].structure_id) or "structure"
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
    """Returns ``(3, 3)`` from ``(3, 3)``, ``(9,)`` or Voigt ``(6,)``, symmetrised: codes write rounded numbers."""
    if stress is None:
        return None
    array = floats(stress, "stress", name)
    if array.shape == (6,):
        array = array[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
    if array.shape == (9,):
        array = array.reshape(3, 3)
    if array.shape != (3, 3):
        raise DataError(f"{name}: stress has shape {array.shape}; give (3, 3), (9,) or Voigt (6,)")
    different = not (array == array.T).all()
    if different and np.isfinite(array).all() and np.abs(array - array.T).max() > max(0.01 * np.abs(array).max(), 1e-5):
        raise DataError(f"{name}: stress is not symmetric; check its key and order of components")
    return 0.5 * (array + array.T)


def stress_from_virial(virial: ArrayLike, cell: ArrayLike | None, units: Units, name: str) -> NDArray[np.float64]:
    """Returns ``−virial / V``, of the virial's shape; virial, ``cell (3, 3)`` and stress in the source's units."""
    volume = 0.0 if cell is None else abs(float(np.linalg.det(np.asarray(cell))))
    if volume == 0.0:
        raise DataError(f"{name}: has a virial but no cell volume; drop the virial key or give a cell")
    scale = units.energy / (volume * units.length**3) / units.stress
    return -floats(virial, "virial", name) * scale


def named_labels(
    keys: LabelKeys, held: Mapping[str, Any], find: Callable[[str, str], Any], cell: ArrayLike | None, units: Units,
    name: str,
) -> dict[str, Any]:  # fmt: skip
    """Returns labels by target in the source's units, None where they are not there.

    ``held`` is what the source holds under the names of targets, ``find(key, label)`` returns what stands under a key.
    """
    # Where energy, forces, stress or virial is named, the others of these are not read.
    unread = LABELS if keys.virial is not None or any(name in keys.targets for name in LABELS) else ()
    labels = {target: None if target in unread else held.get(target) for target in TARGETS}
    named = {target: keys.targets[target] for target in TARGETS if target in keys.targets}
    for target, key in {**named, **({"virial": keys.virial} if keys.virial is not None else {})}.items():
        try:
            value = find(key, target)
        except DataError as error:
            if keys.missing is None:
                raise
            keys.missing(target, str(error))
            value = None
        if target != "virial":
            labels[target] = value
        elif value is not None:
            labels["stress"] = stress_from_virial(value, cell, units, name)
    return labels


def integer(value: Any, what: str, name: str) -> int:
    """Returns ``value`` as an integer."""
    if type(value) is int:
        return value
    try:
        number = float(np.asarray(value).reshape(-1)[0]) if np.size(value) == 1 else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number) or abs(number - round(number)) > 1e-6:
        raise DataError(f"{name}: {what} is {value!r}, expected an integer")
    return round(number)


def hill_formula(numbers: ArrayLike) -> str:
    """Returns the chemical formula, carbon and hydrogen first where there is carbon, else alphabetical: ``C2H6O``."""
    from ase.data import chemical_symbols

    named = {
        chemical_symbols[z] if 0 <= z < len(chemical_symbols) else f"[{z}]": count
        for z, count in Counter(np.asarray(numbers, dtype=np.int64).tolist()).items()
    }
    first = [symbol for symbol in ("C", "H") if symbol in named] if "C" in named else []
    order = first + sorted(symbol for symbol in named if symbol not in first)
    return "".join(symbol + (str(named[symbol]) if named[symbol] > 1 else "") for symbol in order)


def labels_found(atoms: Atoms) -> str:
    """Returns the keys that a user can name, for messages."""
    arrays = [key for key in atoms.arrays if key not in ("numbers", "positions")]
    places = {"info": map(str, atoms.info), "arrays": arrays, "calculator": _held_results(atoms)}
    return "; ".join(f"{place}: {', '.join(sorted(names)) or 'none'}" for place, names in places.items())


def _held_results(atoms: Atoms) -> dict[str, Any]:
    """What an attached single-point calculator holds; nothing is ever computed."""
    from ase.calculators.singlepoint import SinglePointCalculator

    if not isinstance(atoms.calc, SinglePointCalculator):
        return {}
    return {key: value for key, value in atoms.calc.results.items() if value is not None}


def _find(atoms: Atoms, results: Mapping[str, Any], key: str, label: str, name: str) -> Any:
    for place in (atoms.info, atoms.arrays, results):
        if key in place:
            return place[key]
    raise DataError(f"{name}: no {label} under the key {key!r}; found {labels_found(atoms)}; name one of these in keys")


def _text(atoms: Atoms, key: str, label: str) -> str:
    return str(_find(atoms, {}, key, label, _formula(atoms)))


def _formula(atoms: Atoms) -> str:
    return hill_formula(atoms.numbers) if len(atoms) else "structure"


def _fixed_atoms(atoms: Atoms) -> NDArray[np.bool_]:
    """Atoms that a constraint holds in all three directions."""
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        kind = type(constraint).__name__
        if kind == "FixAtoms" or (kind in ("FixCartesian", "FixScaled") and bool(np.all(constraint.mask))):
            fixed[constraint.index] = True
    return fixed


def _multiplicity(value: Any, name: str) -> int:
    multiplicity = integer(value, "spin multiplicity", name)
    if multiplicity < 1:
        raise DataError(
            f"{name}: spin multiplicity is {multiplicity}, which looks like a number of unpaired electrons; "
            "write that plus 1, or leave it aside with keys: {spin: ignore}"
        )
    return multiplicity


def _label(value: ArrayLike | None, target: Target, n: int, name: str, factor: float) -> NDArray[np.float64]:
    """``(n, *shape)`` or ``(1, *shape)``, NaN where it is missing, converted by ``factor``; may be given flat."""
    shape = (n, *target.shape) if target.per_atom else target.shape
    if value is None:
        return np.full(shape if target.per_atom else (1, *shape), np.nan)
    array = floats(value, target.name, name)
    if array.shape != shape:
        flat = [(n, math.prod(target.shape))] if target.per_atom else [(math.prod(shape),), (1, *shape)]
        if array.shape in flat or (array.size == 1 and not shape):
            array = array.reshape(shape)
    if array.shape != shape:
        raise DataError(f"{name}: {target.name} has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{name}: {target.name} holds NaN or Inf; repair the file or set on_error: skip")
    array = array * factor
    return array if target.per_atom else array[None]


def floats(value: Any, what: str, name: str, shape: tuple[int, ...] | None = None) -> NDArray[np.float64]:
    """Returns a new float64 array, of this shape where one is given.

    Raises:
        DataError: anything else than numbers, or another shape.
    """
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: {what} holds something else than numbers; check its key") from error
    if shape is not None and array.shape != shape:
        raise DataError(f"{name}: {what} has shape {array.shape}, expected {shape}")
    return array


def integers(value: ArrayLike, what: str, name: str) -> NDArray[np.int64]:
    """Returns a new int64 array of whole numbers, which files often keep as floats.

    Raises:
        DataError: anything else.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "bi":
        return value.astype(np.int64)
    array = floats(value, what, name)
    if not np.isfinite(array).all() or (np.abs(array) > 2**53).any() or (array != np.rint(array)).any():
        raise DataError(f"{name}: {what} holds something else than whole numbers")
    return array.astype(np.int64)


def _per_atom(value: ArrayLike | None, n: int, dtype: type[np.generic], what: str, name: str) -> NDArray[Any]:
    if value is None:
        return np.zeros(n, dtype=dtype)
    array = np.array(value, dtype=dtype)
    if array.shape != (n,):
        raise DataError(f"{name}: {what} has shape {array.shape}, expected ({n},)")
    return array
