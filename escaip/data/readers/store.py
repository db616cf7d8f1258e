"""A prepared store as a source, for conversion and inspection."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from escaip.data.readers.policy import Part, Reader, ReadPolicy
from escaip.data.structure import LabelKeys
from escaip.errors import ConfigError

if TYPE_CHECKING:
    from escaip.data.structure import AtomicData


def read_store(
    path: Path,
    policy: ReadPolicy,
    *,
    name: str | None = None,
    keys: LabelKeys | None = None,
    part: Part | None = None,
    split: str | None = None,
) -> Iterator[AtomicData]:
    """Structures of a prepared store, all or those of a ``part`` or ``split``; ids are those stored, in Å and eV.

    Raises:
        DataError: a damaged store.
        ConfigError: units or label keys were stated, or there is no such split.
    """
    from escaip.data.store import Store

    if keys is not None or policy.stated_units is not None:
        raise ConfigError(f"{path}: a prepared store takes neither keys nor units; state them when preparing it")
    store = Store(path)
    chosen = range(*(part or (0, len(store)))) if split is None else store.split_indices(split).tolist()
    for index in chosen:
        data = policy.admit(partial(store.__getitem__, index))
        if data is not None:
            yield data


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of about ``size`` structures."""
    from escaip.data.store import Store

    count = len(Store(path))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def matches(path: Path, head: bytes) -> bool:
    """A directory with a manifest."""
    return (path / "manifest.json").is_file()


READER = Reader("store", "a prepared store", read_store, matches, parts=divide, expand=lambda path: [path])
