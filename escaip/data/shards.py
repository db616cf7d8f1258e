"""Files of a prepared store: safetensors written whole and synced, and read through memory maps."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from escaip.data.structure import AtomicData
from escaip.errors import DataError

Arrays = dict[str, NDArray[Any]]

_SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
_MAX_HEADER = 1 << 20
_STORED = {
    "positions": "<f8",
    "atomic_numbers": "u1",
    "cell": "<f8",
    "pbc": "?",
    "charge": "<i4",
    "spin_multiplicity": "<i4",
    "energy": "<f8",
    "forces": "<f8",
    "stress": "<f8",
    "fixed": "?",
    "tags": "<i4",
}
MOMENTS = "magnetic_moments"
STORED_FIELDS = tuple(_STORED)
PRECISIONS = ("float64", "float32")


def stored_dtypes(precision: str) -> dict[str, str]:
    """How each field is stored; ``float32`` halves forces and stress, never positions, cells or energies."""
    single = dict.fromkeys(("forces", "stress"), "<f4") if precision == "float32" else {}
    return {**_STORED, **single}


def pack_structures(structures: Sequence[AtomicData], precision: str) -> Arrays:
    """Fields of structures end to end, with ``offsets (B+1,)`` of their atoms, and their ids as text."""
    arrays: Arrays = {"offsets": np.concatenate([[0], np.cumsum([d.num_nodes for d in structures])]).astype("<i8")}
    for key, dtype in stored_dtypes(precision).items():
        arrays[key] = np.concatenate([data._store[key].numpy() for data in structures]).astype(dtype)
    if any(MOMENTS in data for data in structures):
        pieces = [data[MOMENTS].numpy() if MOMENTS in data else np.full(data.num_nodes, np.nan) for data in structures]
        arrays[MOMENTS] = np.concatenate(pieces).astype("<f4")
    arrays.update(pack_text("id", [data.structure_id for data in structures]))
    return arrays


def pack_text(kind: str, texts: Sequence[str]) -> Arrays:
    """``KIND_bytes``, UTF-8 end to end, and ``KIND_offsets``, where each begins."""
    encoded = [text.encode("utf-8") for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(item) for item in encoded])]).astype("<i8")
    return {f"{kind}_bytes": np.frombuffer(b"".join(encoded), dtype="u1"), f"{kind}_offsets": offsets}


def read_text(arrays: Arrays, kind: str, index: int) -> str:
    """One of the texts of :func:`pack_text`."""
    start, stop = arrays[f"{kind}_offsets"][index : index + 2].tolist()
    return arrays[f"{kind}_bytes"][start:stop].tobytes().decode("utf-8")


@dataclass(frozen=True)
class Stream:
    """A column too long to hold, in blocks.

    Attributes:
        dtype: of its numbers.
        length: how many.
        blocks: makes an iterator over ``(k,)`` arrays that sum up to ``length``.
    """

    dtype: np.dtype[Any]
    length: int
    blocks: Callable[[], Iterator[NDArray[Any]]]


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any] | Stream]) -> dict[str, Any]:
    """Writes a safetensors file and syncs it; streams are never whole in memory.

    Returns:
        ``file``, ``bytes`` and ``sha256``, as a manifest holds them.
    """
    header: dict[str, Any] = {}
    position = 0
    # Wide types first: the format aligns nothing, and not every processor reads misaligned numbers.
    order = sorted(arrays, key=lambda key: (-arrays[key].dtype.itemsize, key))
    for key in order:
        value = arrays[key]
        shape = [value.length] if isinstance(value, Stream) else list(value.shape)
        stop = position + int(np.prod(shape)) * value.dtype.itemsize
        header[key] = {"dtype": _NAMES[value.dtype], "shape": shape, "data_offsets": [position, stop]}
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


def write_bytes(path: Path, content: bytes) -> None:
    """Writes aside, syncs and renames."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def map_safetensors(path: Path) -> Arrays:
    """The arrays of a safetensors file, as read-only views of one memory map.

    The map is torch's, which keeps no file descriptor: a large store has more shards than a process may have of those.

    Raises:
        DataError: a header that is damaged or points outside the file.
    """
    try:
        size = path.stat().st_size
        if size < 8:
            raise ValueError(f"{size} bytes")
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        data.flags.writeable = False
        length = int.from_bytes(data[:8].tobytes(), "little")
        if not 2 <= length <= min(len(data) - 8, _MAX_HEADER):
            raise ValueError("impossible header length")
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        body = data[8 + length :]
        arrays: Arrays = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop <= len(body):
                raise ValueError(f"array {name!r} lies outside the file")
            dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
            arrays[name] = body[start:stop].view(dtype).reshape(entry["shape"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged shard ({error}); prepare the store again") from error
    return arrays


class disk_errors:
    """Turns an OSError into one line that names the path, or the file elsewhere that the error names."""

    def __init__(self, path: Path, kept: str = "nothing was kept") -> None:
        self.path, self.kept = path, kept

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(value, OSError):
            if value.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(f"{self.path}: the disk is full, {self.kept}; free space or write elsewhere") from value
            named = Path(os.fsdecode(value.filename)) if value.filename is not None else self.path
            if self.path.parent not in (named, *named.parents):  # a source, not what is written
                raise DataError(f"{named}: cannot be read ({value.strerror or value})") from value
            raise DataError(f"{self.path}: cannot be written ({value.strerror or value})") from value
