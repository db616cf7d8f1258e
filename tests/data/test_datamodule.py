from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from ase.geometry import get_distances
from toys import write_store

from escaip.data import AtomicData, AtomicDataModule, AtomicDataset, collate, fit_statistics
from escaip.data.dataset import random_rotation, rotate_structure
from escaip.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def names(loader: Any, epoch: int = 0) -> list[list[str]]:
    loader.batch_sampler.set_epoch(epoch)
    return [list(batch.structure_id) for batch in loader]


def test_rotation_turns_structure_and_labels(structures: list[AtomicData]) -> None:
    data = structures[-1]
    rotation = random_rotation(0, 3, 7)
    assert torch.allclose(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-14)
    assert float(torch.linalg.det(rotation)) == pytest.approx(1.0)
    before = pickle.dumps(data.to_dict())
    turned = rotate_structure(data, rotation)
    assert pickle.dumps(data.to_dict()) == before
    a, b = data.to_ase(), turned.to_ase()
    assert np.allclose(
        get_distances(a.positions, cell=a.cell, pbc=True)[1], get_distances(b.positions, cell=b.cell, pbc=True)[1]
    )
    assert torch.allclose(turned.forces @ rotation, data.forces)
    assert torch.allclose((turned.positions * turned.forces).sum(1), (data.positions * data.forces).sum(1))
    assert torch.allclose(torch.linalg.eigvalsh(turned.stress[0]), torch.linalg.eigvalsh(data.stress[0]), atol=1e-14)
    axis = data.positions[1] / data.positions[1].norm()
    assert torch.allclose((rotation @ axis) @ turned.stress[0] @ (rotation @ axis), axis @ data.stress[0] @ axis)


def test_rotations_depend_on_seed_epoch_and_structure(structures: list[AtomicData]) -> None:
    dataset = AtomicDataset(structures, rotate=True, seed=1)
    first = dataset.structure(3, 2).positions
    assert torch.equal(first, dataset.structure(3, 2).positions)
    for other in (dataset.structure(3, 1), AtomicDataset(structures, rotate=True, seed=2).structure(3, 2)):
        assert not torch.allclose(first, other.positions)
    part = AtomicDataset(structures, [3, 9], rotate=True, seed=1)
    assert torch.equal(first, part.structure(0, 2).positions)
    mean = torch.stack([random_rotation(0, k, 0) for k in range(4000)]).mean(0)
    assert float(mean.abs().max()) < 0.05


def test_sets_statistics_and_summary(xyz_file: Path) -> None:
    module = AtomicDataModule(str(xyz_file), max_atoms=60, split={"val": 0.2, "test": 10})
    module.setup("fit")
    module.setup("validate")
    train, val = module.datasets["train"], module.datasets["val"]
    assert len(train) + len(val) + len(module.datasets["test"]) == 60
    assert not {data.group for data in train} & {data.group for data in val}
    assert module.statistics == fit_statistics(train)
    assert "train: " in module.summary()
    assert "energy" in module.summary()
    seen = [name for batch in names(module.train_dataloader()) for name in batch]
    assert sorted(seen) == sorted(data.structure_id for data in train)
    in_order = [name for batch in names(module.val_dataloader()) for name in batch]
    assert in_order == [data.structure_id for data in val]


def test_named_sets_and_options(xyz_file: Path, structures: list[AtomicData], tmp_path: Path) -> None:
    write_store(tmp_path / "store", structures[:30])
    module = AtomicDataModule(
        train=str(tmp_path / "store"),
        val={"path": str(xyz_file), "index": "30:40", "keys": {"energy": "energy", "forces": "forces"}},
        test=[str(xyz_file)],
        batch_size=4,
        isolated_energies={"H": -1.0, "6": -2.0, "N": -3.0, "O": -4.0},
    )
    module.setup()
    assert [len(module.datasets[part]) for part in ("train", "val", "test")] == [30, 10, 60]
    assert module.statistics.element_references[6] == -2.0
    assert len(list(module.test_dataloader())) == 15


def test_statistics_are_kept_in_the_folder_named(xyz_file: Path, tmp_path: Path) -> None:
    def fitted(**options: Any) -> Any:
        made = AtomicDataModule(str(xyz_file), batch_size=4, cache_dir=str(tmp_path / "cache"), **options)
        made.setup("fit")
        return made.statistics

    first = fitted()
    (file,) = (tmp_path / "cache").glob("statistics-*.json")
    file.write_text(file.read_text().replace('"num_structures": ', '"num_structures": 1'))
    assert fitted().num_structures != first.num_structures
    assert fitted(seed=5).num_structures == first.num_structures
    given = {str(number): -1.0 for number in range(1, 119)}
    assert not fitted(isolated_energies=given).references_fitted
    for path in (tmp_path / "cache").iterdir():  # files of earlier versions do not say whether references were given
        values = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in values.items() if key != "references_fitted"}))
    assert fitted().references_fitted
    assert not fitted(isolated_energies=given).references_fitted
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_ranks_share_the_epoch(xyz_file: Path) -> None:
    def loader(rank: int) -> Any:
        module = AtomicDataModule(str(xyz_file), max_atoms=40, split={"val": 0})
        module.setup("fit")
        module.trainer = type("Trainer", (), {"global_rank": rank, "world_size": 2})()
        return module.train_dataloader()

    a, b = loader(0), loader(1)
    assert len(a) == len(b)
    seen = [name for loaded in (a, b) for batch in names(loaded, 3) for name in batch]
    assert len(seen) == len(set(seen)) == 60


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_deliver_the_same_batches(xyz_file: Path, workers: int) -> None:
    options: dict = {"max_atoms": 60, "split": {"val": 0}, "rotate": True, "start_method": "fork"}
    module = AtomicDataModule(str(xyz_file), num_workers=workers, **options)
    module.setup("fit")
    loader = module.train_dataloader()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for epoch in (0, 1):
        loader.batch_sampler.set_epoch(epoch)
        planned = loader.batch_sampler.batches(epoch)
        data = module.datasets["train"]
        for batch, plan in zip(loader, planned, strict=True):
            expected = collate([data.structure(k, epoch) for k in plan])
            assert torch.equal(batch.positions, expected.positions)
            assert torch.equal(batch.forces, expected.forces)
    assert torch.equal(torch.get_rng_state(), state)


def test_neighbors_are_attached_in_the_loader(xyz_file: Path) -> None:
    graph = pytest.importorskip("escaip.graph")
    module = AtomicDataModule(str(xyz_file), max_atoms=60, split={"val": 0}, neighbor_cutoff=3.0)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    expected = graph.neighbor_list(batch, 3.0)
    assert torch.equal(batch.edge_index, torch.stack([expected.center, expected.neighbor]))
    assert torch.equal(batch.edge_shift, expected.shift)
    assert bool((batch.edge_cutoff == 3.0).all())


class Recorder(lightning.LightningModule):
    """Keeps the names of the structures of every batch; optionally dies like a killed process."""

    def __init__(self, die_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, tuple[str, ...]]] = []
        self.die_at = die_at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.die_at is not None and self.trainer.global_step == self.die_at:
            raise KeyboardInterrupt
        self.seen.append((self.current_epoch, tuple(batch.structure_id)))
        return (self.weight * batch.num_graphs).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(xyz_file: Path, folder: Path, workers: int, resume: Path | None = None, die_at: int | None = None) -> Recorder:
    data = AtomicDataModule(str(xyz_file), batch_size=5, split={"val": 0.2}, num_workers=workers, start_method="fork")
    recorder = Recorder(die_at)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1
    )
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, callbacks=[saver], enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    try:
        trainer.fit(recorder, data, ckpt_path=resume, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        assert die_at is not None
    return recorder


@pytest.mark.filterwarnings("ignore:.*does not have many workers:")
@pytest.mark.filterwarnings("ignore:The dirpath has changed:")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt:")
@pytest.mark.parametrize(("workers", "stop"), [(0, 1), (2, 14), (0, 10), (0, 19)])
def test_a_killed_run_goes_on_with_the_same_batches(xyz_file: Path, tmp_path: Path, workers: int, stop: int) -> None:
    before = set(multiprocessing.active_children())
    whole = run(xyz_file, tmp_path / "a", 0).seen
    per_epoch = sum(epoch == 0 for epoch, _ in whole)
    assert per_epoch == 10
    assert len(whole) == 30
    assert len({batch for _, batch in whole}) > 20
    dead = run(xyz_file, tmp_path / "b", workers, die_at=stop).seen
    assert dead == whole[:stop]
    resumed = run(xyz_file, tmp_path / "c", workers, resume=tmp_path / "b" / f"step={stop}.ckpt").seen
    assert resumed == whole[stop:]
    assert set(multiprocessing.active_children()) <= before  # the loader's processes end with the training


@pytest.mark.filterwarnings("ignore:.*does not have many workers:")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
@pytest.mark.filterwarnings("ignore:Total length of .list. across ranks is zero:")
def test_a_run_without_validation_set(xyz_file: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(recorder, AtomicDataModule(str(xyz_file), batch_size=10, split={"val": 0}))
    assert sorted(name for _, batch in recorder.seen for name in batch) == sorted(f"made.extxyz:{k}" for k in range(60))


def test_a_state_from_other_batches_is_refused(xyz_file: Path) -> None:
    module = AtomicDataModule(str(xyz_file), batch_size=5, split={"val": 0})
    module.setup("fit")
    loader = module.train_dataloader()
    with pytest.raises(DataError, match="had 99 batches, now there are 12"):
        loader.load_state_dict({"epoch": 0, "consumed": 3, "num_batches": 99})
    loader.load_state_dict({"epoch": 0, "consumed": 99, "num_batches": 99})
    loader.load_state_dict({"epoch": 4, "consumed": 5, "num_batches": 12})
    assert loader.state_dict() == {"epoch": 4, "consumed": 5, "num_batches": 12}
    assert len(names(loader, 4)) == 7
    assert len(names(loader, 4)) == 12


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "stage", "message"),
    [
        ({}, "fit", "give max_atoms"),
        ({"max_atoms": 60, "oversized": "ignore"}, "fit", "oversized"),
        ({"max_atoms": 60, "start_method": "telepathy"}, "fit", "start_method"),
        ({"max_atoms": 60, "isolated_energies": {"Qq": 1.0}}, "fit", "'Qq' is no element"),
        ({"max_atoms": 60}, "test", r"data.test: name the data"),
        ({"max_atoms": 60, "val": {"keys": {"energy": "e"}}}, "fit", "data.val: has no path"),
        ({"max_atoms": 60, "required_labels": ("dipole",)}, "fit", "required_labels: 'dipole'"),
        ({"max_atoms": 60, "fixed_atoms": "some"}, "fit", "fixed_atoms: 'some'"),
        ({"max_atoms": 60, "train": None}, "fit", r"data.train: name the training data"),
    ],
)
def test_bad_arguments(xyz_file: Path, options: dict, stage: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AtomicDataModule(**{"train": str(xyz_file), **options}).setup(stage)


@pytest.mark.bad_input
def test_bad_data(xyz_file: Path, structures: list[AtomicData], tmp_path: Path) -> None:
    structures[5].forces[:] = torch.nan
    write_store(tmp_path / "store", structures)
    with pytest.raises(DataError, match=r"1 of 60 structures in .* have no forces, which required_labels asks for"):
        AtomicDataModule(str(tmp_path / "store"), batch_size=2).setup("fit")
    AtomicDataModule(str(tmp_path / "store"), batch_size=2, required_labels=("energy",)).setup("fit")
    with pytest.raises(DataError, match=r"data.train: 0 structures in .* check index"):
        AtomicDataModule({"path": str(xyz_file), "index": "100:"}, batch_size=2).setup("fit")
    one = AtomicDataModule({"path": str(xyz_file), "index": ":1"}, batch_size=2)
    for _ in range(2):  # a failure leaves nothing behind
        with pytest.raises(DataError, match="structure"):
            one.setup("fit")
    module = AtomicDataModule(str(xyz_file), max_atoms=8, split={"val": 0})
    with pytest.raises(ConfigError, match="only known after"):
        _ = module.statistics
    module.setup("fit")
    with pytest.raises(DataError, match=r"made.extxyz:30: has 9 atoms, more than max_atoms = 8"):
        module.train_dataloader()


def test_shipped_files_and_stores_by_mapping(structures: list[AtomicData], tmp_path: Path) -> None:
    write_store(tmp_path / "store", structures)
    module = AtomicDataModule(
        {"path": str(tmp_path / "store"), "format": "store"}, "dataset:spice/sample.hdf5", batch_size=8
    )
    module.setup("fit")
    assert len(module.datasets["train"]) == 60
    assert len(module.datasets["val"]) > 1000
