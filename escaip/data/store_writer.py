"""Writing a prepared store: everything goes to a directory aside, which takes its name at the end."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from escaip.data.atomic_data import LABELS, TENSOR_FIELDS, AtomicData
from escaip.errors import ConfigError, DataError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.safetensors"
DEFAULT_SHARD_ATOMS = 1_000_000
_DTYPES = {
    "positions": "<f8",
    "atomic_numbers": "u1",
    "cell": "<f8",
    "pbc": "?",
    "charge": "<i4",
    "spin_multiplicity": "<i4",
    "energy": "<f8",
    "fixed": "?",
    "tags": "<i4",
}


class StoreWriter:
    """Writes structures one by one, shard by shard, with memory bounded by one shard.

    Use as a context manager. On leaving it normally the store appears under its name, whole; after an exception
    nothing is left. A process that is killed leaves only a hidden ``.NAME.partial-PID`` directory beside it.

    Attributes:
        path: where the store will be.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        source: str = "",
        dtype: str = "float64",
        shard_atoms: int = DEFAULT_SHARD_ATOMS,
        overwrite: bool = False,
    ) -> None:
        """Prepares to write.

        Args:
            path: directory to create.
            source: what the structures are, kept in the manifest.
            dtype: ``float64`` or ``float32``, of forces and stress; positions and energies are always float64.
            shard_atoms: a shard is closed when it holds this many atoms.
            overwrite: replace a store that is already there.

        Raises:
            ConfigError: an unknown dtype.
            DataError: something is there already, and is not to be overwritten or is no store.
        """
        if dtype not in ("float64", "float32"):
            raise ConfigError(f"dtype: {dtype!r} is not float64 or float32")
        self.path = Path(path)
        if self.path.exists():
            if not overwrite:
                raise DataError(f"{self.path}: exists already; choose another name or allow overwriting")
            if not (self.path / MANIFEST).is_file():
                raise DataError(f"{self.path}: exists and is no prepared store, it is not overwritten")
        self._dtypes = {**_DTYPES, "forces": "<f8" if dtype == "float64" else "<f4"}
        self._dtypes["stress"] = self._dtypes["forces"]
        self._source, self._dtype, self._shard_atoms = source, dtype, shard_atoms
        self._partial = self.path.parent / f".{self.path.name}.partial-{os.getpid()}"
        self._pending: list[AtomicData] = []
        self._pending_atoms = 0
        self._shards: list[dict[str, Any]] = []
        self._natoms, self._group_codes, self._periodic = array("i"), array("i"), bytearray()
        self._groups: dict[str, int] = {}
        self._elements: set[int] = set()
        self._labels = dict.fromkeys(LABELS, 0)

    def __enter__(self) -> StoreWriter:
        with _disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _disk_errors(self.path):
                    self._finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._natoms)

    def write(self, data: AtomicData) -> None:
        """Adds one structure.

        Raises:
            DataError: the disk is full, or files cannot be written.
        """
        self._pending.append(data)
        n = int(data.num_nodes)
        self._pending_atoms += n
        self._natoms.append(n)
        self._periodic.append(bool(data.pbc.any()))
        self._group_codes.append(self._groups.setdefault(data.group, len(self._groups)))
        self._elements.update(np.unique(data.atomic_numbers.numpy()).tolist())
        for label in LABELS:
            self._labels[label] += data.has_label(label)
        if self._pending_atoms >= self._shard_atoms:
            with _disk_errors(self.path):
                self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        arrays: dict[str, np.ndarray] = {}
        counts = [data.num_nodes for data in self._pending]
        arrays["offsets"] = np.concatenate([[0], np.cumsum(counts)]).astype("<i8")
        for key in TENSOR_FIELDS:
            pieces = [data[key].numpy() for data in self._pending]
            arrays[key] = np.ascontiguousarray(np.concatenate(pieces)).astype(self._dtypes[key])
        for kind, field in (("id", "structure_id"), ("group", "group")):
            arrays[f"{kind}_bytes"], arrays[f"{kind}_offsets"] = _pack_text([data[field] for data in self._pending])
        entry = self._save(f"shard-{len(self._shards):05d}.safetensors", arrays)
        self._shards.append({**entry, "num_structures": len(counts), "num_atoms": int(sum(counts))})
        self._pending, self._pending_atoms = [], 0

    def _finish(self) -> None:
        if not self._natoms:
            raise DataError(f"{self.path}: 0 structures to write; check the source, its filters and on_error")
        self._flush()
        names, offsets = _pack_text(list(self._groups))
        index = self._save(
            INDEX,
            {
                "natoms": np.array(self._natoms, dtype="<i4"),
                "group_codes": np.array(self._group_codes, dtype="<i4"),
                "periodic": np.frombuffer(bytes(self._periodic), dtype="?"),
                "group_bytes": names,
                "group_offsets": offsets,
            },
        )
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "num_structures": len(self._natoms),
            "num_atoms": int(sum(self._natoms)),
            "num_groups": len(self._groups),
            "elements": sorted(self._elements),
            "labels": self._labels,
            "dtype": self._dtype,
            "units": {"length": "angstrom", "energy": "eV", "forces": "eV/angstrom", "stress": "eV/angstrom^3"},
            "source": self._source,
            "shards": self._shards,
            "index": index,
        }
        self._write_file(MANIFEST, json.dumps(manifest, indent=1).encode())
        if self.path.exists():
            old = self.path.parent / f".{self.path.name}.old-{os.getpid()}"
            os.replace(self.path, old)
            os.replace(self._partial, self.path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(self._partial, self.path)

    def _save(self, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        from safetensors.numpy import save

        content = save(arrays)
        self._write_file(name, content)
        return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def _write_file(self, name: str, content: bytes) -> None:
        with open(self._partial / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


class _disk_errors:
    """Turns an OSError into one line that names the path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(value, OSError):
            if value.errno == errno.ENOSPC:
                raise DataError(
                    f"{self.path}: the disk is full, nothing was kept; free space or write elsewhere"
                ) from value
            raise DataError(f"{self.path}: cannot be written ({value.strerror or value})") from value


def _pack_text(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 bytes end to end, and where each begins."""
    encoded = [text.encode("utf-8") for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(item) for item in encoded])]).astype("<i8")
    return np.frombuffer(b"".join(encoded), dtype="u1"), offsets
