from __future__ import annotations

import errno
import json
import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils.data import DataLoader
from toys import assert_same, names, write_store

from escaip.data import AtomicData, AtomicDataset, Store, StoreWriter, collate, open_source
from escaip.data import store_writer as writer_module
from escaip.data.statistics import TrainingSums
from escaip.data.structure import TENSOR_FIELDS
from escaip.errors import ConfigError, DataError
from escaip.types import TARGETS, Target


def test_everything_comes_back(structures: list[AtomicData], tmp_path: Path) -> None:
    structures[3].structure_id = "naïve – 名前:3"
    structures[4].charge = torch.tensor([-2])
    structures[5].tags = torch.tensor([0, 2, -7])
    structures[6].fixed[1] = True
    store = write_store(tmp_path / "s", structures, shard_atoms=50, source="made")
    assert len(store) == 60
    assert len(store.manifest["shards"]) > 4
    for index in np.random.default_rng(0).permutation(60).tolist():
        assert_same(store[index], structures[index])
    assert_same(store[-1], structures[-1])
    assert store.natoms.tolist() == [data.num_nodes for data in structures]
    assert [store.groups[code] for code in store.index["group_codes"]] == [data.group for data in structures]
    assert store.index["periodic"].tolist() == [bool(data.pbc.any()) for data in structures]
    assert store.manifest["labels"] == {"energy": 60, "forces": 60, "stress": 10}
    store.verify()
    with pytest.raises(IndexError):
        store[60]


def test_structures_can_be_changed_and_views_are_read_only(structures: list[AtomicData], tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", structures)
    data = store[0]
    data.positions += 1.0
    data.fixed[0] = True
    assert_same(store[0], structures[0])
    assert not store.index["natoms"].flags.writeable
    content = load_file(tmp_path / "s" / store.manifest["shards"][0]["file"])  # shards are safetensors
    assert np.array_equal(content["energy"], [float(data.energy) for data in structures])
    for a, b in zip(open_source(tmp_path / "s"), structures, strict=True):
        assert_same(a, b)


def test_further_targets_are_stored_and_nan_where_missing(
    structures: list[AtomicData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write_store(tmp_path / "plain", structures)
    monkeypatch.setitem(TARGETS, "dipole", Target("dipole", False, (3,), "e·Å", "me·Å", 1e3))
    monkeypatch.setitem(TARGETS, "charges", Target("charges", True, (), "e", "me", 1e3))
    made = []
    for k in range(9):
        labels = {} if k % 3 else {"dipole": [k, 2.0, 3.0], "charges": [0.5, -0.5 * k]}
        made.append(AtomicData.from_arrays([1, 8], [[0, 0, 0], [0, 1, k]], labels=labels, structure_id=f"s{k}"))
    store = write_store(tmp_path / "s", made, shard_atoms=4)
    assert store.manifest["labels"] == {"energy": 0, "forces": 0, "stress": 0, "dipole": 3, "charges": 3}
    for k, data in enumerate(store):
        assert torch.equal(data.dipole.nan_to_num(-9.0), made[k].dipole.nan_to_num(-9.0))
        assert torch.equal(data.charges.nan_to_num(-9.0), made[k].charges.nan_to_num(-9.0))
        assert data.has_label("dipole") == (k % 3 == 0)
    assert torch.equal(store.batch([3, 4, 6]).dipole[::2, 0], torch.tensor([3.0, 6.0], dtype=torch.float64))
    sums = TrainingSums()
    AtomicDataset(store).accumulate(sums)
    assert sums.statistics(require_energy=False).label_counts["dipole"] == 3
    again = Store(tmp_path / "plain")
    assert again.manifest["labels"] == plain.manifest["labels"]
    assert bool(again[0].dipole.isnan().all())
    assert again.batch([0, 1]).charges.isnan().all()


def test_float32_keeps_positions_and_energies(structures: list[AtomicData], tmp_path: Path) -> None:
    data = write_store(tmp_path / "s", structures, dtype="float32")[55]
    assert torch.equal(data.positions, structures[55].positions)
    assert torch.equal(data.energy, structures[55].energy)
    assert torch.equal(data.forces, structures[55].forces.float().double())
    assert data.stress.dtype == torch.float64


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_every_kind(structures: list[AtomicData], tmp_path: Path, method: str) -> None:
    dataset = AtomicDataset(write_store(tmp_path / "s", structures, shard_atoms=100))
    assert dataset[0].num_nodes == 3  # maps a shard in this process first
    loader = DataLoader(
        dataset,
        batch_size=20,
        collate_fn=collate,
        num_workers=1,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    found = [name for batch in loader for name in batch.structure_id]
    assert found == [data.structure_id for data in structures]


def test_pickled_stores_hold_no_data(structures: list[AtomicData], tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", structures)
    store[0], store.natoms, store.groups
    dump = pickle.dumps(store)
    assert len(dump) < 20_000
    assert_same(pickle.loads(dump)[9], structures[9])


@pytest.mark.bad_input
def test_a_failure_leaves_nothing(structures: list[AtomicData], tmp_path: Path) -> None:
    def source() -> Iterator[AtomicData]:
        yield from structures[:30]
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_store(tmp_path / "s", source(), shard_atoms=10)
    assert names(tmp_path) == []


@pytest.mark.bad_input
@pytest.mark.parametrize("fail_at", [0, 3, 5])
def test_a_full_disk_is_one_line(
    structures: list[AtomicData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    calls = 0
    genuine = writer_module.os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        genuine(descriptor)

    monkeypatch.setattr(writer_module.os, "fsync", full)
    with pytest.raises(DataError, match=r"/s: the disk is full, nothing was kept; free space"):
        write_store(tmp_path / "s", structures, shard_atoms=80)
    assert names(tmp_path) == []


def test_overwriting_is_asked_for(structures: list[AtomicData], tmp_path: Path) -> None:
    write_store(tmp_path / "s", structures)
    with pytest.raises(DataError, match="exists already"):
        StoreWriter(tmp_path / "s")
    assert len(write_store(tmp_path / "s", structures[:5], overwrite=True)) == 5
    assert names(tmp_path) == ["s"]


@pytest.mark.bad_input
def test_bad_targets(structures: list[AtomicData], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="is no prepared store, it is not overwritten"):
        StoreWriter(tmp_path / "mine", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_store(tmp_path / "file" / "s", structures)
    with pytest.raises(DataError, match="0 structures to write"):
        write_store(tmp_path / "s", [])
    with pytest.raises(ConfigError, match="dtype"):
        StoreWriter(tmp_path / "s", dtype="float16")


@pytest.mark.bad_input
def test_damaged_shards_are_named(structures: list[AtomicData], tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", structures)
    shard = tmp_path / "s" / "shard-00000.safetensors"
    content = shard.read_bytes()
    for damage in (b"\xff" * 8, b"\x10\0\0\0\0\0\0\0{broken json!!!!}"):
        shard.write_bytes(damage + content[len(damage) :])
        with pytest.raises(DataError, match=r"shard-00000.safetensors: damaged shard"):
            Store(tmp_path / "s")[0]
    shard.write_bytes(content[:-100] + bytes([content[-100] ^ 4]) + content[-99:])
    with pytest.raises(DataError, match=r"shard-00000.safetensors: checksum differs"):
        store.verify()
    shard.write_bytes(content[:-10])
    with pytest.raises(DataError, match=r"shard-00000.safetensors: has \d+ bytes instead of"):
        Store(tmp_path / "s")
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00000.safetensors: is missing"):
        Store(tmp_path / "s")


@pytest.mark.bad_input
def test_bad_manifests(structures: list[AtomicData], tmp_path: Path) -> None:
    write_store(tmp_path / "s", structures)
    file = tmp_path / "s" / "manifest.json"
    manifest = json.loads(file.read_text())
    for content, message in (
        (json.dumps({**manifest, "schema_version": 99}), "schema 99 is newer"),
        (json.dumps({key: value for key, value in manifest.items() if key != "shards"}), "damaged manifest"),
        ("{", "damaged manifest"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            Store(tmp_path / "s")
    with pytest.raises(DataError, match="is no prepared store"):
        Store(tmp_path / "nothing")
    file.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="takes no units"):
        list(open_source(tmp_path / "s", units={"energy": "meV"}))


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("fixed_atoms", ["free_only", "all"])
def test_batches_of_a_store_are_those_of_its_structures(
    structures: list[AtomicData], tmp_path: Path, rotate: bool, fixed_atoms: str
) -> None:
    structures[6].fixed[1] = True
    store = write_store(tmp_path / "s", structures, shard_atoms=50)
    members = np.random.default_rng(0).permutation(40)[:25]
    fast = AtomicDataset(store, range(20, 60), rotate=rotate, fixed_atoms=fixed_atoms, seed=1)
    slow = AtomicDataset(list(store), range(20, 60), rotate=rotate, fixed_atoms=fixed_atoms, seed=1)
    a, b = fast.batch(members, epoch=3), slow.batch(members, epoch=3)
    assert set(a.keys()) == set(b.keys())
    for key in (*TENSOR_FIELDS, "batch", "ptr"):
        assert a[key].dtype == b[key].dtype, key
        assert torch.allclose(a[key].double(), b[key].double(), rtol=1e-14, atol=1e-13, equal_nan=True), key
    assert a.structure_id == b.structure_id
    assert a.group == b.group
    assert a.num_graphs == b.num_graphs
    for mine, other in zip(a.to_data_list(), b.to_data_list(), strict=True):
        assert torch.allclose(mine.positions, other.positions, atol=1e-13)
        assert mine.num_nodes == other.num_nodes
