"""Pickles of records are read, and never run: both generations of PyTorch Geometric, attacks, damage."""

from __future__ import annotations

import builtins
import collections
import contextlib
import functools
import io
import os
import pickle
import pickletools
import struct
import subprocess
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data

from escaip.data.readers.pickled import HEADER, PickledObject, attributes, plain, read_torch_file, unpickle
from escaip.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")

TENSORS = {
    "float": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "double": torch.randn(5, dtype=torch.float64),
    "half": torch.ones(3, dtype=torch.float16),
    "long": torch.tensor([1, -2, 2**62]),
    "int": torch.tensor([[1, 2]], dtype=torch.int32),
    "short": torch.tensor([-3], dtype=torch.int16),
    "char": torch.tensor([-3], dtype=torch.int8),
    "byte": torch.tensor([250], dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "part": torch.arange(10.0)[3:7:2],
    "expanded": torch.tensor([1.0]).expand(4, 3),
}


def record() -> dict[str, Any]:
    return {"pos": torch.randn(2, 3), "y": -1.5, "sid": 7, "id": "0_1", "tags": torch.tensor([1, 2])}


class Reduced:
    """Pickles as a call of anything."""

    def __init__(self, call: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.parts = (call, args) if state is None else (call, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def stack_global(module: str, name: str, rest: bytes = b".") -> bytes:
    """A pickle that names ``module.name`` and goes on with ``rest``."""
    text = b"".join(b"\x8c" + bytes([len(item)]) + item.encode() for item in (module, name))
    return b"\x80\x04" + text + b"\x93" + rest


def test_tensors_of_every_type_and_stride() -> None:
    found = attributes(unpickle(pickle.dumps(TENSORS, protocol=-1), "here"), "here")
    for name, tensor in TENSORS.items():
        assert np.array_equal(found[name], tensor.numpy()), name
        assert found[name].dtype == tensor.numpy().dtype, name
        assert not found[name].flags.writeable or found[name].size == 0


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_arrays_and_scalars(protocol: int) -> None:
    held = {
        "array": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "scalar": np.float64(0.25),
        "flag": np.bool_(True),
    }
    data = pickle.dumps(held, protocol=protocol)
    if protocol == 2:
        # Bytes came as text that a codec turns into bytes: no record of PyTorch Geometric is like that.
        with pytest.raises(DataError, match=r"names '_codecs\.encode'"):
            unpickle(data, "here")
        return
    found = attributes(unpickle(data, "here"), "here")
    assert all(np.array_equal(found[name], value) for name, value in held.items())


def test_both_generations_and_plain_dicts_are_the_same() -> None:
    fields = record()
    old = type("Data", (), {"__module__": "torch_geometric.data.data"})
    value = old()
    value.__dict__.update(x=None, edge_index=None, **fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_geometric.data.data.Data", old)
        first = pickle.dumps(value, protocol=4)
    second = pickle.dumps(Data(**fields), protocol=-1)
    assert b"_store" in second
    assert b"_store" not in first
    for data in (first, second, pickle.dumps(fields, protocol=4)):
        found = attributes(unpickle(data, "here"), "here")
        assert set(found) == set(fields)
        for name, item in fields.items():
            assert np.array_equal(found[name], item), name


def test_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "made.pt"
    shared = torch.arange(6.0)
    torch.save([{"a": shared[:2], "b": shared[2:]}, Data(pos=shared.view(2, 3))], path)
    first, second = read_torch_file(path)
    assert np.array_equal(plain(first["b"]), shared[2:].numpy())
    assert np.array_equal(attributes(second, "here")["pos"], shared.view(2, 3).numpy())
    torch.save(Batch.from_data_list([Data(**record()), Data(**record())]), path)
    assert isinstance(read_torch_file(path), PickledObject)


def reduced_storage(tensor: torch.Tensor) -> bytes:
    """What PyTorch writes of the storage inside a pickle."""
    data = pickle.dumps(tensor, protocol=4)
    return next(arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, bytes))


def storage_pickle(payload: Any, size: Any = (4,), stride: Any = (1,), offset: Any = 0) -> bytes:
    """A tensor built from a storage's bytes, with any sizes."""
    storage = Reduced(torch.storage._load_from_bytes, payload)
    hooks: dict[str, Any] = collections.OrderedDict()
    tensor = Reduced(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, hooks)
    return pickle.dumps(tensor, protocol=4)


class WithState:
    """Runs when its state is set, if anything does."""

    def __init__(self, command: str = "") -> None:
        self.command = command

    def __setstate__(self, state: Any) -> None:
        os.system(state["command"])


def attacks(command: str) -> dict[str, tuple[bytes, str]]:
    """Pickles that run the command when they are loaded, with what the refusal names."""
    evil = Reduced(os.system, command)
    argument = pickle.dumps(command, protocol=4)[11:-2]
    payload = pickle.dumps(evil, protocol=4)
    call = argument + b"\x85R."
    zipped = io.BytesIO()
    torch.save(torch.zeros(1), zipped)
    return {
        "reduce": (payload, "names 'posix.system'"),
        "reduce, protocol 2": (pickle.dumps(evil, protocol=2), "names 'posix.system'"),
        "reduce, protocol 0": (pickle.dumps(evil, protocol=0), "names 'posix.system'"),
        "in a record": (pickle.dumps(Data(pos=evil), protocol=4), "names 'posix.system'"),
        "eval": (pickle.dumps(Reduced(builtins.eval, f"__import__('os').system({command!r})")), "'builtins.eval'"),
        "partial": (pickle.dumps(functools.partial(os.system, command)), "'functools.partial'"),
        "new object": (b"\x80\x02csubprocess\nPopen\n" + argument + b"\x85\x81.", "'subprocess.Popen'"),
        "new object of ours": (stack_global("torch_geometric.data.data", "Data", argument + b"\x85\x81."), "damaged"),
        "own state": (pickle.dumps(WithState(command)), "WithState'"),
        "state of a function": (
            stack_global("torch._utils", "_rebuild_tensor_v2", b"N}\x8c\x05_call" + argument + b"s\x86b."),
            "sets the state of a function",
        ),
        "attributes of a class": (
            stack_global("torch_geometric.data.data", "Data", b"N}\x8c\x08__init__" + argument + b"s\x86b."),
            "damaged",
        ),
        "state of a tensor": (pickle.dumps(torch.zeros(1), protocol=4)[:-1] + b"N}\x86b.", "sets the state of a"),
        "storage": (pickle.dumps(Reduced(torch.storage._load_from_bytes, payload)), "does not begin like"),
        "storage after the header": (
            pickle.dumps(Reduced(torch.storage._load_from_bytes, HEADER + payload)),
            "names 'posix.system'",
        ),
        "storage within a storage": (
            pickle.dumps(Reduced(torch.storage._load_from_bytes, HEADER + storage_pickle(payload))),
            "names 'torch._utils._rebuild_tensor_v2'",
        ),
        "storage that is a zip": (
            pickle.dumps(Reduced(torch.storage._load_from_bytes, zipped.getvalue())),
            "does not begin like",
        ),
        "torch.load": (pickle.dumps(Reduced(torch.load, "file")), "'torch.serialization.load'"),
        "object array": (pickle.dumps(np.array([evil], dtype=object), protocol=4), r"type 'O8'"),
        "object scalar": (
            stack_global("numpy.core.multiarray", "scalar", b"cnumpy\ndtype\n\x8c\x01O\x85RC\x08abcdefgh\x86R."),
            "type 'O'",
        ),
        "array from text": (
            pickle.dumps(np.zeros(2), protocol=4).replace(b"f8", b"V8"),
            "type 'V8'",
        ),
        "dotted": (stack_global("torch_geometric.data.data", "Data.__init__.__globals__"), "Data.__init__.__globals__"),
        "dotted module": (stack_global("collections", "OrderedDict.__class__", call), "OrderedDict.__class__"),
        "private": (stack_global("escaip.data.readers.pickled", "os"), "pickled.os"),
        "line break": (stack_global("os\n", "system\n", call), r"'os\\n.system\\n'"),
        "inst": (b"\x80\x02(" + argument + b"ios\nsystem\n.", "names 'os.system'"),
        "obj": (b"\x80\x02(cos\nsystem\n" + argument + b"o.", "names 'os.system'"),
        "extension": (b"\x80\x02\x82\x01.", "unregistered extension"),
        "named reference": (b"\x80\x02Psomething\n.", "refers to a storage outside itself"),
        "reference": (b"\x80\x02" + argument + b"Q.", "refers to a storage outside itself"),
        "calls text": (b"\x80\x04" + argument + call, "damaged"),
        "bytes of 9 EB": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "damaged"),
        "bytearray of 9 EB": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "damaged"),
        "expanded to 8 EB": (storage_pickle(reduced_storage(torch.zeros(1)), (2**60,), (0,)), "expanded from 1"),
        "not a pickle": (b"\x7fELF" + b"\0" * 60, "damaged"),
        "empty": (b"", "damaged"),
        "two pickles": (pickle.dumps(1) + payload, "bytes after its end"),
    }  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize("name", attacks(""))
def test_attacks_run_nothing_and_give_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    data, expected = attacks(f"touch {mark}")[name]
    for module, call in ((os, "system"), (subprocess, "Popen"), (builtins, "eval"), (torch, "load")):
        monkeypatch.setattr(module, call, lambda *_, **__: mark.touch())
    with pytest.raises(DataError, match=expected) as caught:
        unpickle(data, "file.lmdb: key 3")
    monkeypatch.undo()
    text = str(caught.value)
    assert text.startswith("file.lmdb: key 3: ")
    assert "\n" not in text
    assert len(text) < 400
    assert not mark.exists()


@pytest.mark.parametrize("name", ["reduce", "reduce, protocol 2", "in a record", "eval", "own state", "object array"])
def test_the_attacks_are_attacks(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with contextlib.suppress(Exception):
        pickle.loads(attacks(f"touch {mark}")[name][0])
    assert mark.exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["reduce, protocol 2", "new object", "own state", "dotted", "inst", "bytes of 9 EB"])
def test_attacks_in_torch_files(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    data, expected = attacks(f"touch {mark}")[name]
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", data)
    with pytest.raises(DataError, match=expected):
        read_torch_file(path)
    assert not mark.exists()


def test_attacks_leave_nothing_behind() -> None:
    for data, _ in attacks("true").values():
        with pytest.raises(DataError):
            unpickle(data, "here")
    test_both_generations_and_plain_dicts_are_the_same()
    test_tensors_of_every_type_and_stride()


@pytest.mark.bad_input
def test_no_memory_is_taken_for_what_a_pickle_only_claims() -> None:
    tracemalloc.start()
    assert unpickle(b"\x80\x02Nr\0\0\0\x01.", "here") is None  # a place in the memo beyond 16 million others
    with pytest.raises(DataError, match="damaged"):
        unpickle(b"\x80\x05\x96" + (1 << 28).to_bytes(8, "little") + b".", "here")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("size", "stride", "offset", "expected"),
    [
        ((5,), (1,), 0, r"of shape \(5,\) that reaches beyond its 4 numbers"),
        ((2, 3), (3, 1), 0, "reaches beyond"),
        ((4,), (1,), 1, "reaches beyond"),
        ((2,), (2**62,), 0, "reaches beyond"),
        ((2,), (1,), -1, "an offset"),
        ((2,), (-1,), 3, "no natural numbers"),
        ((-1,), (1,), 0, "no natural numbers"),
        ((2, 2), (1,), 0, "sizes and strides"),
        ((1.5,), (1,), 0, "no natural numbers"),
        ((True,), (1,), 0, "no natural numbers"),
        ([4], (1,), 0, "no natural numbers"),
        ((1,) * 9, (1,) * 9, 0, "no natural numbers"),
        ("four", (1,), 0, "no natural numbers"),
    ],
)
def test_tensors_stay_within_their_storage(size: Any, stride: Any, offset: int, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        unpickle(storage_pickle(reduced_storage(torch.arange(4.0)), size, stride, offset), "here")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data[:-1], "15 bytes, expected 4 numbers"),
        (lambda data: data + b"\0", "17 bytes, expected 4 numbers"),
        (lambda data: data[:-24] + struct.pack("<q", 2**61) + data[-16:], "in two ways"),
        (lambda data: data[:-24] + struct.pack("<q", -1) + data[-16:], "in two ways"),
        (lambda data: data[: len(HEADER) + 40], "damaged"),
        (lambda data: HEADER.replace(b"\x88", b"\x89") + data[len(HEADER) :], "little-endian machines"),
        (lambda data: data.replace(b"FloatStorage", b"UnknownOne12"), "'torch.UnknownOne12'"),
        (lambda data: "text", "does not begin like"),
    ],
)
def test_malformed_storages(change: Callable[[bytes], Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        unpickle(storage_pickle(change(reduced_storage(torch.arange(4.0)))), "here")


@pytest.mark.bad_input
def test_malformed_numpy_arrays() -> None:
    data = pickle.dumps(np.arange(4.0), protocol=4)
    assert data.count(b"K\x04\x85") == 1
    with pytest.raises(DataError, match=r"of shape \(5,\) made of 32 bytes"):
        unpickle(data.replace(b"K\x04\x85", b"K\x05\x85"), "here")


@pytest.mark.bad_input
def test_torch_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "made.pt"
    torch.save({"a": torch.arange(8.0)}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"made\.pt: ") as caught:
            read_torch_file(path)
        assert "\n" not in str(caught.value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no pickle")
    with pytest.raises(DataError, match=r"zip without a data\.pkl"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("made/data.pkl", b"\x80\x02N" + b"0N" * 100_000 + b".")
    with pytest.raises(DataError, match="compressed entry"):
        read_torch_file(path)
    torch.save({"a": torch.arange(8.0)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"PyTorch 1\.6 or newer"):
        read_torch_file(path)


@pytest.mark.bad_input
def test_values_that_are_no_records() -> None:
    for value in (3, [1], {1: 2}, {"_store": PickledObject()}, None):
        with pytest.raises(DataError, match=r"here: holds a .*expected a PyTorch Geometric record or a dict"):
            attributes(value, "here")


WHOLE = pickle.dumps({"pos": torch.arange(6.0).view(2, 3), "y": np.float64(1.0), "sid": 7}, protocol=4)


@pytest.mark.bad_input
def test_every_truncation_gives_one_line() -> None:
    for length in range(len(WHOLE)):
        with pytest.raises(DataError):
            unpickle(WHOLE[:length], "here")


@pytest.mark.bad_input
@given(at=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255), second=st.integers(0, len(WHOLE) - 1))
def test_damage_gives_a_value_or_one_line(at: int, value: int, second: int) -> None:
    data = bytearray(WHOLE)
    data[at] = value
    data[second] ^= 0x10
    with contextlib.suppress(DataError):
        attributes(unpickle(bytes(data), "here"), "here")
