"""A prepared store, for conversion and inspection."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from escaip.data.readers.policy import Part, Reader, ReadPolicy, Record, ranges
from escaip.data.store import Store, is_store
from escaip.data.structure import AtomicData
from escaip.errors import ConfigError


def read_store(
    path: Path, name: str, policy: ReadPolicy, *, part: Part | None = None, split: str | None = None
) -> Iterator[AtomicData]:
    """Yields the structures of a store, or those of a ``split``; ids and units are those stored.

    Raises:
        DataError: a damaged store.
        ConfigError: units were stated, or there is no such split.
    """
    if policy.units is not None:
        raise ConfigError(f"{path}: a prepared store takes no units; state them when preparing it")
    store = Store(path)
    chosen = range(*(part or (0, len(store)))) if split is None else store.split_indices(split).tolist()
    yield from policy.admit(Record(partial(store.__getitem__, index)) for index in chosen)


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of ``size`` structures."""
    return ranges(len(Store(path)), size)


READER = Reader("store", read_store, lambda path, head: is_store(path), divide, lambda path: [path])
