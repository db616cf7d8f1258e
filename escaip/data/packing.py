"""Packing structures into batches under budgets: pure functions of sizes and order."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Sizes:
    """What each structure takes, and what a batch holds.

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
        """``count`` batches with the smallest ones filled into the others, or None if they do not fit."""
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
    """Consecutive runs of ``order`` within the budget, each as long as it can be, as views of it."""
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
    """First-fit decreasing: structures by decreasing size, each into the first batch with room.

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
    """``count`` batches, by halving the fullest ones that hold more than one structure; their order is kept."""
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
