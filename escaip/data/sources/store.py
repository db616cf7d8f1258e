"""A prepared store as a source, for conversion and inspection."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from escaip.data.labels import LabelKeys
from escaip.data.sources.door import Door
from escaip.errors import ConfigError

if TYPE_CHECKING:
    from escaip.data.atomic_data import AtomicData


def read_store(
    path: Path, door: Door, *, name: str | None = None, keys: LabelKeys | None = None
) -> Iterator[AtomicData]:
    """Structures of a prepared store; ids are those stored, units are always Å and eV.

    Raises:
        DataError: a damaged store.
        ConfigError: units or label keys were stated.
    """
    from escaip.data.store import Store

    if keys is not None or door.stated_units is not None:
        raise ConfigError(f"{path}: a prepared store takes neither keys nor units; state them when preparing it")
    store = Store(path)
    for index in range(len(store)):
        data = door.admit(partial(store.__getitem__, index))
        if data is not None:
            yield data
