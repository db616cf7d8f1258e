"""Writing a prepared store: everything goes to a directory aside, which takes its name at the end."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.shards import (
    PRECISIONS,
    Arrays,
    disk_errors,
    map_safetensors,
    pack_structures,
    save_arrays,
    write_bytes,
)
from escaip.data.store_index import EDGE_CUTOFF, IndexBuilder, label_counts, merge_indices
from escaip.data.structure import AtomicData
from escaip.errors import ConfigError, DataError

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
INDEX = "index.safetensors"
PART = "part.json"
DEFAULT_SHARD_ATOMS = 1_000_000

SplitCodes = Callable[[Arrays], tuple[list[str], NDArray[np.uint8]]]
"""Names of the splits and the code of each structure, from an index."""


class PartWriter:
    """Writes structures into shards of a folder, with memory bounded by one shard and the index of the part.

    A part is whole once :meth:`close` has written its ``part.json``.
    """

    def __init__(self, folder: Path, *, dtype: str = "float64", shard_atoms: int = DEFAULT_SHARD_ATOMS) -> None:
        """Prepares to write into ``folder``, which exists.

        Raises:
            ConfigError: an unknown dtype.
        """
        if dtype not in PRECISIONS:
            raise ConfigError(f"dtype: {dtype!r} is not {' or '.join(PRECISIONS)}")
        self._folder, self._dtype, self._shard_atoms = folder, dtype, shard_atoms
        self._pending: list[AtomicData] = []
        self._pending_atoms = 0
        self._index = IndexBuilder()
        self._shards: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._index) + len(self._pending)

    def write(self, data: AtomicData) -> None:
        """Adds one structure; a full shard goes to disk."""
        self._pending.append(data)
        self._pending_atoms += int(data.num_nodes)
        if self._pending_atoms >= self._shard_atoms:
            self._flush()

    def close(self, **facts: Any) -> None:
        """Writes what is left, the index, and ``part.json`` with these ``facts`` beside the shards."""
        self._flush()
        if self._shards:
            save_arrays(self._folder / INDEX, self._index.arrays())
        write_bytes(self._folder / PART, json.dumps({"shards": self._shards, **facts}).encode())

    def _flush(self) -> None:
        if not self._pending:
            return
        entry = save_arrays(
            self._folder / f"shard-{len(self._shards):05d}.safetensors", pack_structures(self._pending, self._dtype)
        )
        self._shards.append({**entry, "num_structures": len(self._pending), "num_atoms": self._pending_atoms})
        self._index.add(self._pending)
        self._pending, self._pending_atoms = [], 0


def read_part(folder: Path) -> dict[str, Any] | None:
    """Contents of ``part.json``; None for a part that is not whole."""
    file = folder / PART
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def assemble(
    parts: Sequence[Path], target: Path, *, dtype: str, source: str, split: SplitCodes | None = None, **facts: Any
) -> dict[str, Any]:
    """Links the shards of parts into one folder and writes the index and, last of all, the manifest.

    The parts stay as they are, so that it can be interrupted at any point and run again.

    Args:
        parts: folders of whole parts, in order.
        target: folder of the store, made where it does not exist.
        dtype: of forces and stress.
        source: what the structures are.
        split: divides them; by default the codes that the parts hold, under the single name ``all``.
        **facts: further entries of the manifest, plain JSON values.

    Returns:
        The manifest.

    Raises:
        DataError: no structures.
    """
    target.mkdir(exist_ok=True)
    contents = [(folder, read_part(folder) or {"shards": []}) for folder in parts]
    filled = [(folder, part) for folder, part in contents if part["shards"]]
    if not filled:
        raise DataError(f"{source}: 0 structures to write; check the source, its filters and on_error")
    columns = dict(merge_indices([folder / INDEX for folder, _ in filled]))
    names = ["all"]
    if split is not None:
        save_arrays(target / INDEX, columns)
        names, columns["split"] = split(map_safetensors(target / INDEX))
    index = save_arrays(target / INDEX, columns)
    shards: list[dict[str, Any]] = []
    for folder, part in filled:
        for entry in part["shards"]:
            name = f"shard-{len(shards):05d}.safetensors"
            _link(folder / entry["file"], target / name)
            shards.append({**entry, "file": name})
    arrays = map_safetensors(target / INDEX)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "num_structures": len(arrays["natoms"]),
        "num_atoms": int(arrays["natoms"].sum(dtype=np.int64)),
        "num_groups": len(arrays["group_offsets"]) - 1,
        "elements": np.unique(arrays["composition_elements"]).tolist(),
        "labels": label_counts(arrays["labels"]),
        "splits": {name: int(np.count_nonzero(arrays["split"] == code)) for code, name in enumerate(names)},
        "dtype": dtype,
        "edge_cutoff": EDGE_CUTOFF,
        "units": {"length": "angstrom", "energy": "eV", "forces": "eV/angstrom", "stress": "eV/angstrom^3"},
        "source": source,
        **facts,
        "shards": shards,
        "index": index,
    }
    write_bytes(target / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)  # a file system without hard links


def publish(folder: Path, path: Path) -> None:
    """Gives a finished folder its name; a store that is there makes way and is removed."""
    if not path.exists():
        os.replace(folder, path)
        return
    old = path.parent / f".{path.name}.old-{os.getpid()}"
    os.replace(path, old)
    os.replace(folder, path)
    shutil.rmtree(old, ignore_errors=True)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuses a path where something is that must stay.

    Raises:
        DataError: something is there already, and is not to be overwritten or is no store.
    """
    if path.exists():
        if not overwrite:
            raise DataError(f"{path}: exists already; choose another name or allow overwriting")
        if not (path / MANIFEST).is_file():
            raise DataError(f"{path}: exists and is no prepared store, it is not overwritten")


class StoreWriter:
    """Writes structures one by one, shard by shard, with memory bounded by one shard.

    Use as a context manager. On leaving it normally the store appears under its name, whole; after an exception
    nothing is left. A process that is killed leaves only a hidden ``.NAME.partial-PID`` directory beside it.
    Large sets go through :func:`escaip.data.prepare.prepare`, which works in parallel and can be restarted.

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
        self.path = Path(path)
        check_target(self.path, overwrite)
        self._source, self._dtype = source, dtype
        self._partial = self.path.parent / f".{self.path.name}.partial-{os.getpid()}"
        self._writer = PartWriter(self._partial / "part", dtype=dtype, shard_atoms=shard_atoms)

    def __enter__(self) -> StoreWriter:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._partial, ignore_errors=True)
            (self._partial / "part").mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if len(self) == 0:
                    raise DataError(f"{self.path}: 0 structures to write; check the source, its filters and on_error")
                with disk_errors(self.path):
                    self._writer.close()
                    assemble([self._partial / "part"], self._partial / "store", dtype=self._dtype, source=self._source)
                    publish(self._partial / "store", self.path)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._writer)

    def write(self, data: AtomicData) -> None:
        """Adds one structure.

        Raises:
            DataError: the disk is full, or files cannot be written.
        """
        with disk_errors(self.path):
            self._writer.write(data)
