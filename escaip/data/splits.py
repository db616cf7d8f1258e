"""Training, validation and test sets that share no molecule, material or system."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escaip.errors import ConfigError, DataError

Indices = NDArray[np.int64]
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class SplitSettings:
    """How to divide a set.

    Attributes:
        by: ``"group"`` never divides a group; ``"structure"`` ignores groups, for sets that are one molecule.
        val: fraction of the structures (below 1) or number of them, at most; 0 for none.
        test: the same.
    """

    by: str = "group"
    val: float = 0.1
    test: float = 0.0

    @classmethod
    def parse(cls, spec: Mapping[str, Any] | SplitSettings | None) -> SplitSettings:
        """Reads a mapping from a configuration.

        Raises:
            ConfigError: an unknown key or an impossible value.
        """
        if isinstance(spec, SplitSettings):
            return spec
        try:
            settings = cls(**dict(spec or {}))
        except TypeError as error:
            raise ConfigError(f"split: {error}; use by, val and test") from error
        if settings.by not in ("group", "structure"):
            raise ConfigError(f"split: by: {settings.by!r} is not group or structure")
        for key in ("val", "test"):
            value = getattr(settings, key)
            if not isinstance(value, int | float) or value < 0 or (value >= 1 and value != int(value)):
                raise ConfigError(f"split: {key}: {value!r} is neither a fraction below 1 nor a number of structures")
        return settings


@dataclass(frozen=True)
class Split:
    """Positions of the structures of each set, ascending.

    Attributes:
        train: ``(n_train,)`` int64.
        val: ``(n_val,)`` int64.
        test: ``(n_test,)`` int64.
    """

    train: Indices
    val: Indices
    test: Indices


def make_split(groups: Sequence[str] | NDArray[Any], settings: SplitSettings, *, seed: int = 0) -> Split:
    """Divides structures, the same way for the same names, settings and seed.

    Groups are taken in the order of a hash of seed and name; one goes to the test set, else to the validation set,
    when it still fits in whole, else to the training set. A set that stayed empty gets the smallest group left.

    Args:
        groups: group of each structure.
        settings: sizes.
        seed: of the hash.

    Raises:
        DataError: no structures, or too few groups for the sets asked for.
    """
    names = [str(index) for index in range(len(groups))] if settings.by == "structure" else [str(g) for g in groups]
    table: dict[str, int] = {}
    codes = np.array([table.setdefault(name, len(table)) for name in names], dtype=np.int64)
    assigned = assign_parts(list(table), np.bincount(codes, minlength=1) if table else codes, settings, seed=seed)
    chosen = assigned[codes]
    return Split(*(np.flatnonzero(chosen == code) for code in range(len(PARTS))))


def assign_parts(
    names: Sequence[str], counts: NDArray[Any], settings: SplitSettings, *, seed: int = 0
) -> NDArray[np.uint8]:
    """``(num_groups,)`` position in :data:`PARTS` of each group: see :func:`make_split`.

    Args:
        names: of the groups, each once.
        counts: ``(num_groups,)`` structures in each.
        settings: sizes.
        seed: of the hash.

    Raises:
        DataError: no structures, or too few groups for the sets asked for.
    """
    count = int(counts.sum()) if len(names) else 0
    if count == 0:
        raise DataError("split: 0 structures to divide; check the source and its filters")
    room = {part: _size(getattr(settings, part), count) for part in ("test", "val")}
    parts = [part for part, size in room.items() if size > 0]
    if len(names) < len(parts) + 1:
        unit = "groups" if settings.by == "group" else "structures"
        raise DataError(
            f"split: {len(names)} {unit} ({', '.join(list(names)[:3])}) cannot make {len(parts) + 1} sets; "
            "name a separate validation file, or split by: structure if conformations of one molecule may be divided"
        )
    keys = [(hashlib.sha256(f"{seed}:{name}".encode()).digest(), name, code) for code, name in enumerate(names)]
    chosen: dict[str, list[int]] = {part: [] for part in PARTS}
    for _, _, code in sorted(keys):
        size = int(counts[code])
        part = next((part for part in parts if size <= room[part]), "train")
        chosen[part].append(code)
        if part != "train":
            room[part] -= size
    for part in parts:
        if not chosen[part]:
            smallest = min(chosen["train"], key=lambda code: int(counts[code]))
            chosen["train"].remove(smallest)
            chosen[part].append(smallest)
    if not chosen["train"]:
        raise DataError("split: val and test take every structure and leave none to train on; make them smaller")
    assigned = np.zeros(len(names), dtype=np.uint8)
    for part, codes in chosen.items():
        assigned[codes] = PARTS.index(part)
    return assigned


def _size(value: float, count: int) -> int:
    if value == 0:
        return 0
    size = int(value) if value >= 1 else max(1, round(value * count))
    if size >= count:
        raise DataError(f"split: {size} structures asked for one set, but there are {count} in all; ask for fewer")
    return size
