"""Prepared store: structures in memory-mapped shards with random access, without pickle.

A store is a folder of ``manifest.json`` (schema, counts, checksums, labels, splits, source), ``index.safetensors``
(``COLUMNS`` of every structure, names of groups, compositions) and shards in safetensors format. A shard holds its
structures' arrays end to end, with offsets; texts are UTF-8 bytes with offsets. Every target of
``escaip.types.TARGETS`` is stored; one that a shard does not hold reads as NaN.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from escaip.data.structure import AtomicData, is_per_atom, make_batch
from escaip.errors import ConfigError, DataError
from escaip.files import sha256
from escaip.types import TARGETS

if TYPE_CHECKING:
    from torch_geometric.data import Batch

Arrays = dict[str, NDArray[Any]]
Indices = NDArray[np.int64]

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
INDEX = "index.safetensors"
EDGE_CUTOFF = 6.0
"""Å within which the edges of a structure are counted, to balance batches by."""

COLUMNS: dict[str, str] = {
    "natoms": "<i4",
    "periodic": "?",
    "labels": "u1",
    "split": "u1",
    "group_codes": "<i4",
    "composition_codes": "<i4",
    "num_edges": "<i4",
    "energy": "<f8",
    "force_square_sum": "<f8",
    "force_count": "<i4",
    "max_force": "<f4",
    "content_hash": "<u8",
}
"""Per structure: atoms; any periodic axis; labels as bits, in the order of the manifest's ``labels``; position of its
part in the manifest's ``splits``; group; composition; directed pairs within ``EDGE_CUTOFF``; energy in eV (NaN
missing); sum of squared force components of free, labelled atoms in (eV/Å)², their number, and the largest force on one
of them in eV/Å; hash of elements, coordinates, cell, charge and spin."""

FIELDS = {
    "positions": ("<f8", "f8"),
    "atomic_numbers": ("u1", "i8"),
    "cell": ("<f8", "f8"),
    "pbc": ("?", "?"),
    "charge": ("<i4", "i8"),
    "spin_multiplicity": ("<i4", "i8"),
    "fixed": ("?", "?"),
    "tags": ("<i4", "i8"),
}
"""Stored dtype and dtype in memory of the fields besides targets."""


def is_store(path: Path) -> bool:
    """Whether a path is the folder of a prepared store."""
    return (path / MANIFEST).is_file()


def map_arrays(path: Path) -> Arrays:
    """Returns the arrays of a safetensors file as read-only views of one memory map.

    The map keeps no file descriptor: a store may have more shards than a process may have of those.

    Raises:
        DataError: a header that is damaged or does not fit the file.
    """
    try:
        arrays: Arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: damaged shard ({error}); prepare the store again") from error
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def read_text(arrays: Arrays, kind: str, index: int) -> str:
    """Returns one of the texts of ``pack_text``."""
    start, stop = arrays[f"{kind}_offsets"][index : index + 2].tolist()
    return arrays[f"{kind}_bytes"][start:stop].tobytes().decode("utf-8")


def group_names(index: Arrays) -> list[str]:
    """Returns the names of the groups of an index."""
    return [read_text(index, "group", code) for code in range(len(index["group_offsets"]) - 1)]


def composition_key(numbers: NDArray[Any]) -> bytes:
    """Returns elements and how many of each, as bytes that are equal for equal compositions."""
    counts = np.bincount(numbers)
    elements = np.flatnonzero(counts)
    return np.stack([elements, counts[elements]], axis=1).astype("<i4").tobytes()


def compositions(index: Arrays) -> list[bytes]:
    """Returns the ``composition_key`` of every composition of an index."""
    table = np.stack([index["composition_elements"], index["composition_counts"]], axis=1).astype("<i4")
    bounds = index["composition_offsets"].tolist()
    return [table[start:stop].tobytes() for start, stop in pairwise(bounds)]


def label_counts(labels: NDArray[Any], names: Sequence[str]) -> dict[str, int]:
    """Returns how many structures carry each label, from the index's bits."""
    return {name: int(np.count_nonzero(labels & (1 << bit))) for bit, name in enumerate(names)}


class Store:
    """Random access to a prepared store.

    Opening reads the manifest and checks that every file is there with its size. Shards are mapped when first used, in
    each process for itself, so that a store can be pickled and used under fork, spawn and forkserver alike.

    Attributes:
        path: the folder.
        manifest: contents of ``manifest.json``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a store.

        Raises:
            DataError: no store there, a schema this version cannot read, a file missing or truncated.
        """
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.path) if entry.is_file()}
        for entry in self._entries:
            size = sizes.get(entry["file"], -1)
            if size != entry["bytes"]:
                state = "is missing" if size < 0 else f"has {size} bytes instead of {entry['bytes']} (truncated?)"
                raise DataError(f"{self.path / entry['file']}: {state}; prepare the store again or restore this file")
        self._starts = np.cumsum([0] + [entry["num_structures"] for entry in self.manifest["shards"]])
        self._shards: dict[int, Arrays] = {}
        self._index: Arrays | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_index": None}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> AtomicData:
        """Returns the structure at ``index``, its tensors copied out of the file.

        Raises:
            IndexError: outside the store.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: index {index} outside 0..{len(self) - 1}")
        fields, (count,) = self._joined([index % len(self)])
        ids, groups = fields.pop("structure_id"), fields.pop("group")
        return AtomicData.from_fields({**fields, "structure_id": ids[0], "group": groups[0], "num_nodes": count})

    def __iter__(self) -> Iterator[AtomicData]:
        return (self[index] for index in range(len(self)))

    def batch(self, positions: Sequence[int] | Indices) -> Batch:
        """Returns what ``escaip.data.collate`` makes of structures, joined from the shards without making them.

        Args:
            positions: ``(B,)`` of the structures, each inside the store.
        """
        fields, counts = self._joined(positions)
        return make_batch(fields, torch.tensor(counts))

    def _joined(self, positions: Sequence[int] | Indices) -> tuple[dict[str, Any], list[int]]:
        """Returns the fields of structures end to end, their names, and how many atoms each has."""
        located = self._locate(positions)
        own = [(arrays, slice(local, local + 1)) for arrays, local in located]
        of_atoms = [(arrays, slice(*arrays["offsets"][local : local + 2].tolist())) for arrays, local in located]
        fields: dict[str, Any] = {}
        for key, per_atom, dtype in _table(tuple(TARGETS)):
            pieces = [_values(arrays, key, rows) for arrays, rows in (of_atoms if per_atom else own)]
            fields[key] = torch.from_numpy(np.concatenate(pieces).astype(dtype, copy=False))
        fields["dataset"] = torch.full((len(located),), -1)
        fields["structure_id"] = [read_text(arrays, "id", local) for arrays, local in located]
        codes = self.index["group_codes"][np.asarray(positions, dtype=np.int64)].tolist()
        names = {code: read_text(self.index, "group", code) for code in set(codes)}
        fields["group"] = [names[code] for code in codes]
        return fields, [atoms.stop - atoms.start for _, atoms in of_atoms]

    def structure_id(self, index: int) -> str:
        """Returns the name of one structure."""
        ((arrays, local),) = self._locate([index])
        return read_text(arrays, "id", local)

    @property
    def index(self) -> Arrays:
        """``COLUMNS`` of every structure, read-only and mapped, names of groups, and compositions."""
        if self._index is None:
            self._index = map_arrays(self.path / self.manifest["index"]["file"])
        return self._index

    @property
    def natoms(self) -> NDArray[np.int32]:
        """``(num_structures,)`` atoms of each structure, read-only, without touching structures."""
        return self.index["natoms"]

    def charges(self) -> NDArray[np.int32]:
        """Returns the total charge of each structure, ``(num_structures,)`` in e."""
        return np.concatenate([self._map(shard)["charge"] for shard in range(len(self.manifest["shards"]))])

    @property
    def groups(self) -> list[str]:
        """Names of the groups; the index's ``group_codes`` are positions in them."""
        return group_names(self.index)

    @property
    def labels(self) -> list[str]:
        """Names of the labels, in the order of the bits of the index's ``labels``."""
        return list(self.manifest["labels"])

    @property
    def splits(self) -> list[str]:
        """Names of the parts the store was divided into; ``["all"]`` when it was not."""
        return list(self.manifest["splits"])

    def split_indices(self, name: str) -> Indices:
        """Returns the ascending positions of the structures of one split.

        Raises:
            ConfigError: the store has no such split.
        """
        if name not in self.splits:
            raise ConfigError(f"{self.path}: has no split {name!r}; it has {', '.join(self.splits)}")
        return np.flatnonzero(self.index["split"] == self.splits.index(name))

    @property
    def fingerprint(self) -> str:
        """Hash of the contents, from the checksums of the shards."""
        text = "".join(entry["sha256"] for entry in self.manifest["shards"])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(int(entry["bytes"]) for entry in self._entries)

    def verify(self) -> None:
        """Reads everything and compares checksums.

        Raises:
            DataError: naming the first damaged file.
        """
        for entry in self._entries:
            if sha256(self.path / entry["file"]) != entry["sha256"]:
                raise DataError(f"{self.path / entry['file']}: checksum differs, the file is damaged; prepare it again")

    @property
    def _entries(self) -> list[dict[str, Any]]:
        return [*self.manifest["shards"], self.manifest["index"]]

    def _locate(self, indices: Sequence[int] | Indices) -> list[tuple[Arrays, int]]:
        """Returns the mapped shard of each structure and its position there."""
        positions = np.asarray(indices, dtype=np.int64)
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        local = positions - self._starts[shards]
        return [(self._map(shard), k) for shard, k in zip(shards.tolist(), local.tolist(), strict=True)]

    def _map(self, shard: int) -> Arrays:
        arrays = self._shards.get(shard)
        if arrays is None:
            arrays = self._shards[shard] = map_arrays(self.path / self.manifest["shards"][shard]["file"])
        return arrays


@cache
def _table(targets: tuple[str, ...]) -> list[tuple[str, bool, np.dtype[Any]]]:
    """Returns the name of each field and target, whether it has a row for each atom, and its dtype in memory."""
    dtypes = {**{key: dtype for key, (_, dtype) in FIELDS.items()}, **dict.fromkeys(targets, "f8")}
    return [(key, is_per_atom(key), np.dtype(dtype)) for key, dtype in dtypes.items()]


def _values(arrays: Arrays, key: str, rows: slice) -> NDArray[Any]:
    """Returns rows of a field; NaN for a target that the shard does not hold."""
    return arrays[key][rows] if key in arrays else np.full((rows.stop - rows.start, *TARGETS[key].shape), np.nan)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise DataError(f"{path}: is no prepared store (no {MANIFEST}); make one with escaip data convert SRC {path}")
    try:
        manifest = dict(json.loads(file.read_text(encoding="utf-8")))
        version = int(manifest["schema_version"])
        [(entry["file"], entry["bytes"], entry["num_structures"], entry["sha256"]) for entry in manifest["shards"]]
        [manifest["index"][key] for key in ("file", "bytes", "sha256")]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: damaged manifest ({error!r}); prepare the store again") from error
    if version != SCHEMA_VERSION:
        age, remedy = ("newer", "update escaip") if version > SCHEMA_VERSION else ("older", "prepare the store again")
        raise DataError(f"{file}: schema {version} is {age} than this version reads ({SCHEMA_VERSION}); {remedy}")
    return manifest
