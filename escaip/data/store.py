"""Prepared store: structures in memory-mapped shards, random access, no pickle.

A store is a directory: ``manifest.json`` (schema, counts, checksums, labels, splits, source), ``index.safetensors``
(:data:`escaip.data.store_index.COLUMNS` of every structure, names of groups, compositions) and shards in safetensors
format. A shard holds its structures' arrays end to end, with offsets; names are UTF-8 bytes with offsets. See
:mod:`escaip.data.store_writer` for how it is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from escaip.data.shards import MOMENTS, STORED_FIELDS, Arrays, map_safetensors, read_text
from escaip.data.store_writer import MANIFEST, SCHEMA_VERSION, StoreWriter
from escaip.data.structure import PER_ATOM_FIELDS, AtomicData
from escaip.errors import ConfigError, DataError

__all__ = ["Store", "StoreWriter"]

TARGET_DTYPES = {
    "positions": np.dtype("f8"),
    "atomic_numbers": np.dtype("i8"),
    "cell": np.dtype("f8"),
    "pbc": np.dtype("?"),
    "charge": np.dtype("i8"),
    "spin_multiplicity": np.dtype("i8"),
    "energy": np.dtype("f8"),
    "forces": np.dtype("f8"),
    "stress": np.dtype("f8"),
    "fixed": np.dtype("?"),
    "tags": np.dtype("i8"),
}
_PER_ATOM = frozenset(PER_ATOM_FIELDS)


class Store:
    """Random access to a prepared store.

    Opening reads the manifest and checks that every file is there with its size; shards are mapped when first used,
    in each process for itself, so that a store can be pickled and used under fork, spawn and forkserver alike.

    Attributes:
        path: the directory.
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
        for entry in [*self.manifest["shards"], self.manifest["index"]]:
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
        """The structure at ``index``, its tensors copied out of the file."""
        arrays, local = self.locate(index)
        start, stop = arrays["offsets"][local : local + 2].tolist()
        fields: dict[str, Any] = {}
        for key in STORED_FIELDS:
            piece = arrays[key][start:stop] if key in _PER_ATOM else arrays[key][local : local + 1]
            fields[key] = torch.from_numpy(piece.astype(TARGET_DTYPES[key]))
        if MOMENTS in arrays and not np.isnan(arrays[MOMENTS][start:stop]).any():
            fields[MOMENTS] = torch.from_numpy(arrays[MOMENTS][start:stop].astype("f8"))
        fields["dataset"] = torch.tensor([-1])
        fields["structure_id"] = read_text(arrays, "id", local)
        fields["group"] = self.group(index)
        fields["num_nodes"] = stop - start
        return AtomicData.from_fields(fields)

    def __iter__(self) -> Iterator[AtomicData]:
        return (self[index] for index in range(len(self)))

    def get_arrays(self, index: int) -> Arrays:
        """The structure's arrays as read-only views of the file, in the stored precision, without names.

        Shapes are those of :class:`AtomicData`.
        """
        arrays, local = self.locate(index)
        start, stop = arrays["offsets"][local : local + 2].tolist()
        return {
            key: arrays[key][start:stop] if key in _PER_ATOM else arrays[key][local : local + 1]
            for key in STORED_FIELDS
        }

    def structure_id(self, index: int) -> str:
        """Name of one structure."""
        arrays, local = self.locate(index)
        return read_text(arrays, "id", local)

    def group(self, index: int) -> str:
        """Group of one structure."""
        return read_text(self.index, "group", int(self.index["group_codes"][index]))

    @property
    def index(self) -> Arrays:
        """:data:`~escaip.data.store_index.COLUMNS` of every structure, read-only and mapped, and their tables."""
        if self._index is None:
            self._index = map_safetensors(self.path / self.manifest["index"]["file"])
        return self._index

    @property
    def natoms(self) -> NDArray[np.int32]:
        """``(num_structures,)`` atoms of each structure, read-only, without touching structures."""
        return self.index["natoms"]

    @property
    def periodic(self) -> NDArray[np.bool_]:
        """``(num_structures,)`` whether any axis is periodic."""
        return self.index["periodic"]

    @property
    def group_codes(self) -> NDArray[np.int32]:
        """``(num_structures,)`` position of each structure's group in :attr:`groups`."""
        return self.index["group_codes"]

    @property
    def groups(self) -> list[str]:
        """Names of the groups."""
        index = self.index
        return [read_text(index, "group", k) for k in range(len(index["group_offsets"]) - 1)]

    @property
    def splits(self) -> list[str]:
        """Names of the parts the store was divided into; ``["all"]`` when it was not."""
        return list(self.manifest["splits"])

    def split_indices(self, name: str) -> NDArray[np.int64]:
        """Ascending positions of the structures of one split.

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
        return int(sum(entry["bytes"] for entry in [*self.manifest["shards"], self.manifest["index"]]))

    def verify(self) -> None:
        """Reads everything and compares checksums.

        Raises:
            DataError: naming the first damaged file.
        """
        for entry in [*self.manifest["shards"], self.manifest["index"]]:
            digest = hashlib.sha256()
            with open(self.path / entry["file"], "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            if digest.hexdigest() != entry["sha256"]:
                raise DataError(f"{self.path / entry['file']}: checksum differs, the file is damaged; prepare it again")

    def locate(self, index: int) -> tuple[Arrays, int]:
        """The mapped shard of a structure, and its position there.

        Raises:
            IndexError: outside the store.
        """
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: index {index} outside 0..{len(self) - 1}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._map(shard), index - int(self._starts[shard])

    def locate_many(self, indices: Sequence[int] | NDArray[np.int64]) -> list[tuple[Arrays, int]]:
        """:meth:`locate` of structures inside the store, all at once."""
        positions = np.asarray(indices, dtype=np.int64)
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        local = positions - self._starts[shards]
        return [(self._map(shard), k) for shard, k in zip(shards.tolist(), local.tolist(), strict=True)]

    def _map(self, shard: int) -> Arrays:
        arrays = self._shards.get(shard)
        if arrays is None:
            arrays = self._shards[shard] = map_safetensors(self.path / self.manifest["shards"][shard]["file"])
        return arrays


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise DataError(f"{path}: is no prepared store (no {MANIFEST}); make one with escaip data convert SRC {path}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = int(manifest["schema_version"])
        shards, index = manifest["shards"], manifest["index"]
        [(entry["file"], entry["bytes"], entry["num_structures"], entry["sha256"]) for entry in shards]
        (index["file"], index["bytes"], index["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: damaged manifest ({error!r}); prepare the store again") from error
    if version > SCHEMA_VERSION:
        raise DataError(f"{file}: schema {version} is newer than this version reads ({SCHEMA_VERSION}); update escaip")
    if version < SCHEMA_VERSION:
        raise DataError(f"{file}: schema {version} is older than this version reads; prepare the store again")
    return dict(manifest)
