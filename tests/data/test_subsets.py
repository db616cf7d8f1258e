from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from toys import write_store

from escaip.data import AtomicData, AtomicDataModule, fit_statistics
from escaip.data.prepare import prepare
from escaip.data.splits import group_order, nested_subset, parse_train_size, random_keys
from escaip.errors import ConfigError, DataError

PARTS = ("train", "val", "test")
SIZES = [3, 5, 0.1, 0.35, 40, 0.9, 1000]


def made(sizes: list[int], *, first: int = 0) -> list[AtomicData]:
    """Molecules of helium in groups of these sizes, one after the other in turns; the energy tells them apart."""
    groups = [f"g{first + k}" for k, size in enumerate(sizes) for _ in range(size)]
    order = np.random.default_rng(0).permutation(len(groups)).tolist()
    return [
        AtomicData.from_arrays(
            [2], [[0, 0, 0]], energy=-1.0 - 0.01 * (k + first), forces=[[0.1, 0, 0]], structure_id=f"s{first + k}",
            group=groups[place],
        )
        for k, place in enumerate(order)
    ]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Ninety structures in thirty groups of one to five."""
    return str(write_store(tmp_path / "store", made([1, 2, 3, 4, 5] * 6)).path)


def module(train: Any, size: Any = None, **options: Any) -> AtomicDataModule:
    result = AtomicDataModule(train, batch_size=8, train_size=size, **{"split": {"val": 0.1, "test": 0.1}, **options})
    result.setup("fit")
    result.setup("test")
    return result


def ids(data: AtomicDataModule, part: str = "train") -> set[str]:
    return {structure.structure_id for structure in data.datasets[part]}


group_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(sizes=group_sizes, seed=st.integers(0, 3))
def test_groups_in_an_order_that_fills(sizes: list[int], seed: int) -> None:
    order = list(group_order([f"g{k}" for k in range(len(sizes))], np.array(sizes), seed=seed))
    assert sorted(order) == list(range(len(sizes)))
    taken = 0
    for place, code in enumerate(order):
        left = [sizes[k] for k in order[place:]]
        assert sizes[code] <= taken or (sizes[code] == min(left) and min(left) > taken)
        taken += sizes[code]


@given(sizes=group_sizes, seed=st.integers(0, 3))
def test_subsets_are_nested_whole_and_not_larger(sizes: list[int], seed: int) -> None:
    class Groups:
        group_codes = ([f"g{k}" for k in range(len(sizes))], np.repeat(np.arange(len(sizes)), sizes))

        def __len__(self) -> int:
            return sum(sizes)

    data: Any = Groups()
    before: set[int] = set()
    codes = data.group_codes[1]
    for size in range(min(sizes), len(data) + 2):
        chosen = nested_subset(data, size, seed=seed)
        assert 0 < len(chosen) <= size
        assert np.all(np.diff(chosen) > 0)
        assert before <= set(chosen.tolist())
        assert len(chosen) == np.isin(codes, codes[chosen]).sum()
        before = set(chosen.tolist())
    assert len(before) == len(data)


def test_subsets_are_fixed_for_ever(store: str) -> None:
    """A study must find its subsets again."""
    names = [f"g{k}" for k in range(20)]
    order = [names[k] for k in group_order(names, np.full(20, 3), seed=1)]
    assert order[:5] == ["g0", "g19", "g15", "g13", "g10"]
    assert order != [names[k] for k in group_order(names, np.full(20, 3), seed=2)]
    again = [name for name in reversed(names) if name != "g15"]
    assert [again[k] for k in group_order(again, np.full(19, 3), seed=1)] == [n for n in order if n != "g15"]
    assert list(group_order(["a", "b", "c"], np.array([0, 4, 0]))) == [1]
    chosen = ids(module(store, 5, split={"by": "structure", "val": 0}, test=store))
    assert chosen == {"s1", "s2", "s33", "s34", "s47"}


@pytest.mark.parametrize("by", ["group", "structure"])
def test_validation_and_test_stay_and_training_sets_are_nested(store: str, by: str) -> None:
    split = {"by": by, "val": 0.1, "test": 7}
    whole = module(store, split=split)
    count = len(whole.datasets["train"])
    parts = [(size if isinstance(size, int) else int(size * count), module(store, size, split=split)) for size in SIZES]
    before: set[str] = set()
    for size, part in sorted(parts, key=lambda item: item[0]):
        assert ids(part, "val") == ids(whole, "val")
        assert ids(part, "test") == ids(whole, "test")
        assert before <= ids(part) <= ids(whole)
        before = ids(part)
        assert len(before) <= size
        assert by == "group" or len(before) == min(size, count)
        groups = {data.group for data in part.datasets["train"]}
        assert by == "structure" or len(before) == sum(data.group in groups for data in whole.datasets["train"])
        seen = [name for batch in part.train_dataloader() for name in batch.structure_id]
        assert sorted(seen) == sorted(before)
    assert before == ids(whole)
    assert ids(module(store, 20, split=split, seed=1)) != ids(module(store, 20, split=split))


@pytest.mark.parametrize("by", ["group", "structure"])
def test_other_validation_sizes_take_only_their_own(tmp_path: Path, by: str) -> None:
    """Were the hash of the split that of the subset, a larger validation set would consist of it."""
    path = str(write_store(tmp_path / "s", made([3] * 40)).path)
    small, large = (module(path, 30, split={"by": by, "val": val}, test=path) for val in (0.1, 0.3))
    kept = ids(small) - ids(large, "val")
    assert len(kept) > 15
    assert kept <= ids(large)
    assert len(ids(small)) == len(ids(large)) == 30


def test_statistics_and_their_cache_are_of_the_subset(store: str, tmp_path: Path) -> None:
    part = module(store, 0.5, cache_dir=str(tmp_path / "cache"))
    whole = module(store, cache_dir=str(tmp_path / "cache"))
    for data in (part, whole):
        expected = fit_statistics(data.datasets["train"])
        assert data.statistics.num_structures == len(data.datasets["train"])
        assert data.statistics.element_references == pytest.approx(expected.element_references)
    assert part.statistics.element_references != whole.statistics.element_references
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert f"data.train: {len(part.datasets['train'])} of 72 structures by train_size: 0.5" in part.summary()
    assert "train_size" not in whole.summary()


@pytest.mark.parametrize("by", ["group", "structure"])
def test_files_and_stores_give_the_same_subset(xyz_file: Path, tmp_path: Path, by: str) -> None:
    prepare(xyz_file, tmp_path / "s")
    split = {"by": by, "val": 10}
    files, stored = (module(str(path), 25, split=split, test=str(xyz_file)) for path in (xyz_file, tmp_path / "s"))
    assert ids(files) == ids(stored)
    assert len(ids(files)) == (20 if by == "group" else 25)
    turned = module(str(xyz_file), 25, split=split, test=str(xyz_file), rotate=True)
    assert ids(turned) == ids(files)
    still, moved = (next(iter(data.datasets["train"])).positions for data in (files, turned))
    assert not torch.allclose(still, moved)


def test_of_a_divided_store_only_its_training_part_is_reduced(xyz_file: Path, tmp_path: Path) -> None:
    prepare(xyz_file, tmp_path / "s", split={"by": "structure", "val": 0.2, "test": 6})
    part = module(str(tmp_path / "s"), 0.25, split={"by": "structure"})
    assert [len(part.datasets[name]) for name in PARTS] == [10, 12, 6]
    assert ids(part) < ids(module(str(tmp_path / "s")))


@pytest.mark.parametrize("by", ["group", "structure"])
def test_several_stores_are_one_set(tmp_path: Path, by: str) -> None:
    paths = [str(write_store(tmp_path / str(k), made([2] * 20, first=100 * k)).path) for k in range(2)]
    parts = [module(paths, size, split={"by": by, "val": 0}, test=paths[0]) for size in (20, 40, None)]
    assert [len(ids(part)) for part in parts] == [20, 40, 80]
    assert ids(parts[0]) < ids(parts[1]) < ids(parts[2])
    assert {int(name[1:]) // 100 for name in ids(parts[0])} == {0, 1}
    positions = [{int(name[1:]) - 100 * k for name in ids(parts[1]) if int(name[1:]) // 100 == k} for k in range(2)]
    assert positions[0] != positions[1]


def test_of_a_mixture_each_set_gives_its_fraction(tmp_path: Path) -> None:
    sets = {name: {"path": str(write_store(tmp_path / name, made([2] * n)).path)} for name, n in (("a", 50), ("b", 20))}
    whole, part = (module(sets, size) for size in (None, 0.5))
    for name, count in (("a", 40), ("b", 16)):
        member = part.datasets["train"].members[name]
        assert len(member) == count
        assert part.statistics[name].num_structures == count
        assert {data.structure_id for data in member} < {d.structure_id for d in whole.datasets["train"].members[name]}
    assert part.shares == {"a": 40, "b": 16}
    assert ids(part, "val") == ids(whole, "val")
    with pytest.raises(ConfigError, match=r"train_size: 100: a number does not say how many of each set; .* fraction"):
        module(sets, 100)
    assert module(sets, 1.0).shares == whole.shares


def test_a_state_belongs_to_one_part_of_the_training_set(store: str) -> None:
    split = {"by": "structure", "val": 0}
    loader = module(store, 0.34, split=split, test=store).train_dataloader()
    batches = [tuple(batch.structure_id) for batch in loader]
    again = module(store, 0.34, split=split, test=store).train_dataloader()
    again.load_state_dict({**loader.state_dict(), "consumed": 2})
    assert [tuple(batch.structure_id) for batch in again] == batches[2:]
    for size, shown in ((0.33, "0.33"), (None, r"null \(all\)")):  # 29 structures for 30, as many batches
        other = module(store, size, split=split, test=store)
        with pytest.raises(DataError, match=rf"trained with data.train_size 0.34, now it is {shown}; use the same"):
            other.train_dataloader().load_state_dict(loader.state_dict())
    whole = module(store).train_dataloader()
    assert set(whole.state_dict()) == {"epoch", "consumed", "num_batches"}
    with pytest.raises(DataError, match=r"trained with data.train_size null \(all\), now it is 0.34"):
        loader.load_state_dict(whole.state_dict())


@pytest.mark.bad_input
def test_a_size_below_the_smallest_group(tmp_path: Path) -> None:
    path = str(write_store(tmp_path / "s", made([4, 9, 4, 6])).path)
    message = r"data.train: train_size: the smallest group \(g[02]\) has 4 structures, but 3 of 23 are asked for; "
    with pytest.raises(DataError, match=message + "ask for more, or set data.split.by: structure"):
        module(path, 3, split={"val": 0}, test=path)
    assert len(ids(module(path, 4, split={"val": 0}, test=path))) == 4
    assert len(ids(module(path, 3, split={"by": "structure", "val": 0}, test=path))) == 3
    with pytest.raises(DataError, match=r"data.train: train_size: 0.04 of 23 structures is less than one; ask for"):
        module(path, 0.04, split={"by": "structure", "val": 0}, test=path)


@pytest.mark.bad_input
def test_more_than_there_are_is_all_and_said(store: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(ids(module(store, 72))) == 72
        assert caplog.text == ""
        assert len(ids(module(store, 73))) == 72
    assert "data.train: train_size: 73, but there are 72 structures" in caplog.text


def test_fractions_are_what_is_written() -> None:
    class Hundred:
        def random_keys(self, seed: int) -> np.ndarray:
            return random_keys(np.arange(100), seed)

        def __len__(self) -> int:
            return 100

    data: Any = Hundred()
    for hundredths in range(1, 100):  # 0.29 * 100 is 28.999999999999996
        assert len(nested_subset(data, hundredths / 100, by="structure")) == hundredths


@pytest.mark.parametrize(
    ("text", "expected"), [("null", None), ("1.0", None), ("1", 1), ("0.25", 0.25), ("500", 500), ("1e4", 10_000)]
)
def test_on_the_command_line(text: str, expected: Any) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(AtomicDataModule, "data")
    value = parser.parse_args([f"--data.train_size={text}", "--data.batch_size=2"]).data.train_size
    parsed = parse_train_size(value)
    assert parsed == expected
    assert type(parsed) is type(expected)


@pytest.mark.bad_input
@pytest.mark.parametrize("size", [0, -1, 0.0, -0.5, 1.5, 100.5, float("nan"), float("inf"), True, "many", [3]])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"^train_size: .* is neither a fraction up to 1.0 nor a whole number of"):
        AtomicDataModule("x", batch_size=2, train_size=size)
