"""Nested parts of a training set, for learning curves and scaling laws: each contains all smaller ones."""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.mixing import MixedDataset, StructureSet
from escaip.errors import ConfigError, DataError

Indices = NDArray[np.int64]
TrainSize = int | float


def parse_train_size(value: Any, *, mixed: bool = False) -> TrainSize | None:
    """A fraction below 1 as a float, a number of structures as an int, None for everything (``1.0`` as well).

    Args:
        value: as configured.
        mixed: whether it is for several sets by name.

    Raises:
        ConfigError: neither a fraction nor a whole number, or a number for a mixture.
    """
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not value > 0 or (value > 1 and value % 1 != 0):  # inf % 1 is NaN
        raise ConfigError(f"train_size: {value!r} is neither a fraction up to 1.0 nor a whole number of structures")
    if isinstance(value, float) and value <= 1:
        return value if value < 1 else None
    if mixed:
        raise ConfigError(
            f"train_size: {value!r}: a number does not say how many of each set; for several sets by name give a "
            "fraction, which is taken of each"
        )
    return int(value)


def nested_subset(
    data: StructureSet, size: TrainSize, *, by: str = "group", seed: int = 0, place: str = "data.train"
) -> Indices:
    """Ascending positions in a training set of at most ``size`` of its structures.

    They come first in one order of the training set, cut where the next would be too many, so that for one seed a
    smaller part is contained in every larger one. The order is that of a hash of the seed and a structure's position in
    the set as it is named, or of the seed and the names of groups (see :func:`group_order`). It has nothing to do with
    the hash that divides off validation and test sets: when those grow, the structures they take are missing in the
    order, and the others follow.

    Args:
        data: the training set.
        size: fraction below 1 of its structures, rounded down, or a number of them; more than there are is all.
        by: ``"group"`` takes groups whole, ``"structure"`` ignores them.
        seed: of the hash.
        place: where the set stands in the configuration, for messages.

    Raises:
        DataError: less than one structure, or less than the smallest group.
    """
    count = len(data)
    room = min(size if isinstance(size, int) else int(Fraction(repr(float(size))) * count), count)
    if room < 1:
        raise DataError(f"{place}: train_size: {size} of {count} structures is less than one; ask for more")
    if by == "structure":
        return np.sort(np.argsort(structure_keys(data, seed), kind="stable")[:room])
    names, codes = data.group_codes
    counts = np.bincount(codes, minlength=len(names))
    chosen = np.zeros(len(names), dtype=bool)
    for code in group_order(names, counts, seed=seed):
        if counts[code] > room:
            break
        chosen[code] = True
        room -= int(counts[code])
    if not chosen.any():
        raise DataError(
            f"{place}: train_size: the smallest group ({names[code]}) has {counts[code]} structures, but {room} of "
            f"{count} are asked for; ask for more, or set data.split.by: structure if groups may be divided"
        )
    return np.flatnonzero(chosen[codes])


def group_order(names: Sequence[str], counts: NDArray[Any], *, seed: int = 0) -> Iterator[int]:
    """Positions of the groups that have structures, in the order in which subsets take them.

    It is that of a hash of seed and name, but a group larger than all before it together waits until it is not; when
    all that are left are larger, the smallest is next. So the smallest group is first, and where the next group has no
    room, more than half of what was asked for is taken, unless every group left is larger than all taken together.
    To leave out the group that has no room for a later one that has would fill better, but not be nested.

    Args:
        names: of the groups, each once.
        counts: ``(num_groups,)`` structures in each.
        seed: of the hash.
    """
    ranked = sorted(np.flatnonzero(counts).tolist(), key=lambda code: _digest(seed, names[code]))
    sizes = [int(counts[code]) for code in ranked]
    waiting = deque(sorted(range(len(ranked)), key=sizes.__getitem__))  # stable: equal sizes stay in hash order
    ready: list[int] = []
    taken = 0
    while waiting or ready:
        limit = taken if ready else max(taken, sizes[waiting[0]])
        while waiting and sizes[waiting[0]] <= limit:
            heapq.heappush(ready, waiting.popleft())
        rank = heapq.heappop(ready)
        taken += sizes[rank]
        yield ranked[rank]


def structure_keys(data: StructureSet, seed: int, name: str = "") -> NDArray[np.uint64]:
    """``(len,)`` pseudo-random numbers of (seed, position in the list or store), different for all of one of these.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, doi:10.1145/2660193.2660195) of the position, started at a hash of
    the seed and, in a list of several stores, the name of the store.
    """
    if isinstance(data, MixedDataset):
        return np.concatenate([structure_keys(member, seed, name) for name, member in data.members.items()])
    start = np.uint64(int.from_bytes(_digest(seed, name)[:8], "little"))
    key = data.indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def _digest(seed: int, name: str) -> bytes:
    """Of another text than those by which sets are divided, which would take away the first of every subset."""
    return hashlib.sha256(f"train_size:{seed}:{name}".encode()).digest()
