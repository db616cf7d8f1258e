"""Writing a prepared store: everything goes to a folder aside, which takes its name at the end."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.store import (
    COLUMNS,
    EDGE_CUTOFF,
    FIELDS,
    INDEX,
    MANIFEST,
    SCHEMA_VERSION,
    Arrays,
    composition_key,
    compositions,
    group_names,
    is_store,
    label_counts,
    map_arrays,
)
from escaip.data.structure import LABELS, AtomicData, collate
from escaip.data.validation import check_choice
from escaip.errors import ConfigError, DataError
from escaip.types import TARGETS

PART = "part.json"
DEFAULT_SHARD_ATOMS = 1_000_000
PRECISIONS = ("float64", "float32")
_DTYPES = {"<f8": "F64", "<f4": "F32", "<i8": "I64", "<i4": "I32", "<u8": "U64", "|u1": "U8", "|b1": "BOOL"}
"""Names of types in safetensors files."""
_QUANTUM = 1e4  # coordinates are hashed in units of 1e-4 Å, so that single precision finds its double


@dataclass(frozen=True)
class Stream:
    """A column of ``length`` numbers, written in the blocks that it yields because it is too long to hold."""

    dtype: np.dtype[Any]
    length: int
    blocks: Callable[[], Iterator[NDArray[Any]]]


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any] | Stream]) -> dict[str, Any]:
    """Writes and syncs a safetensors file; returns its ``file``, ``bytes`` and ``sha256`` for a manifest."""
    header: dict[str, Any] = {}
    position = 0
    # Wide types first: the format aligns nothing, and not every processor reads misaligned numbers.
    order = sorted(arrays, key=lambda key: (-arrays[key].dtype.itemsize, key))
    for key in order:
        value = arrays[key]
        shape = [value.length] if isinstance(value, Stream) else list(value.shape)
        stop = position + int(np.prod(shape)) * value.dtype.itemsize
        header[key] = {"dtype": _DTYPES[value.dtype.str], "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def put(block: bytes | memoryview) -> None:
            digest.update(block)
            file.write(block)

        put(len(text).to_bytes(8, "little") + text)
        for key in order:
            value = arrays[key]
            for block in value.blocks() if isinstance(value, Stream) else [value]:
                put(np.ascontiguousarray(block, dtype=value.dtype).reshape(-1).view("u1").data)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    if size != 8 + len(text) + position:
        raise DataError(f"{path}: wrote {size} bytes instead of {8 + len(text) + position}; prepare the store again")
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def pack_text(kind: str, texts: Sequence[str]) -> Arrays:
    """Returns ``KIND_bytes``, UTF-8 end to end, and ``KIND_offsets``, where each text begins."""
    encoded = [text.encode("utf-8") for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)]).astype("<i8")
    return {f"{kind}_bytes": np.frombuffer(b"".join(encoded), dtype="u1"), f"{kind}_offsets": offsets}


def pack_compositions(keys: Sequence[bytes]) -> Arrays:
    """Returns ``composition_offsets (C+1,)`` into ``composition_elements`` and ``composition_counts``."""
    table = np.frombuffer(b"".join(keys), dtype="<i4").reshape(-1, 2)
    return {
        "composition_offsets": np.cumsum([0, *(len(key) // 8 for key in keys)]).astype("<i8"),
        "composition_elements": np.ascontiguousarray(table[:, 0]).astype("u1"),
        "composition_counts": np.ascontiguousarray(table[:, 1]),
    }


def _pack_structures(structures: Sequence[AtomicData], precision: str) -> Arrays:
    """Returns fields of structures end to end, with ``offsets (B+1,)`` of their atoms, and their ids."""
    batch = collate(structures)
    arrays: Arrays = {"offsets": batch.ptr.numpy()}
    for key, (dtype, _) in FIELDS.items():
        arrays[key] = batch[key].numpy().astype(dtype)
    for key in TARGETS:
        values = batch[key].numpy()
        if key in LABELS or not np.isnan(values).all():
            # float32 halves forces and stress, but never energies, whose differences matter.
            single = precision == "float32" and key != "energy"
            arrays[key] = values.astype("<f4" if single else "<f8")
    return {**arrays, **pack_text("id", batch.structure_id)}


def _index_structures(structures: Sequence[AtomicData]) -> Arrays:
    """Returns the index of some structures: columns, names of groups, compositions."""
    groups: dict[str, int] = {}
    kinds: dict[bytes, int] = {}
    columns = {key: np.zeros(len(structures), dtype=dtype) for key, dtype in COLUMNS.items()}
    for row, data in enumerate(structures):
        store = data._store
        numbers = store["atomic_numbers"].numpy()
        forces = store["forces"].numpy()[~store["fixed"].numpy()]
        squares = (forces**2).sum(axis=1)
        squares = squares[~np.isnan(squares)]
        facts = {
            "natoms": len(numbers),
            "periodic": bool(store["pbc"].any()),
            "labels": sum(1 << bit for bit, key in enumerate(TARGETS) if data.has_label(key)),
            "group_codes": groups.setdefault(str(data.group), len(groups)),
            "composition_codes": kinds.setdefault(composition_key(numbers), len(kinds)),
            "num_edges": _count_edges(data),
            "energy": float(store["energy"]),
            "force_square_sum": float(squares.sum()),
            "force_count": 3 * len(squares),
            "max_force": float(np.sqrt(squares.max())) if len(squares) else 0.0,
            "content_hash": _content_hash(data),
        }
        for key, value in facts.items():
            columns[key][row] = value
    return {**columns, **pack_text("group", list(groups)), **pack_compositions(list(kinds))}


def _content_hash(data: AtomicData) -> int:
    """Returns 64 bits shared by structures with the same elements, coordinates, cell, charge and spin."""
    store = data._store
    digest = hashlib.blake2b(store["atomic_numbers"].numpy().tobytes(), digest_size=8)
    for key in ("positions", "cell"):
        # + 0.0 turns the negative zero of rint into zero.
        digest.update((np.rint(store[key].numpy() * _QUANTUM) + 0.0).tobytes())
    for key in ("pbc", "charge", "spin_multiplicity"):
        digest.update(store[key].numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def _count_edges(data: AtomicData) -> int:
    """Returns the directed pairs within ``EDGE_CUTOFF``, images included."""
    from vesin import NeighborList

    points, box, periodic = (data._store[key].numpy() for key in ("positions", "cell", "pbc"))
    search = NeighborList(cutoff=EDGE_CUTOFF, full_list=True)
    (centers,) = search.compute(points=points, box=box[0], periodic=periodic[0], quantities="i")
    return min(len(centers), np.iinfo(np.int32).max)


def _join_indices(parts: Sequence[Callable[[], Arrays]]) -> dict[str, NDArray[Any] | Stream]:
    """Returns one index of several, with common codes of groups and compositions, as ``save_arrays`` takes it.

    Columns are streams that open one part at a time: nothing as long as the data set is held.
    """
    groups: dict[str, int] = {}
    kinds: dict[bytes, int] = {}
    codes: dict[str, list[NDArray[Any]]] = {"group_codes": [], "composition_codes": []}
    length = 0
    for part in parts:
        index = part()
        length += len(index["natoms"])
        codes["group_codes"].append(_codes(group_names(index), groups))
        codes["composition_codes"].append(_codes(compositions(index), kinds))

    def blocks(key: str) -> Iterator[NDArray[Any]]:
        for number, part in enumerate(parts):
            column = part()[key]
            yield codes[key][number][column] if key in codes else column

    streams = {key: Stream(np.dtype(dtype), length, partial(blocks, key)) for key, dtype in COLUMNS.items()}
    return {**streams, **pack_text("group", list(groups)), **pack_compositions(list(kinds))}


def _codes(keys: Sequence[Any], table: dict[Any, int]) -> NDArray[Any]:
    return np.array([table.setdefault(key, len(table)) for key in keys], dtype="<i4")


class PartWriter:
    """Writes structures into shards of a folder, with memory bounded by one shard and the index of the part.

    A part is whole once ``close`` has written its ``part.json``.
    """

    def __init__(self, folder: Path, *, dtype: str = "float64", shard_atoms: int = DEFAULT_SHARD_ATOMS) -> None:
        """Prepares to write into ``folder``, which exists by the first ``write``.

        Raises:
            ConfigError: an unknown dtype, or more targets than the index has bits for.
        """
        check_choice("dtype", dtype, PRECISIONS)
        if len(TARGETS) > 8:
            raise ConfigError(f"a store holds up to 8 targets, {len(TARGETS)} are registered: register fewer")
        self._folder, self._dtype, self._shard_atoms = folder, dtype, shard_atoms
        self._pending: list[AtomicData] = []
        self._pending_atoms = 0
        self._indices: list[Arrays] = []
        self._shards: list[dict[str, Any]] = []

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
            save_arrays(self._folder / INDEX, _join_indices([partial(dict, index) for index in self._indices]))
        _write_synced(self._folder / PART, json.dumps({"shards": self._shards, **facts}))

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._folder / f"shard-{len(self._shards):05d}.safetensors"
        entry = save_arrays(path, _pack_structures(self._pending, self._dtype))
        self._shards.append({**entry, "num_structures": len(self._pending), "num_atoms": self._pending_atoms})
        self._indices.append(_index_structures(self._pending))
        self._pending, self._pending_atoms = [], 0


def read_part(folder: Path) -> dict[str, Any] | None:
    """Returns the contents of ``part.json``; None for a part that is not whole."""
    file = folder / PART
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def assemble(
    parts: Sequence[Path],
    target: Path,
    *,
    dtype: str,
    source: str,
    split: Callable[[Arrays], tuple[list[str], NDArray[np.uint8]]] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Links the shards of parts into one folder, writes the index and, last of all, the manifest, which it returns.

    The parts, folders that are whole, stay as they are, so that it can be interrupted at any point and run again.
    ``split`` returns names of splits and the code of each structure, from an index; by default there is one, ``all``.
    Further ``facts`` of the manifest are plain JSON values.
    """
    target.mkdir(exist_ok=True)
    contents = [(folder, (read_part(folder) or {"shards": []})["shards"]) for folder in parts]
    filled = [(folder, shards) for folder, shards in contents if shards]
    if not filled:
        raise DataError(f"{source}: 0 structures to write; check the source, its filters and on_error")
    columns, names = _join_indices([partial(map_arrays, folder / INDEX) for folder, _ in filled]), ["all"]
    if split is not None:
        save_arrays(target / INDEX, columns)
        names, columns["split"] = split(map_arrays(target / INDEX))
    index = save_arrays(target / INDEX, columns)
    shards: list[dict[str, Any]] = []
    for folder, entries in filled:
        for entry in entries:
            name = f"shard-{len(shards):05d}.safetensors"
            _link(folder / entry["file"], target / name)
            shards.append({**entry, "file": name})
    arrays = map_arrays(target / INDEX)
    units = {"length": "angstrom", "energy": "eV", "forces": "eV/angstrom", "stress": "eV/angstrom^3"}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "num_structures": len(arrays["natoms"]),
        "num_atoms": int(arrays["natoms"].sum(dtype=np.int64)),
        "num_groups": len(arrays["group_offsets"]) - 1,
        "elements": np.unique(arrays["composition_elements"]).tolist(),
        "labels": label_counts(arrays["labels"], list(TARGETS)),
        "splits": {name: int(np.count_nonzero(arrays["split"] == code)) for code, name in enumerate(names)},
        "dtype": dtype,
        "edge_cutoff": EDGE_CUTOFF,
        "units": {**units, **{key: target.unit for key, target in TARGETS.items() if key not in units}},
        "source": source,
        **facts,
        "shards": shards,
        "index": index,
    }
    _write_synced(target / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)  # a file system without hard links


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def publish(folder: Path, path: Path) -> None:
    """Gives a finished folder its name; a store of that name is removed."""
    old = path.parent / f".{path.name}.old-{os.getpid()}"
    if path.exists():
        os.replace(path, old)
    os.replace(folder, path)
    shutil.rmtree(old, ignore_errors=True)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuses a path where something is that must stay."""
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists already; choose another name or allow overwriting")
    if path.exists() and not is_store(path):
        raise DataError(f"{path}: exists and is no prepared store, it is not overwritten")


@contextmanager
def disk_errors(path: Path, kept: str = "nothing was kept") -> Iterator[None]:
    """Turns an OSError into a DataError of one line, which names ``path``, or the source that the error names."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"{path}: the disk is full, {kept}; free space or write elsewhere") from error
        named = Path(os.fsdecode(error.filename)) if error.filename is not None else path
        if path.parent not in (named, *named.parents):  # a source, not what is written
            raise DataError(f"{named}: cannot be read ({error.strerror or error})") from error
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


class StoreWriter:
    """Writes structures one by one, shard by shard, with memory bounded by one shard.

    Use as a context manager. On leaving it normally the store appears under its name, whole; after an exception
    nothing is left. A process that is killed leaves only a hidden ``.NAME.partial-PID`` folder beside it. Large sets go
    through ``escaip.data.prepare.prepare``, which works in parallel and can be restarted.

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
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepares to write.

        Args:
            path: folder to create.
            source: description of the structures, kept in the manifest.
            dtype: ``float64`` or ``float32``, of forces and stress; positions and energies are always float64.
            shard_atoms: a shard is closed when it holds this many atoms.
            overwrite: replace a store that is already there.
            facts: further entries of the manifest (name of the set, level of theory), plain JSON values.

        Raises:
            ConfigError: an unknown dtype.
            DataError: something is there already, and is not to be overwritten or is no store.
        """
        self.path = Path(path)
        check_target(self.path, overwrite)
        self._source, self._dtype, self._facts = source, dtype, dict(facts or {})
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
                with disk_errors(self.path):
                    self._writer.close()
                    part, store = self._partial / "part", self._partial / "store"
                    assemble([part], store, dtype=self._dtype, source=self._source, **self._facts)
                    publish(store, self.path)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, data: AtomicData) -> None:
        """Adds one structure.

        Raises:
            DataError: the disk is full, or files cannot be written.
        """
        with disk_errors(self.path):
            self._writer.write(data)
