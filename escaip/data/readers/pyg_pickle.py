"""Reads pickles of PyTorch Geometric records, and ``torch.save`` files of them, without running what they name.

A pickle is a program: it may call whatever it can import. Here it can import nothing. The names that such records need
stand for small functions and inert classes of this module, every other name is refused, and so is every opcode that
these files do not use. Tensors and arrays are built from their bytes by NumPy, within bounds that are checked first.

Layouts: PyTorch Geometric 1.x keeps attributes in ``__dict__``, 2.x in ``_store._mapping``; PyTorch writes a storage
inside a pickle in its legacy form (five pickles, a count, the numbers), and its own files as a zip.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from escaip.data.readers.pickle_opcodes import Refused, walk
from escaip.errors import DataError

MAX_DIMENSIONS = 8
MAX_EXPANDED = 1 << 20
"""Elements that a tensor may have beyond those of its storage (expanded ones share them)."""

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MACHINE = {
    "protocol_version": _PROTOCOL,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}
_HEADER = b"".join(pickle.dumps(value, protocol=2) for value in (_MAGIC, _PROTOCOL, _MACHINE))
"""How every storage that PyTorch wrote begins; to compare is ten times faster than to read it."""

_STORAGES = {
    "HalfStorage": "<f2", "FloatStorage": "<f4", "DoubleStorage": "<f8", "BoolStorage": "|b1", "ByteStorage": "|u1",
    "CharStorage": "|i1", "ShortStorage": "<i2", "IntStorage": "<i4", "LongStorage": "<i8",
}  # fmt: skip
_NUMPY_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class PickledObject:
    """Stands for any object of PyTorch Geometric; only collects its state.

    Attributes:
        state: what the object kept, by name.
    """

    __slots__ = ("state",)
    state: dict[str, Any]

    def __new__(cls) -> PickledObject:
        self = super().__new__(cls)
        self.state = {}
        return self

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise Refused(f"holds an object whose state is a {type(state).__name__}, expected a dict")
        self.state = state

    def __call__(self, *args: Any) -> PickledObject:
        """PyTorch Geometric makes its batch classes by calling an object; that gives another inert object."""
        return PickledObject()


class _Inert:
    """Values in the making: a pickle can neither call them nor set anything on them."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise Refused(f"sets the state of a {type(self).__name__.strip('_').lower()}")


class _Function(_Inert):
    """One of our functions, as a pickle sees it; a bare function would let BUILD set its defaults."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


class _StorageType(_Inert):
    __slots__ = ("dtype",)

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(dtype)


class _Storage(_Inert):
    """A flat run of numbers."""

    __slots__ = ("buffer", "count", "dtype")

    def __init__(self, dtype: np.dtype[Any], count: int, buffer: bytes | memoryview) -> None:
        if count < 0 or len(buffer) != count * dtype.itemsize:
            raise Refused(f"holds a storage of {len(buffer)} bytes, expected {count} numbers of {dtype.itemsize}")
        self.dtype, self.count, self.buffer = dtype, count, buffer


class _Array(_Inert):
    """A tensor or array; NumPy's own ``__setstate__`` is kept out of reach."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray | None) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        if self.value is not None or type(state) is not tuple or len(state) != 5:
            raise Refused("sets the state of an array")
        _, shape, dtype, fortran, raw = state
        self.value = _array_of(raw, dtype, shape, "F" if fortran else "C")


class _NumpyType(_Inert):
    __slots__ = ("code", "order")

    def __init__(self, code: Any) -> None:
        if code not in _NUMPY_TYPES:
            raise Refused(f"holds a numpy array of type {_shown(code)}; only numbers are read")
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise Refused("holds a numpy type with a state that is not understood")
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Marker(_Inert):
    """A class that is only mentioned."""

    __slots__ = ()


def unpickle(data: bytes, where: str) -> Any:
    """The value of one pickle: builtin containers and scalars, :class:`PickledObject`, and arrays (see :func:`plain`).

    Args:
        data: the pickle.
        where: file and key, for messages.

    Raises:
        DataError: a damaged pickle, or one that names anything but tensors, arrays and PyTorch Geometric's records.
    """
    try:
        end = walk(data, 0)
        if end != len(data):
            raise Refused(f"has {len(data) - end} bytes after its end")
        return _Unpickler(data, _ADMITTED).load()
    except Refused as error:
        raise DataError(f"{where}: {error}; the file is damaged, or no data file") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{where}: not a readable pickle, or damaged ({reason})") from error


def read_torch_file(path: Path) -> Any:
    """The object that ``torch.save`` wrote, by the same rules as :func:`unpickle`; the file is held in memory.

    Raises:
        DataError: no such zip, a damaged one, or one that names anything but data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive)
    except Refused as error:
        raise DataError(f"{path}: {error}; the file is damaged, or no data file") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{path}: not a readable torch.save file (PyTorch 1.6 or newer), or damaged ({reason})"
        ) from error


def attributes(record: Any, where: str) -> dict[str, Any]:
    """Attributes of a record of either generation, or of a plain dict; those that are None are left out.

    Raises:
        DataError: the value is no record.
    """
    kept = record.state if isinstance(record, PickledObject) else record
    if type(kept) is dict and isinstance(kept.get("_store"), PickledObject):
        kept = kept["_store"].state.get("_mapping")
    if type(kept) is not dict or not all(type(key) is str for key in kept):
        raise DataError(f"{where}: holds a {type(record).__name__}, expected a PyTorch Geometric record or a dict")
    return {key: plain(value) for key, value in kept.items() if value is not None}


def plain(value: Any) -> Any:
    """A NumPy array, read-only, where the value is a tensor or array; any other value as it is."""
    return value.value if isinstance(value, _Array) else value


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        data: bytes,
        admitted: Mapping[tuple[str, str], Any],
        storage: Callable[[Any], _Storage | None] | None = None,
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._admitted, self._storage = admitted, storage

    def find_class(self, module: str, name: str) -> Any:
        found = self._admitted.get((module, name))
        if found is None:
            raise Refused(f"names {_shown(f'{module}.{name}')}, which no data record needs and which is not loaded")
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise Refused("refers to a storage outside itself")
        return self._storage(pid)


def _storage_from_bytes(payload: Any) -> _Storage:
    """A storage in PyTorch's legacy form: magic number, protocol, machine, reference, keys; count and numbers."""
    if not isinstance(payload, bytes):
        raise Refused("holds a storage that is no bytes")
    found: list[tuple[np.dtype[Any], str, int]] = []

    def note(pid: Any) -> None:
        found.append(_reference(pid))

    def read(start: int) -> tuple[Any, int]:
        end = walk(payload, start)
        return _Unpickler(payload[start:end], _STORAGE_NAMES, note).load(), end

    if payload.startswith(_HEADER):
        at = len(_HEADER)
    else:
        magic, at = read(0)
        protocol, at = read(at)
        if magic != _MAGIC or protocol != _PROTOCOL:
            raise Refused("holds a storage without PyTorch's magic number")
        machine, at = read(at)
        if type(machine) is not dict or machine.get("little_endian") is not True:
            raise Refused("holds a storage of a big-endian machine")
    _, at = read(at)
    keys, at = read(at)
    if len(found) != 1 or keys != [found[0][1]] or len(payload) < at + 8:
        raise Refused("holds a storage that is not one run of numbers")
    dtype, _, count = found[0]
    if struct.unpack_from("<q", payload, at)[0] != count:
        raise Refused("holds a storage that counts its numbers in two ways")
    return _Storage(dtype, count, memoryview(payload)[at + 8 :])


def _reference(pid: Any) -> tuple[np.dtype[Any], str, int]:
    """Type, key and count of ``('storage', type, key, location, count[, view])``."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
        raise Refused("refers to something that is no storage")
    if type(pid[2]) is not str or type(pid[4]) is not int or (len(pid) == 6 and pid[5] is not None):
        raise Refused("refers to a storage in a way that is not understood")
    return pid[1].dtype, pid[2], pid[4]


def _read_archive(archive: zipfile.ZipFile) -> Any:
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused("is a zip without a data.pkl, not a file of torch.save")
    storages: dict[str, _Storage] = {}

    def entry(name: str) -> bytes:
        info = archive.getinfo(roots[0] + name)
        # PyTorch never compresses, and a compressed entry could unfold into any size.
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"has a compressed entry {_shown(name)}")
        return archive.read(info)

    def storage(pid: Any) -> _Storage:
        dtype, key, count = _reference(pid)
        if key not in storages:
            storages[key] = _Storage(dtype, count, entry(f"data/{key}"))
        if storages[key].dtype != dtype or storages[key].count != count:
            raise Refused(f"reads the storage {_shown(key)} in two ways")
        return storages[key]

    if f"{roots[0]}byteorder" in archive.namelist() and entry("byteorder") != b"little":
        raise Refused("is a file of a big-endian machine")
    data = entry("data.pkl")
    walk(data, 0)
    return _Unpickler(data, _ADMITTED, storage).load()


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Array:
    """A tensor on its storage; what is left out are gradients and hooks."""
    shape, steps = _integers(size), _integers(stride)
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0 or len(shape) != len(steps):
        raise Refused("holds a tensor that is not built from a storage, an offset, sizes and strides")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if count and last >= storage.count:
        raise Refused(f"holds a tensor of shape {shape} that reaches beyond its {storage.count} numbers")
    if count > max(storage.count, MAX_EXPANDED):
        raise Refused(f"holds a tensor of shape {shape} expanded from {storage.count} numbers")
    if count == 0:
        return _Array(np.zeros(shape, storage.dtype))
    flat = np.frombuffer(storage.buffer, storage.dtype)[offset:]
    if steps == tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))):
        return _Array(flat[:count].reshape(shape))
    return _Array(as_strided(flat, shape, [step * storage.dtype.itemsize for step in steps], writeable=False))


def _integers(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > MAX_DIMENSIONS or not all(type(v) is int and v >= 0 for v in values):
        raise Refused("holds an array whose sizes or strides are no natural numbers")
    return values


def _array_of(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    if type(shape) is int:
        shape = (shape,)
    if not isinstance(dtype, _NumpyType) or not isinstance(raw, bytes | bytearray) or order not in ("C", "F", "A", "K"):
        raise Refused("holds a numpy array that is not made of bytes")
    sizes = _integers(shape)
    if math.prod(sizes) * dtype.dtype.itemsize != len(raw):
        raise Refused(f"holds a numpy array of shape {sizes} made of {len(raw)} bytes")
    return np.frombuffer(bytes(raw), dtype.dtype).reshape(sizes, order="F" if order == "F" else "C")


def _shown(text: Any) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 120 else shown[:117] + "..."


_STORAGE_NAMES: dict[tuple[str, str], Any] = {("torch", name): _StorageType(code) for name, code in _STORAGES.items()}

_ADMITTED: dict[tuple[str, str], Any] = {
    **_STORAGE_NAMES,
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch.storage", "_load_from_bytes"): _Function(_storage_from_bytes),
    # Backward hooks, of which there are none.
    ("collections", "OrderedDict"): _Function(dict),
    ("numpy", "dtype"): _Function(lambda code, *_: _NumpyType(code)),
    ("numpy", "ndarray"): _Marker(),
}
for _module in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_module}.multiarray", "scalar"] = _Function(lambda dtype, raw: _array_of(raw, dtype, ()).item())
    _ADMITTED[f"{_module}.multiarray", "_reconstruct"] = _Function(lambda *_: _Array(None))
    _ADMITTED[f"{_module}.numeric", "_frombuffer"] = _Function(lambda *args: _Array(_array_of(*args)))
for _module, _name in (
    ("data", "Data"),
    ("data", "DataEdgeAttr"),
    ("data", "DataTensorAttr"),
    ("storage", "GlobalStorage"),
    ("batch", "Batch"),
    ("batch", "DynamicInheritanceGetter"),
):
    _ADMITTED[f"torch_geometric.data.{_module}", _name] = PickledObject
