"""Batches under an atom and an edge budget, repacked every epoch, the same number on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from escaip.data.validation import check_choice
from escaip.errors import ConfigError, DataError

OVERSIZED = ("error", "skip", "own_batch")
Indices = NDArray[np.int64]
_EXACT_PACKING = 20_000
"""Up to this many structures a packing of every order is guaranteed (see BudgetBatchSampler)."""


def estimate_edges(
    natoms: ArrayLike,
    periodic: ArrayLike | bool,
    num_neighbors: int | None,
    counted: ArrayLike | None = None,
) -> NDArray[np.int64]:
    """Returns ``(num_structures,)`` a cheap bound on the edges: ``n·k``, or ``n·min(k, n − 1)`` without images.

    Args:
        natoms: ``(num_structures,)`` atoms.
        periodic: ``(num_structures,)`` whether any axis is periodic.
        num_neighbors: ``k`` of the graph; None for all pairs (``k`` = 64 with images).
        counted: ``(num_structures,)`` pairs within 6 Å, as a prepared store holds them; where given, the smaller of
            them and ``n·k`` is the estimate.
    """
    n = np.asarray(natoms, dtype=np.int64)
    if counted is not None:
        pairs = np.asarray(counted, dtype=np.int64)
        return pairs if num_neighbors is None else np.minimum(pairs, n * num_neighbors)
    k = np.int64(64 if num_neighbors is None else num_neighbors)
    alone = n - 1 if num_neighbors is None else np.minimum(k, n - 1)
    return n * np.where(np.asarray(periodic, dtype=bool), k, alone)


@dataclass(frozen=True)
class Quota:
    """Structures ``start <= k < stop`` are one set, of which an epoch draws ``draws``.

    A set is gone through in random order before any structure of it comes again, over as many epochs as it takes.
    """

    start: int
    stop: int
    draws: int


@dataclass(frozen=True)
class Sampling:
    """Share of each set of a mixture in an epoch.

    Attributes:
        weights: share of each set by name, in any unit; None for shares from ``temperature``.
        temperature: shares proportional to ``N^(1/temperature)`` for sets of ``N`` structures: 1 takes sets as large
            as they are, infinity all alike (Devlin et al., multilingual BERT; Conneau et al., arXiv 1911.02116).
        epoch_size: structures in an epoch; None for as many as there are.
    """

    weights: Mapping[str, float] | None = None
    temperature: float = 1.0
    epoch_size: int | None = None

    @classmethod
    def parse(cls, spec: Mapping[str, Any] | Sampling | None) -> Sampling:
        """Reads a mapping from a configuration.

        Raises:
            ConfigError: an unknown key or an impossible value.
        """
        if isinstance(spec, Sampling):
            return spec
        known = [item.name for item in fields(cls)]
        for key in spec or {}:
            if key not in known:
                raise ConfigError(f"sampling: unknown setting {key!r}; use {', '.join(known)}")
        settings = cls(**dict(spec or {}))
        if settings.weights is not None and any(not weight > 0 for weight in settings.weights.values()):
            raise ConfigError(f"sampling: weights: {dict(settings.weights)} must be positive; leave a set out instead")
        if not settings.temperature > 0:
            raise ConfigError(f"sampling: temperature: {settings.temperature} is not a positive number")
        if settings.epoch_size is not None and settings.epoch_size < 1:
            raise ConfigError(f"sampling: epoch_size: {settings.epoch_size} is not a positive number")
        return settings

    def check(self, names: Sequence[str]) -> None:
        """Refuses weights for other sets than there are.

        Raises:
            ConfigError: a set without a weight, or a weight without a set.
        """
        if self.weights is not None and set(self.weights) != set(names):
            raise ConfigError(f"sampling: weights name {', '.join(self.weights)}, but the sets are {', '.join(names)}")

    def draws(self, sizes: Mapping[str, int]) -> dict[str, int] | None:
        """Returns the structures of each set in an epoch; None when an epoch is simply every structure once."""
        if self.weights is None and self.temperature == 1.0 and self.epoch_size is None:
            return None
        if self.weights is not None:
            shares = np.array([self.weights[name] for name in sizes])
        else:
            shares = np.array([float(size) for size in sizes.values()]) ** (1.0 / self.temperature)
        total = self.epoch_size or sum(sizes.values())
        counts = np.maximum(1, np.round(total * shares / shares.sum())).astype(int)
        return dict(zip(sizes, counts.tolist(), strict=True))


class BudgetBatchSampler(Sampler[list[int]]):
    """Batches of indices whose atoms, edges and number stay within budgets.

    Every epoch shuffles the structures, packs them in that order and deals the batches to the ranks. The number of
    batches is the same in every epoch and on every rank, so that ``len`` can be relied upon: when an epoch packs
    tighter, its largest batches are split; when it packs looser, structures of the smallest batches fill the gaps
    of others, and as a last resort all are packed by decreasing size. Nothing is repeated or dropped, except that

    - up to ``world_size − 1`` structures repeat when there are fewer structures than batches are needed to give every
      rank the same number, as with fewer structures than ranks;
    - beyond 20 000 structures, or with quotas, the last resort is not guaranteed; what it leaves out is counted in
      ``left_out``.

    Batches depend on ``(seed, epoch)`` alone; rank ``r`` of ``W`` gets those at ``r, r + W, ...``.

    Attributes:
        epoch: the one that the next iteration packs.
        skipped: indices larger than a budget, left out under ``oversized="skip"``.
        left_out: structures that found no batch in the epoch packed last (see above).
    """

    def __init__(
        self,
        natoms: ArrayLike,
        *,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        batch_size: int | None = None,
        num_edges: ArrayLike | None = None,
        names: Sequence[str] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        oversized: str = "error",
        quotas: Sequence[Quota] | None = None,
    ) -> None:
        """Plans the batches.

        Args:
            natoms: ``(num_structures,)`` atoms of each structure.
            max_atoms: atoms per batch and rank.
            max_edges: edges per batch and rank; needs ``num_edges``.
            batch_size: structures per batch and rank, without a budget.
            num_edges: ``(num_structures,)`` exact or estimated edges (``estimate_edges``).
            names: of the structures, for messages.
            shuffle: a new order every epoch; False keeps the order given.
            seed: of the order.
            rank: of this process.
            world_size: number of processes.
            oversized: policy for a structure larger than a budget: ``"error"``, ``"skip"`` or ``"own_batch"``.
            quotas: how many structures of each set an epoch takes, for sets that are mixed; shuffles always.

        Raises:
            ConfigError: no budget, a budget below 1, ``batch_size`` beside a budget, an unknown policy, an
                impossible rank.
            DataError: no structures, or one larger than a budget under ``oversized="error"``.
        """
        budgets = _budgets(max_atoms, max_edges, batch_size, num_edges)
        check_choice("oversized", oversized, OVERSIZED)
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is outside 0..{world_size - 1}")
        atoms = np.asarray(natoms, dtype=np.int64).reshape(-1)
        if len(atoms) == 0:
            raise DataError("sampler: 0 structures to make batches of; check the data set, its filters and split")
        columns = {"structures": np.ones_like(atoms), "atoms": atoms}
        if max_edges is not None:
            columns["edges"] = np.asarray(num_edges, dtype=np.int64).reshape(-1)
        keys = [key for key in columns if key in budgets]
        sizes = np.stack([columns[key] for key in keys], axis=1)
        budget = np.array([budgets[key] for key in keys], dtype=np.int64)
        self._seed, self._shuffle, self._rank, self._world_size = seed, shuffle or quotas is not None, rank, world_size
        self._quotas = quotas
        large = np.flatnonzero((sizes > budget).any(axis=1))
        if len(large) and oversized == "error":
            raise DataError(_oversized_message(int(large[0]), sizes, budget, keys, names))
        self.skipped: list[int] = large.tolist() if oversized == "skip" else []
        self._usable = np.setdiff1d(np.arange(len(atoms)), self.skipped)
        if len(self._usable) == 0:
            raise DataError("sampler: 0 structures are left, all are larger than the budget; raise max_atoms")
        sizes[large] = budget  # what may travel though oversized fills a batch alone
        self._sizes = Sizes(sizes, budget)
        self.epoch = 0
        self.left_out = 0
        self._num_batches = self._plan()
        self._cache: tuple[int, list[Indices]] | None = None

    @property
    def sampler(self) -> BudgetBatchSampler:
        """This sampler; Lightning calls ``set_epoch`` on ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration packs."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        """Batches per rank, the same in every epoch."""
        return self._num_batches // self._world_size

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches(self.epoch))

    def batches(self, epoch: int) -> list[Indices]:
        """Returns this rank's batches of one epoch, each ``(B,)`` int64."""
        if self._cache is None or self._cache[0] != epoch:
            packed = self._pack(epoch)
            self._cache = (epoch, packed[self._rank :: self._world_size])
        return self._cache[1]

    def _order(self, epoch: int) -> Indices:
        if self._quotas is not None:
            drawn = [self._draw(number, quota, epoch) for number, quota in enumerate(self._quotas)]
            return np.random.default_rng([self._seed, epoch]).permutation(np.concatenate(drawn))
        if not self._shuffle:
            return self._usable
        return np.random.default_rng([self._seed, epoch]).permutation(self._usable)

    def _draw(self, number: int, quota: Quota, epoch: int) -> Indices:
        """Returns this epoch's structures of one set: the next ones of an endless row of its permutations."""
        members = self._usable[(self._usable >= quota.start) & (self._usable < quota.stop)]
        if len(members) == 0:
            raise DataError("sampler: 0 structures of one of the sets fit the budget; raise max_atoms")
        first, last = epoch * quota.draws, (epoch + 1) * quota.draws
        blocks = range(first // len(members), -(-last // len(members)))
        row = [np.random.default_rng([self._seed, number, block, 2]).permutation(members) for block in blocks]
        offset = first - blocks.start * len(members)
        return np.concatenate(row)[offset : offset + quota.draws]

    def _plan(self) -> int:
        """Returns the number of batches on all ranks, a multiple of the number of ranks."""
        count = len(pack(self._order(0), self._sizes))
        if self._shuffle and not self._sizes.uniform(self._usable):
            if len(self._usable) <= _EXACT_PACKING and self._quotas is None:
                count = max(count, len(sorted_pack(self._usable, self._sizes)))
            else:
                count += -(-count // 200)
        return -(-count // self._world_size) * self._world_size

    def _pack(self, epoch: int) -> list[Indices]:
        order = self._order(epoch)
        missing = self._num_batches - len(order)
        if missing > 0:
            order = np.concatenate([order, np.resize(order, missing)])
        batches = pack(order, self._sizes)
        self.left_out = 0
        if len(batches) > self._num_batches:
            squeezed = self._sizes.squeeze(batches, self._num_batches)
            batches = sorted_pack(order, self._sizes) if squeezed is None else squeezed
            self.left_out = sum(len(batch) for batch in batches[self._num_batches :])
            batches = batches[: self._num_batches]
        batches = split_to_count(batches, self._num_batches, self._sizes)
        if not self._shuffle:
            return batches
        shuffled = np.random.default_rng([self._seed, epoch, 1]).permutation(len(batches))
        return [batches[index] for index in shuffled]


def _budgets(max_atoms: int | None, max_edges: int | None, batch_size: int | None, num_edges: Any) -> dict[str, int]:
    if batch_size is not None and not (max_atoms is None and max_edges is None):
        raise ConfigError("batch_size: cannot be combined with max_atoms or max_edges; choose one")
    named = {"batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges}
    given = {key: value for key, value in named.items() if value is not None}
    for key, value in given.items():
        if value < 1:
            raise ConfigError(f"{key}: {value} is not a positive number")
    if not given:
        raise ConfigError("no batch size: give max_atoms (and max_edges), or batch_size")
    if max_edges is not None and num_edges is None:
        raise ConfigError("max_edges: needs the number of edges of each structure (num_edges, or estimate_edges)")
    return {"structures" if key == "batch_size" else key.removeprefix("max_"): value for key, value in given.items()}


def _oversized_message(
    index: int, sizes: NDArray[np.int64], budget: NDArray[np.int64], keys: list[str], names: Sequence[str] | None
) -> str:
    column = int(np.argmax(sizes[index] > budget))
    name = names[index] if names is not None else f"structure {index}"
    return (
        f"{name}: has {sizes[index, column]} {keys[column]}, more than max_{keys[column]} = {budget[column]}; "
        "raise it, or set oversized: skip or own_batch"
    )


@dataclass(frozen=True)
class Sizes:
    """Size of each structure and budget of a batch, in each of ``K`` quantities.

    Attributes:
        each: ``(num_structures, K)`` int64, none above the budget.
        budget: ``(K,)`` int64.
    """

    each: NDArray[np.int64]
    budget: NDArray[np.int64]

    def uniform(self, indices: Indices) -> bool:
        """Whether all these structures are of one size, so that every order packs alike."""
        return bool((self.each[indices] == self.each[indices[0]]).all())

    def squeeze(self, batches: list[Indices], count: int) -> list[Indices] | None:
        """Returns ``count`` batches, the smallest ones filled into the others, or None if they do not fit."""
        filled = np.stack([self.each[batch].sum(axis=0) for batch in batches])
        order = np.argsort((filled / self.budget).max(axis=1), kind="stable")
        surplus = len(batches) - count
        kept = [batches[k] for k in sorted(order[surplus:].tolist())]
        room = self.budget - np.stack([filled[k] for k in sorted(order[surplus:].tolist())])
        loose = [index for k in order[:surplus] for index in batches[k].tolist()]
        for index in sorted(loose, key=lambda k: (-int(self.each[k, -1]), k)):
            fits = (room >= self.each[index]).all(axis=1)
            if not fits.any():
                return None
            target = int(np.argmax(fits))
            kept[target] = np.append(kept[target], index)
            room[target] -= self.each[index]
        return kept


def pack(order: Indices, sizes: Sizes) -> list[Indices]:
    """Returns consecutive runs of ``order`` within the budget, each as long as it can be, as views of it."""
    totals = np.concatenate([np.zeros((1, sizes.each.shape[1]), dtype=np.int64), sizes.each[order].cumsum(axis=0)])
    batches, start = [], 0
    while start < len(order):
        stops = [
            int(np.searchsorted(totals[:, k], totals[start, k] + sizes.budget[k], side="right")) - 1
            for k in range(sizes.each.shape[1])
        ]
        stop = max(min(stops), start + 1)
        batches.append(order[start:stop])
        start = stop
    return batches


def sorted_pack(indices: Indices, sizes: Sizes) -> list[Indices]:
    """Packs by first-fit decreasing: structures by decreasing size, each into the first batch with room.

    The number of batches depends on the sizes alone, not on the order given.
    """
    fraction = (sizes.each[indices] / sizes.budget).max(axis=1)
    keys = [sizes.each[indices, k] for k in range(sizes.each.shape[1])]
    order = indices[np.lexsort([*keys, -fraction])]
    batches: list[list[int]] = []
    room = np.zeros((0, sizes.each.shape[1]), dtype=np.int64)
    used = 0
    for index in order.tolist():
        fits = (room[:used] >= sizes.each[index]).all(axis=1)
        target = int(np.argmax(fits)) if fits.any() else used
        if target == used:
            if used == len(room):
                room = np.concatenate([room, np.tile(sizes.budget, (max(16, used), 1))])
            batches.append([])
            used += 1
        batches[target].append(index)
        room[target] -= sizes.each[index]
    return [np.array(batch, dtype=np.int64) for batch in batches]


def split_to_count(batches: list[Indices], count: int, sizes: Sizes) -> list[Indices]:
    """Returns ``count`` batches, halving the fullest ones that hold more than one structure; their order is kept."""
    if len(batches) >= count:
        return batches

    def entry(batch: Indices, position: tuple[int, ...]) -> tuple[float, tuple[int, ...], Indices]:
        fullness = float((sizes.each[batch].sum(axis=0) / sizes.budget).max()) if len(batch) > 1 else 0.0
        return (-fullness, position, batch)

    heap = [entry(batch, (k,)) for k, batch in enumerate(batches)]
    heapq.heapify(heap)
    while len(heap) < count:
        _, position, batch = heapq.heappop(heap)
        middle = len(batch) // 2
        heapq.heappush(heap, entry(batch[:middle], (*position, 0)))
        heapq.heappush(heap, entry(batch[middle:], (*position, 1)))
    return [batch for _, _, batch in sorted(heap, key=lambda item: item[1])]
