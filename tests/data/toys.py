"""What tests share: stores and LMDB files of given content, and refusals in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest

from escaip.data import AtomicData, Store, StoreWriter
from escaip.data.readers.policy import ReadPolicy, ReadReport
from escaip.errors import DataError


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
