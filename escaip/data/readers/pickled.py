"""Pickles of PyTorch Geometric records, old and new, and dictionaries of them, without running what they name.

A pickle is a program that may call whatever it can import. Here every name outside ``_ALLOWED`` is refused, and
those inside stand for small functions and inert classes of this module. Arrays are built by NumPy from their bytes,
within bounds that are checked first.

Layouts: PyTorch Geometric 1.x keeps attributes in ``__dict__``, 2.x in ``_store._mapping``; PyTorch writes a storage
inside a pickle in its legacy form (five pickles, a count, the numbers; the first three are always the same), and its
own files as a zip.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from escaip.errors import DataError
from escaip.files import one_line

MAX_DIMENSIONS = 8
MAX_EXPANDED = 1 << 20
"""Elements that a tensor may have beyond those of its storage (expanded ones share them)."""

HEADER = b"".join(
    pickle.dumps(value, protocol=2)
    for value in (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    )
)
"""How a storage that PyTorch wrote on a little-endian machine begins: magic number, protocol, machine."""

_STORAGES = {
    "HalfStorage": "<f2", "FloatStorage": "<f4", "DoubleStorage": "<f8", "BoolStorage": "|b1", "ByteStorage": "|u1",
    "CharStorage": "|i1", "ShortStorage": "<i2", "IntStorage": "<i4", "LongStorage": "<i8",
}  # fmt: skip
_NUMPY_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class Refused(Exception):
    """Why a pickle is not read, without its place."""


class PickledObject:
    """Stands for any object of PyTorch Geometric; only collects its state.

    Attributes:
        state: attributes of the object, by name.
    """

    __slots__ = ("state",)
    state: dict[str, Any]

    def __new__(cls) -> PickledObject:
        self = super().__new__(cls)
        self.state = {}
        return self

    def build(self, state: Any) -> None:
        """Takes the state that a pickle sets."""
        if type(state) is not dict:
            raise Refused(f"holds an object whose state is a {type(state).__name__}, expected a dict")
        self.state = state

    def __call__(self, *args: Any) -> PickledObject:
        """PyTorch Geometric makes its batch classes by calling an object; that gives another inert object."""
        return PickledObject()


class _NumberType:
    """A type of NumPy by its code; the pickle sets its byte order afterwards."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in _NUMPY_TYPES:
            raise Refused(f"holds a numpy array of type {_shown(code)}; only numbers are read")
        self.code, self.order = code, "<"

    def build(self, state: Any) -> None:
        if len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise Refused("holds a numpy type with a state that is not understood")
        self.order = state[1]


class _Array:
    """An array of NumPy, whose contents the pickle sets afterwards: ``(version, shape, type, fortran, bytes)``."""

    def __init__(self, *_: Any) -> None:
        self.value: NDArray[Any] | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array_of(raw, dtype, shape, "F" if fortran else "C")


class DataUnpickler(pickle._Unpickler):
    """Reads one pickle of a stream, importing nothing: names are looked up among those allowed.

    Python's own implementation takes no memory for an index or a length that a file only claims; that in C does.
    """

    # Instead of an empty bytearray of any length, the bytes that there are.
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]
    stack: list[Any]

    def __init__(
        self, stream: io.BytesIO, allowed: Mapping[str, Any], storage: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__(stream)
        self._allowed, self._storage = allowed, storage

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a name, or refuses it."""
        full = f"{module}.{name}"
        if full not in self._allowed or "." in name:
            raise Refused(f"names {_shown(full)}, which no data record needs and which is not loaded")
        return self._allowed[full]

    def load_build(self) -> None:
        """Sets the state of the last object, which a function or a tensor does not have."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], PickledObject | _NumberType | _Array):
            raise Refused("sets the state of a function, tensor or array")
        self.stack[-1].build(state)

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, pid: Any) -> Any:
        """Returns the storage that ``pid`` refers to."""
        if self._storage is None:
            raise Refused("refers to a storage outside itself")
        return self._storage(pid)


def unpickle(data: bytes, where: str) -> Any:
    """Returns the value of one pickle: containers, scalars, ``PickledObject``, and arrays (see ``plain``).

    Args:
        data: the pickle.
        where: file and key, for messages.

    Raises:
        DataError: a damaged pickle, or one that names anything but tensors, arrays and PyTorch Geometric's records.
    """
    with _one_line(where, "not a readable pickle, or damaged"):
        stream = io.BytesIO(data)
        value = DataUnpickler(stream, _ALLOWED).load()
        if stream.tell() != len(data):
            raise Refused(f"has {len(data) - stream.tell()} bytes after its end")
        return value


def read_torch_file(path: Path) -> Any:
    """Returns the object that ``torch.save`` wrote, by the same rules; the file is held in memory.

    Raises:
        DataError: no such zip, a damaged one, or one that names anything but data.
    """
    with (
        _one_line(str(path), "not a readable torch.save file (PyTorch 1.6 or newer), or damaged"),
        zipfile.ZipFile(path) as archive,
    ):
        return _read_archive(archive)


@contextmanager
def _one_line(where: str, what: str) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise DataError(f"{where}: {error}; the file is damaged, or no data file") from error
    except Exception as error:
        raise DataError(f"{where}: {what} ({one_line(error)})") from error


def attributes(record: Any, where: str) -> dict[str, Any]:
    """Returns the attributes of a record of either generation, or of a plain dict, without those that are None."""
    kept = record.state if isinstance(record, PickledObject) else record
    if type(kept) is dict and isinstance(kept.get("_store"), PickledObject):
        kept = kept["_store"].state.get("_mapping")
    if type(kept) is not dict or not all(type(key) is str for key in kept):
        raise DataError(f"{where}: holds a {type(record).__name__}, expected a PyTorch Geometric record or a dict")
    return {key: plain(value) for key, value in kept.items() if value is not None}


def plain(value: Any) -> Any:
    """Returns a NumPy array, read-only, where the value is a tensor or array; any other value as it is."""
    return value.value if isinstance(value, _Array) else value


def _storage_from_bytes(payload: Any) -> NDArray[Any]:
    """A storage in PyTorch's legacy form: ``HEADER``, reference, keys; count and numbers."""
    if not isinstance(payload, bytes) or not payload.startswith(HEADER):
        raise Refused("holds a storage that does not begin like those of PyTorch on little-endian machines")
    found: list[tuple[str, str, int]] = []
    stream = io.BytesIO(payload)
    stream.seek(len(HEADER))
    DataUnpickler(stream, _STORAGE_TYPES, lambda pid: found.append(_reference(pid))).load()
    keys = DataUnpickler(stream, {}).load()
    if len(found) != 1 or keys != [found[0][1]]:
        raise Refused("holds a storage that is not one run of numbers")
    dtype, _, count = found[0]
    (counted,) = struct.unpack("<q", stream.read(8))
    if counted != count:
        raise Refused("holds a storage that counts its numbers in two ways")
    return _storage(stream.getbuffer()[stream.tell() :], dtype, count)


def _storage(raw: bytes | memoryview, dtype: str, count: int) -> NDArray[Any]:
    size = np.dtype(dtype).itemsize
    if count < 0 or len(raw) != count * size:
        raise Refused(f"holds a storage of {len(raw)} bytes, expected {count} numbers of {size}")
    array = np.frombuffer(raw, dtype)
    array.flags.writeable = False
    return array


def _reference(pid: Any) -> tuple[str, str, int]:
    """Type, key and count of ``('storage', type, key, location, count[, view])``."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or pid[1] not in _STORAGES.values():
        raise Refused("refers to something that is no storage")
    if type(pid[2]) is not str or type(pid[4]) is not int or (len(pid) == 6 and pid[5] is not None):
        raise Refused("refers to a storage in a way that is not understood")
    return pid[1], pid[2], pid[4]


def _read_archive(archive: zipfile.ZipFile) -> Any:
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused("is a zip without a data.pkl, not a file of torch.save")
    storages: dict[str, tuple[NDArray[Any], str, int]] = {}

    def entry(name: str) -> bytes:
        info = archive.getinfo(roots[0] + name)
        # PyTorch never compresses, and a compressed entry could unfold into any size.
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"has a compressed entry {_shown(name)}")
        return archive.read(info)

    def storage(pid: Any) -> NDArray[Any]:
        dtype, key, count = _reference(pid)
        if key not in storages:
            storages[key] = _storage(entry(f"data/{key}"), dtype, count), dtype, count
        array, *kept = storages[key]
        if kept != [dtype, count]:
            raise Refused(f"reads the storage {_shown(key)} in two ways")
        return array

    if f"{roots[0]}byteorder" in archive.namelist() and entry("byteorder") != b"little":
        raise Refused("is a file of a big-endian machine")
    return DataUnpickler(io.BytesIO(entry("data.pkl")), _ALLOWED, storage).load()


def _rebuild_tensor(flat: Any, offset: Any, size: Any, stride: Any, *_: Any) -> NDArray[Any]:
    """A tensor on its storage; gradients and hooks are left out."""
    shape, steps = _integers(size), _integers(stride)
    if (
        not isinstance(flat, np.ndarray)
        or flat.ndim != 1
        or type(offset) is not int
        or offset < 0
        or len(shape) != len(steps)
    ):
        raise Refused("holds a tensor that is not built from a storage, an offset, sizes and strides")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if count and last >= len(flat):
        raise Refused(f"holds a tensor of shape {shape} that reaches beyond its {len(flat)} numbers")
    if count > max(len(flat), MAX_EXPANDED):
        raise Refused(f"holds a tensor of shape {shape} expanded from {len(flat)} numbers")
    if count == 0:
        return np.zeros(shape, flat.dtype)
    if all(step == math.prod(shape[k + 1 :]) for k, step in enumerate(steps)):
        return flat[offset : offset + count].reshape(shape)
    return as_strided(flat[offset:], shape, [step * flat.itemsize for step in steps], writeable=False)


def _integers(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > MAX_DIMENSIONS or not all(type(v) is int and v >= 0 for v in values):
        raise Refused("holds an array whose sizes or strides are no natural numbers")
    return values


def _array_of(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> NDArray[Any]:
    sizes = _integers((shape,) if type(shape) is int else shape)
    if not isinstance(dtype, _NumberType) or not isinstance(raw, bytes) or order not in ("C", "F", "A", "K"):
        raise Refused("holds a numpy array that is not made of bytes")
    kind = np.dtype(dtype.order + dtype.code)
    if math.prod(sizes) * kind.itemsize != len(raw):
        raise Refused(f"holds a numpy array of shape {sizes} made of {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(sizes, order="F" if order == "F" else "C")


def _shown(text: Any) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 120 else shown[:117] + "..."


_NUMPY = {
    "multiarray.scalar": lambda dtype, raw: _array_of(raw, dtype, ()).item(),
    "multiarray._reconstruct": _Array,
    "numeric._frombuffer": _array_of,
}
_PYG = ("data.Data", "data.DataEdgeAttr", "data.DataTensorAttr", "storage.GlobalStorage", "batch.Batch",
        "batch.DynamicInheritanceGetter")  # fmt: skip
_STORAGE_TYPES = {f"torch.{name}": code for name, code in _STORAGES.items()}
"""Types of storage stand for themselves as text, which has no state that could be set."""

_ALLOWED: Mapping[str, Any] = {
    **_STORAGE_TYPES,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch.storage._load_from_bytes": _storage_from_bytes,
    "collections.OrderedDict": dict,  # backward hooks, of which there are none
    "numpy.dtype": _NumberType,
    "numpy.ndarray": "ndarray",
    **{f"numpy.{core}.{name}": call for core in ("core", "_core") for name, call in _NUMPY.items()},
    **{f"torch_geometric.data.{name}": PickledObject for name in _PYG},
}
