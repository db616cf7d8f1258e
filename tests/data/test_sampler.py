from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from escaip.data.sampler import BudgetBatchSampler, Quota, Sizes, estimate_edges, pack, sorted_pack, split_to_count
from escaip.errors import ConfigError, DataError

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(natoms=sizes, world=st.integers(1, 4), seed=st.integers(0, 5), epochs=st.just(4), edges=st.booleans())
def test_contract(natoms: list[int], world: int, seed: int, epochs: int, edges: bool) -> None:
    """Budgets hold, every structure comes exactly once per epoch, counts agree over ranks and epochs."""
    num_edges = estimate_edges(natoms, False, 8)
    budget = {"max_atoms": 64, "max_edges": 480, "num_edges": num_edges} if edges else {"max_atoms": 64}
    ranks = [BudgetBatchSampler(natoms, seed=seed, rank=rank, world_size=world, **budget) for rank in range(world)]
    assert len({len(sampler) for sampler in ranks}) == 1
    orders = set()
    for epoch in range(epochs):
        seen: Counter[int] = Counter()
        for sampler in ranks:
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert len(batches) == len(sampler)
            assert batches == list(sampler)
            for batch in batches:
                assert batch
                assert sum(natoms[k] for k in batch) <= 64
                if edges:
                    assert sum(int(num_edges[k]) for k in batch) <= 480
                seen.update(batch)
        orders.add(tuple(map(tuple, ranks[0])))
        assert set(seen) == set(range(len(natoms)))
        if len(natoms) >= len(ranks[0]) * world:
            assert set(seen.values()) == {1}
        assert sum(seen.values()) < len(natoms) + world
        assert ranks[0].left_out == 0
    if len(natoms) > 20:
        assert len(orders) > 1


@given(natoms=sizes, batch_size=st.integers(1, 9))
def test_plain_batch_size(natoms: list[int], batch_size: int) -> None:
    sampler = BudgetBatchSampler(natoms, batch_size=batch_size)
    lengths = sorted(len(batch) for batch in sampler)
    assert len(sampler) == -(-len(natoms) // batch_size)
    assert all(length == batch_size for length in lengths[1:])
    assert sum(lengths) == len(natoms)


@given(natoms=sizes)
def test_packing_functions(natoms: list[int]) -> None:
    each = np.array(natoms)[:, None]
    shared = Sizes(each, np.array([60]))
    order = np.random.default_rng(0).permutation(len(natoms))
    packed = pack(order, shared)
    assert [k for batch in packed for k in batch] == order.tolist()
    for batch, following in itertools.pairwise(packed):
        assert each[batch].sum() + each[following[0]].item() > 60
    assert len(sorted_pack(order, shared)) == len(sorted_pack(np.sort(order), shared))
    assert len(sorted_pack(order, shared)) >= -(-sum(natoms) // 60)
    count = min(len(natoms), len(packed) + 3)
    split = split_to_count(packed, count, shared)
    assert len(split) == count
    assert [k for batch in split for k in batch] == order.tolist()


def test_the_same_seed_gives_the_same_batches_and_another_does_not() -> None:
    natoms = np.random.default_rng(0).integers(3, 30, size=300)
    first, second = (list(BudgetBatchSampler(natoms, max_atoms=100, seed=7)) for _ in range(2))
    assert first == second
    assert first != list(BudgetBatchSampler(natoms, max_atoms=100, seed=8))
    sampler = BudgetBatchSampler(natoms, max_atoms=100, seed=7)
    packings = [{frozenset(batch.tolist()) for batch in sampler.batches(epoch)} for epoch in range(3)]
    assert packings[0] == set(map(frozenset, first))
    assert all(len(a & b) <= 1 for a, b in itertools.combinations(packings, 2))  # repacked, not only reordered


def test_batches_are_well_filled() -> None:
    natoms = np.random.default_rng(0).integers(3, 30, size=5000)
    sampler = BudgetBatchSampler(natoms, max_atoms=300)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        filled = [natoms[batch].sum() / 300 for batch in sampler]
        assert np.mean(filled) > 0.93


def test_order_is_kept_without_shuffling() -> None:
    natoms = np.random.default_rng(0).integers(3, 30, size=200)
    sampler = BudgetBatchSampler(natoms, max_atoms=100, shuffle=False)
    assert [k for batch in sampler for k in batch] == list(range(200))


def test_oversized_structures() -> None:
    natoms = [10, 500, 20, 30, 700, 40]
    skip = BudgetBatchSampler(natoms, max_atoms=100, oversized="skip")
    assert skip.skipped == [1, 4]
    assert sorted(k for batch in skip for k in batch) == [0, 2, 3, 5]
    own = BudgetBatchSampler(natoms, max_atoms=100, oversized="own_batch")
    assert sorted(k for batch in own for k in batch) == list(range(6))
    assert [1] in list(own)
    assert [4] in list(own)


def test_edge_estimates() -> None:
    assert estimate_edges([1, 5, 100], False, 30).tolist() == [0, 20, 3000]
    assert estimate_edges([1, 5, 100], True, 30).tolist() == [30, 150, 3000]
    assert estimate_edges([5], False, None).tolist() == [20]
    found = estimate_edges([10, 10, 10], [True, True, False], 20, counted=[150, 900, 90])
    assert found.tolist() == [150, 200, 90]
    assert estimate_edges([10], [True], None, counted=[900]).tolist() == [900]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_atoms": 100}, DataError, r"^big: has 500 atoms, more than max_atoms = 100; raise it, or set oversized"),
        ({"max_edges": 100, "num_edges": [9, 200]}, DataError, "^big: has 200 edges, more than max_edges = 100"),
        ({}, ConfigError, "no batch size"),
        ({"max_atoms": 0}, ConfigError, "max_atoms: 0 is not a positive"),
        ({"batch_size": -1}, ConfigError, "batch_size: -1"),
        ({"batch_size": 4, "max_atoms": 1000}, ConfigError, "choose one"),
        ({"max_edges": 10}, ConfigError, "needs the number of edges"),
        ({"max_atoms": 1000, "oversized": "drop"}, ConfigError, "oversized: 'drop'"),
        ({"max_atoms": 1000, "rank": 2, "world_size": 2}, ConfigError, "rank 2 is outside 0..1"),
        ({"max_atoms": 5, "oversized": "skip"}, DataError, "all are larger than the budget"),
    ],
)
def test_bad_budgets(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BudgetBatchSampler([10, 500], names=["small", "big"], **options)


@pytest.mark.bad_input
def test_no_structures() -> None:
    with pytest.raises(DataError, match="0 structures"):
        BudgetBatchSampler([], max_atoms=10)


def test_quotas_draw_every_structure_before_any_again() -> None:
    natoms = np.random.default_rng(0).integers(5, 30, 130)
    quotas = [Quota(0, 100, 30), Quota(100, 130, 45)]
    sampler = BudgetBatchSampler(natoms, max_atoms=100, quotas=quotas, seed=4)
    seen = []
    for epoch in range(10):
        batches = sampler.batches(epoch)
        assert len(batches) == len(sampler)
        assert all(natoms[batch].sum() <= 100 for batch in batches)
        drawn = np.concatenate(batches)
        assert len(drawn) + sampler.left_out == 75
        assert sampler.left_out == 0
        assert np.count_nonzero(drawn < 100) == 30
        seen.append(drawn)
    small = np.concatenate(seen)
    counts = np.bincount(small, minlength=130)
    assert set(counts[:100]) == {3}  # 10 epochs of 30 draws from 100
    assert set(counts[100:]) == {15}  # 10 epochs of 45 draws from 30
    assert sorted(seen[0].tolist()) != sorted(seen[1].tolist())
    again = BudgetBatchSampler(natoms, max_atoms=100, quotas=quotas, seed=4)
    assert [b.tolist() for b in again.batches(7)] == [b.tolist() for b in sampler.batches(7)]


def test_what_finds_no_batch_is_counted() -> None:
    """Epochs draw more or fewer large structures, so one of them may need more batches than were planned."""
    natoms = np.array([60] * 6 + [40] * 6)
    sampler = BudgetBatchSampler(natoms, max_atoms=100, quotas=[Quota(0, 12, 4)], seed=6)
    left_out = []
    for epoch in range(9):
        batches = sampler.batches(epoch)
        assert len(batches) == len(sampler)
        assert sum(map(len, batches)) + sampler.left_out == 4
        left_out.append(sampler.left_out)
    assert max(left_out) == 1
