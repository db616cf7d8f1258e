"""Batches under an atom and an edge budget, repacked every epoch, the same number on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from escaip.data.packing import Sizes, pack, sorted_pack, split_to_count
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
    """``(num_structures,)`` cheap bound on the edges: ``n·k``, or ``n·min(k, n − 1)`` without images.

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
        epoch: what :meth:`set_epoch` was last told.
        skipped: indices larger than a budget, left out under ``oversized="skip"``.
        left_out: structures that found no batch in the epoch packed last (see above).
    """

    def __init__(
        self,
        natoms: ArrayLike,
        *,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        max_structures: int | None = None,
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
            max_structures: structures per batch and rank, beside a budget.
            batch_size: structures per batch and rank, without a budget.
            num_edges: ``(num_structures,)`` exact or estimated edges (:func:`estimate_edges`).
            names: of the structures, for messages.
            shuffle: a new order every epoch; False keeps the order given.
            seed: of the order.
            rank: of this process.
            world_size: number of processes.
            oversized: what to do with a structure larger than a budget: ``"error"``, ``"skip"`` or ``"own_batch"``.
            quotas: how many structures of each set an epoch takes, for sets that are mixed; shuffles always.

        Raises:
            ConfigError: no budget, a budget below 1, ``batch_size`` beside a budget, an unknown policy, an
                impossible rank.
            DataError: no structures, or one larger than a budget under ``oversized="error"``.
        """
        budgets = _budgets(max_atoms, max_edges, max_structures, batch_size, num_edges)
        if oversized not in OVERSIZED:
            raise ConfigError(f"oversized: {oversized!r} is not one of {', '.join(OVERSIZED)}")
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
        self.skipped: list[int] = []
        usable = np.arange(len(atoms))
        if len(large) and oversized != "own_batch":
            if oversized == "error":
                raise DataError(_oversized_message(int(large[0]), sizes, budget, keys, names))
            self.skipped = large.tolist()
            usable = np.setdiff1d(usable, large)
            if len(usable) == 0:
                raise DataError("sampler: 0 structures are left, all are larger than the budget; raise max_atoms")
        self._usable = usable
        sizes[large] = budget  # what may travel though oversized fills a batch alone
        self._sizes = Sizes(sizes, budget)
        self.epoch = 0
        self.left_out = 0
        self._num_batches = self._plan()
        self._cache: tuple[int, list[Indices]] | None = None

    @property
    def sampler(self) -> BudgetBatchSampler:
        """Itself: Lightning calls ``set_epoch`` on ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration packs."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        """Batches per rank, the same in every epoch."""
        return self._num_batches // self._world_size

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches(self.epoch))

    def batches(self, epoch: int) -> list[Indices]:
        """This rank's batches of one epoch, each ``(B,)`` int64."""
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
        """This epoch's structures of one set: the next ones of an endless row of its permutations."""
        members = self._usable[(self._usable >= quota.start) & (self._usable < quota.stop)]
        if len(members) == 0:
            raise DataError("sampler: 0 structures of one of the sets fit the budget; raise max_atoms")
        first, last = epoch * quota.draws, (epoch + 1) * quota.draws
        blocks = range(first // len(members), -(-last // len(members)))
        row = [np.random.default_rng([self._seed, number, block, 2]).permutation(members) for block in blocks]
        offset = first - blocks.start * len(members)
        return np.concatenate(row)[offset : offset + quota.draws]

    def _plan(self) -> int:
        """Batches in all, a multiple of the number of ranks."""
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


def _budgets(
    max_atoms: int | None,
    max_edges: int | None,
    max_structures: int | None,
    batch_size: int | None,
    num_edges: Any,
) -> dict[str, int]:
    if batch_size is not None:
        if not (max_atoms is None and max_edges is None and max_structures is None):
            raise ConfigError("batch_size: cannot be combined with max_atoms, max_edges or max_structures; choose one")
        max_structures = batch_size
    named = {"max_atoms": max_atoms, "max_edges": max_edges, "max_structures": max_structures}
    for key, value in named.items():
        if value is not None and value < 1:
            raise ConfigError(f"{'batch_size' if batch_size is not None else key}: {value} is not a positive number")
    if all(value is None for value in named.values()):
        raise ConfigError("no batch size: give max_atoms (and max_edges), or batch_size")
    if max_edges is not None and num_edges is None:
        raise ConfigError("max_edges: needs the number of edges of each structure (num_edges, or estimate_edges)")
    return {key.removeprefix("max_"): value for key, value in named.items() if value is not None}


def _oversized_message(
    index: int, sizes: NDArray[np.int64], budget: NDArray[np.int64], keys: list[str], names: Sequence[str] | None
) -> str:
    column = int(np.argmax(sizes[index] > budget))
    name = names[index] if names is not None else f"structure {index}"
    return (
        f"{name}: has {sizes[index, column]} {keys[column]}, more than max_{keys[column]} = {budget[column]}; "
        "raise it, or set oversized: skip or own_batch"
    )
