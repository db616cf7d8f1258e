"""What tests share: stores and LMDB files of given content, and refusals in one line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch

from escaip.data import AtomicData, Store, StoreWriter
from escaip.data.readers.policy import Part, ReadPolicy, ReadReport
from escaip.data.structure import TENSOR_FIELDS
from escaip.errors import DataError


def names(folder: Path) -> list[str]:
    """What is in a folder; nothing where there is none."""
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


@contextmanager
def refusal(message: str) -> Iterator[pytest.ExceptionInfo[DataError]]:
    """A DataError of one line."""
    with pytest.raises(DataError, match=message) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def assert_bad(read: Callable[[ReadPolicy], list[AtomicData]], message: str, *, kept: int = 1, skipped: int = 1) -> str:
    """Reading stops with one line, which is returned, or leaves out and counts what is bad."""
    with refusal(message) as caught:
        read(ReadPolicy())
    report = ReadReport()
    assert len(read(ReadPolicy(on_error="skip", report=report))) == report.read == kept
    assert report.skipped == skipped
    return str(caught.value)


def assert_parts(
    path: Path, divide: Callable[[Path, int], list[Part]], read: Callable[..., list[AtomicData]], *sizes: int,
    most: Callable[[int], float] = float,
) -> None:  # fmt: skip
    """Parts for each size, read one after the other, are the whole; none has more structures than ``most(size)``."""
    whole = read(path)
    for size in sizes:
        pieces = [read(path, part=part) for part in divide(path, size)]
        assert max(map(len, pieces)) <= most(size)
        for data, same in zip(itertools.chain(*pieces), whole, strict=True):
            assert data.structure_id == same.structure_id
            assert torch.equal(data.forces.nan_to_num(-9.0), same.forces.nan_to_num(-9.0))


def assert_same(a: AtomicData, b: AtomicData) -> None:
    for key in TENSOR_FIELDS:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key].nan_to_num(-9.0), b[key].nan_to_num(-9.0)), key
    assert (a.structure_id, a.group, a.num_nodes) == (b.structure_id, b.group, b.num_nodes)


def write_store(path: Path, structures: Iterable[AtomicData], **options: Any) -> Store:
    with StoreWriter(path, **options) as writer:
        for data in structures:
            writer.write(data)
    return Store(path)


def write_lmdb(path: Path, entries: Mapping[bytes, bytes]) -> Path:
    """Writes entries as they are."""
    environment = lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 24)
    with environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path
