"""Training, validation and test sets that share no group, and nested parts of a training set."""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from escaip.data.validation import check_choice
from escaip.errors import ConfigError, DataError

Indices = NDArray[np.int64]
TrainSize = int | float
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class SplitSettings:
    """Sizes of the parts of a set.

    Attributes:
        by: ``"group"`` keeps groups whole; ``"structure"`` ignores groups, for sets that are one molecule.
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
        check_choice("split: by", settings.by, ("group", "structure"))
        for key in ("val", "test"):
            value = getattr(settings, key)
            if not isinstance(value, int | float) or value < 0 or (value >= 1 and value != int(value)):
                raise ConfigError(f"split: {key}: {value!r} is neither a fraction below 1 nor a number of structures")
        return settings


def divide(
    names: Sequence[str], codes: NDArray[np.integer[Any]], settings: SplitSettings, *, seed: int = 0
) -> NDArray[np.uint8]:
    """Returns ``(num_structures,)`` the position in ``PARTS`` of each structure's set.

    It is the same for the same names, settings and seed. Groups are taken in the order of a hash of seed and name; one
    goes to the test set, else to the validation set, when it still fits in whole, else to the training set. A set that
    stayed empty gets the smallest group left. ``codes (num_structures,)`` are positions among the groups' distinct
    ``names``.

    Raises:
        DataError: no structures, or too few groups for the sets asked for.
    """
    count = len(codes)
    if count == 0:
        raise DataError("split: 0 structures to divide; check the source and its filters")
    if settings.by == "structure":
        names, codes = [str(index) for index in range(count)], np.arange(count)
    counts = np.bincount(codes, minlength=len(names))
    held = np.flatnonzero(counts).tolist()
    room = {part: _size(getattr(settings, part), count) for part in ("test", "val")}
    parts = [part for part, size in room.items() if size > 0]
    if len(held) < len(parts) + 1:
        unit = "groups" if settings.by == "group" else "structures"
        raise DataError(
            f"split: {len(held)} {unit} ({', '.join(names[code] for code in held[:3])}) cannot make {len(parts) + 1} "
            "sets; name a separate validation file, or split by: structure if conformations of one molecule may be "
            "divided"
        )
    chosen: dict[str, list[int]] = {part: [] for part in PARTS}
    for code in sorted(held, key=lambda code: hashlib.sha256(f"{seed}:{names[code]}".encode()).digest()):
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
    for part, members in chosen.items():
        assigned[members] = PARTS.index(part)
    return assigned[codes]


def _size(value: float, count: int) -> int:
    if value == 0:
        return 0
    size = int(value) if value >= 1 else max(1, round(value * count))
    if size >= count:
        raise DataError(f"split: {size} structures asked for one set, but there are {count} in all; ask for fewer")
    return size


def parse_train_size(value: Any, *, mixed: bool = False) -> TrainSize | None:
    """Returns a fraction below 1 as a float, a number of structures as an int, None for everything (``1.0`` as well).

    Of several sets by name (``mixed``) only a fraction can be taken.
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


class Groups(Protocol):
    """The part of a data set that ``nested_subset`` needs: its length, groups, and a random order."""

    def __len__(self) -> int: ...

    @property
    def group_codes(self) -> tuple[list[str], NDArray[np.integer[Any]]]:
        """Names of groups, each once, and ``(len,)`` the position of each structure's among them."""

    def random_keys(self, seed: int) -> NDArray[np.uint64]:
        """Returns ``(len,)`` pseudo-random numbers of seed and position, all different."""


def nested_subset(
    data: Groups, size: TrainSize, *, by: str = "group", seed: int = 0, place: str = "data.train"
) -> Indices:
    """Returns ascending positions in a training set of at most ``size`` of its structures.

    They come first in one random order of the training set, cut before the first that would be too many, so that for
    one seed a smaller part is contained in every larger one. The order hashes seed and position, or seed and names of
    groups (``group_order``); it is independent of the hash that divides off validation and test sets, so that
    larger ones of those only take out their own structures.

    ``size`` is a fraction below 1 of the structures, rounded down, or a number of them; more than there are is all.
    Groups stay whole unless ``by`` is ``"structure"``. Messages call the set ``place``.

    Raises:
        DataError: less than one structure, or less than the smallest group.
    """
    count = len(data)
    room = min(size if isinstance(size, int) else int(Fraction(repr(float(size))) * count), count)
    if room < 1:
        raise DataError(f"{place}: train_size: {size} of {count} structures is less than one; ask for more")
    if by == "structure":
        return np.sort(np.argsort(data.random_keys(seed), kind="stable")[:room])
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
    """Yields the positions of groups that have structures, in the order in which subsets take them.

    The order is that of a hash of seed and name, but a group larger than all before it together waits until it is not;
    when all groups left are larger, the smallest is next. So the smallest group is first, and where the next group has
    no room, more than half of the size asked for is taken, unless every group left is larger than all taken together.
    Taking later groups that still have room would fill better, but not be nested.

    Groups have distinct ``names`` and ``counts (num_groups,)`` structures.
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


def random_keys(positions: Indices, seed: int, name: str = "") -> NDArray[np.uint64]:
    """Returns ``(n,)`` pseudo-random numbers of seed and position in a list or store, different for all positions.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, doi:10.1145/2660193.2660195) of the position, started at a hash of
    the seed and, in a list of several stores, the name of the store.
    """
    start = np.uint64(int.from_bytes(_digest(seed, name)[:8], "little"))
    key = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def _digest(seed: int, name: str) -> bytes:
    """Hashes another text than the division does, which would take away the first of every subset."""
    return hashlib.sha256(f"train_size:{seed}:{name}".encode()).digest()
