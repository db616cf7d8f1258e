"""Prepared store: structures in memory-mapped shards, random access, no pickle.

A store is a directory: ``manifest.json`` (schema, counts, checksums, labels, source), ``index.safetensors`` (atoms and
group of every structure) and shards in safetensors format. A shard holds its structures' arrays end to end, with
offsets; names are UTF-8 bytes with offsets. See :mod:`escaip.data.store_writer` for how it is written.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from escaip.data.atomic_data import PER_ATOM_FIELDS, TENSOR_FIELDS, AtomicData
from escaip.data.store_writer import MANIFEST, SCHEMA_VERSION, StoreWriter
from escaip.errors import DataError

__all__ = ["Store", "StoreWriter"]

_SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_TARGET_DTYPES = {
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
_MAX_HEADER = 1 << 20

Arrays = dict[str, NDArray[Any]]


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
        files = [*self.manifest["shards"], self.manifest["index"]]
        for entry in files:
            file = self.path / entry["file"]
            size = file.stat().st_size if file.is_file() else -1
            if size != entry["bytes"]:
                state = "is missing" if size < 0 else f"has {size} bytes instead of {entry['bytes']} (truncated?)"
                raise DataError(f"{file}: {state}; prepare the store again or restore this file")
        self._starts = np.cumsum([0] + [entry["num_structures"] for entry in self.manifest["shards"]]).tolist()
        self._shards: dict[int, Arrays] = {}
        self._index: Arrays | None = None
        self._groups: list[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_index": None, "_groups": None}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> AtomicData:
        """The structure at ``index``, its tensors copied out of the file."""
        arrays, local = self._locate(index)
        start, stop = arrays["offsets"][local : local + 2].tolist()
        fields: dict[str, Any] = {}
        for key in TENSOR_FIELDS:
            piece = arrays[key][start:stop] if key in _PER_ATOM else arrays[key][local : local + 1]
            fields[key] = torch.from_numpy(piece.astype(_TARGET_DTYPES[key]))
        fields["structure_id"] = _name(arrays, "id", local)
        fields["group"] = _name(arrays, "group", local)
        fields["num_nodes"] = stop - start
        return AtomicData.from_fields(fields)

    def __iter__(self) -> Iterator[AtomicData]:
        return (self[index] for index in range(len(self)))

    def get_arrays(self, index: int) -> Arrays:
        """The structure's arrays as read-only views of the file, in the stored precision, without names.

        Shapes are those of :class:`AtomicData`.
        """
        arrays, local = self._locate(index)
        start, stop = arrays["offsets"][local : local + 2].tolist()
        return {
            key: arrays[key][start:stop] if key in _PER_ATOM else arrays[key][local : local + 1]
            for key in TENSOR_FIELDS
        }

    def structure_id(self, index: int) -> str:
        """Name of one structure."""
        arrays, local = self._locate(index)
        return _name(arrays, "id", local)

    @property
    def natoms(self) -> NDArray[np.int32]:
        """``(num_structures,)`` atoms of each structure, read-only, without touching structures."""
        return self._load_index()["natoms"]

    @property
    def periodic(self) -> NDArray[np.bool_]:
        """``(num_structures,)`` whether any axis is periodic."""
        return self._load_index()["periodic"]

    @property
    def group_codes(self) -> NDArray[np.int32]:
        """``(num_structures,)`` position of each structure's group in :attr:`groups`."""
        return self._load_index()["group_codes"]

    @property
    def groups(self) -> list[str]:
        """Names of the groups."""
        if self._groups is None:
            index = self._load_index()
            self._groups = [_name(index, "group", k) for k in range(len(index["group_offsets"]) - 1)]
        return self._groups

    @property
    def fingerprint(self) -> str:
        """Hash of the contents, from the checksums of the shards."""
        text = "".join(entry["sha256"] for entry in self.manifest["shards"])
        return hashlib.sha256(text.encode()).hexdigest()

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

    def _load_index(self) -> Arrays:
        if self._index is None:
            self._index = map_safetensors(self.path / self.manifest["index"]["file"])
        return self._index

    def _locate(self, index: int) -> tuple[Arrays, int]:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: index {index} outside 0..{len(self) - 1}")
        shard = bisect.bisect_right(self._starts, index) - 1
        arrays = self._shards.get(shard)
        if arrays is None:
            arrays = self._shards[shard] = map_safetensors(self.path / self.manifest["shards"][shard]["file"])
        return arrays, index - self._starts[shard]


def map_safetensors(path: Path) -> Arrays:
    """The arrays of a safetensors file, as read-only views of one memory map.

    Raises:
        DataError: a header that is damaged or points outside the file.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        if not 2 <= length <= min(len(data) - 8, _MAX_HEADER):
            raise ValueError("impossible header length")
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        body = np.asarray(data[8 + length :])
        arrays: Arrays = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop <= len(body):
                raise ValueError(f"array {name!r} lies outside the file")
            dtype: np.dtype[Any] = _SAFETENSORS_DTYPES[entry["dtype"]]
            arrays[name] = body[start:stop].view(dtype).reshape(entry["shape"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged shard ({error}); prepare the store again") from error
    return arrays


def _name(arrays: Arrays, kind: str, index: int) -> str:
    start, stop = arrays[f"{kind}_offsets"][index : index + 2].tolist()
    return arrays[f"{kind}_bytes"][start:stop].tobytes().decode("utf-8")


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
    return dict(manifest)
