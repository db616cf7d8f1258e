from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from toys import assert_same, names

from escaip.data import AtomicData, Store, fit_statistics, open_source, store_writer
from escaip.data.prepare import prepare, prepare_named
from escaip.data.readers import Reading
from escaip.data.splits import SplitSettings, divide
from escaip.errors import ConfigError, DataError
from escaip.files import dataset_card
from escaip.types import TARGETS, Target


@pytest.fixture
def files(frames: list[Atoms], tmp_path: Path) -> Path:
    """Six files of ten structures."""
    folder = tmp_path / "native"
    folder.mkdir()
    for number in range(6):
        ase.io.write(folder / f"{number}.extxyz", frames[number * 10 : number * 10 + 10])
    return folder


def assert_holds(path: Path, expected: list[AtomicData]) -> None:
    store = Store(path)
    store.verify()
    for data, same in zip(store, expected, strict=True):
        assert_same(data, same)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_structures_in_the_same_order(
    files: Path, frames: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    if workers == 2:  # which know further targets too
        monkeypatch.setitem(TARGETS, "dipole", Target("dipole", False, (3,), "e·Å", "me·Å", 1e3))
        for k, atoms in enumerate(frames):
            atoms.info["dipole"] = [k, 0.0, 0.0]
        for number in range(6):
            ase.io.write(files / f"{number}.extxyz", frames[number * 10 : number * 10 + 10])
    report = prepare([str(files / "*.extxyz")], tmp_path / "s", workers=workers, shard_atoms=40)
    assert_holds(tmp_path / "s", list(open_source(str(files / "*.extxyz"))))
    assert (report.written, report.skipped, report.filtered, report.kept_parts) == (60, 0, 0, 0)
    assert names(tmp_path) == ["native", "s"]
    if workers == 2:
        assert Store(tmp_path / "s").batch(range(60)).dipole[:, 0].tolist() == list(range(60))


def test_parts_of_one_file_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escaip.data.prepare.PART_SIZE", 50)
    sample = dataset_card("omat24").path / "sample.aselmdb"
    prepare(sample, tmp_path / "s")
    assert_holds(tmp_path / "s", list(open_source(sample)))
    assert [shard["num_structures"] for shard in Store(tmp_path / "s").manifest["shards"]] == [50, 50, 50, 30]


def test_the_index_agrees_with_the_structures(files: Path, tmp_path: Path) -> None:
    prepare([str(files / "*.extxyz")], tmp_path / "s")
    store = Store(tmp_path / "s")
    index = store.index
    for row, data in enumerate(store):
        assert index["natoms"][row] == data.num_nodes
        assert index["energy"][row] == float(data.energy)
        assert index["force_square_sum"][row] == pytest.approx(float(data.forces.square().sum()), rel=1e-12)
        assert index["max_force"][row] == pytest.approx(float(data.forces.norm(dim=1).max()), rel=1e-6)
        assert index["labels"][row] == 3 + 4 * data.has_label("stress")
    assert len(np.unique(index["content_hash"])) == 60
    # Neighbors within 6 Å of an atom of the cubic copper cell (3.6 Å): shells of 12, 6, 24, 12, 24 up to 5.7 Å.
    assert index["num_edges"][55] == pytest.approx(4 * 78, abs=8)


def test_statistics_of_the_index_are_those_of_the_structures(files: Path, tmp_path: Path) -> None:
    prepare([str(files / "*.extxyz")], tmp_path / "s", split={"val": 0.3, "by": "structure"})
    store = Store(tmp_path / "s")
    expected = fit_statistics([store[k] for k in store.split_indices("train").tolist()])
    content = json.loads((tmp_path / "s" / "statistics.json").read_text())
    assert content["split"] == "train"
    assert content["statistics"]["num_structures"] == expected.num_structures == 42
    assert content["statistics"]["force_rms"] == pytest.approx(expected.force_rms, rel=1e-12)
    assert content["statistics"]["energy_residual_rms_per_atom"] == pytest.approx(
        expected.energy_residual_rms_per_atom, rel=1e-9
    )
    for z, energy in expected.element_references.items():
        assert content["statistics"]["element_references"][str(z)] == pytest.approx(energy, rel=1e-9)


def test_splits_by_source_and_by_fraction(files: Path, tmp_path: Path) -> None:
    given = {"train": [files / "0.extxyz", files / "1.extxyz"], "val": files / "2.extxyz"}
    assert prepare(given, tmp_path / "a").splits == {"train": 20, "val": 10}
    assert Store(tmp_path / "a").split_indices("val").tolist() == list(range(20, 30))
    divided = prepare([str(files / "*.extxyz")], tmp_path / "b", split={"val": 0.2, "test": 10}, seed=3)
    assert list(divided.splits) == ["train", "val", "test"]
    store = Store(tmp_path / "b")
    expected = divide(store.groups, store.index["group_codes"], SplitSettings(val=0.2, test=10), seed=3)
    assert np.array_equal(store.index["split"], expected)
    assert prepare([str(files / "*.extxyz")], tmp_path / "c", split={"test": 0.2, "val": 0}).splits == {
        "train": 50,
        "test": 10,
    }
    read = [data.structure_id for data in open_source(tmp_path / "b", split="val")]
    assert read == [store.structure_id(k) for k in store.split_indices("val").tolist()]
    with pytest.raises(ConfigError, match="has no split 'x'; it has train, val, test"):
        store.split_indices("x")


def test_duplicates_across_splits_are_counted(files: Path, tmp_path: Path) -> None:
    given = {"train": files / "0.extxyz", "val": [files / "1.extxyz", files / "0.extxyz"]}
    report = prepare(given, tmp_path / "s")
    assert report.duplicates == 10
    assert "10 structures of other splits are also in train" in report.summary()


def test_a_limit_counts_through_files(files: Path, tmp_path: Path) -> None:
    prepare([str(files / "*.extxyz")], tmp_path / "s", reading=Reading(limit=13))
    assert_holds(tmp_path / "s", list(open_source(str(files / "*.extxyz"), limit=13)))


def test_what_is_left_out_is_written_down(files: Path, tmp_path: Path) -> None:
    reading = Reading(on_error="skip", required_labels=("stress",))
    report = prepare([str(files / "*.extxyz")], tmp_path / "s", reading=reading)
    assert (report.written, report.skipped) == (10, 50)
    lines = (tmp_path / "s" / "skipped.txt").read_text().splitlines()
    assert len(lines) == 50
    assert lines[0].startswith("0.extxyz:0: has no stress")


def test_by_the_name_of_a_data_set(tmp_path: Path) -> None:
    report = prepare_named("spice", ["dataset:spice/sample.hdf5"], tmp_path / "s", options={"limit": 40})
    assert report.written == 40
    manifest = Store(tmp_path / "s").manifest
    assert manifest["dataset"] == "spice"
    assert "GFN2" in manifest["level_of_theory"]  # of the sample, which is not SPICE
    assert manifest["licence"] == "CC0-1.0"
    with pytest.raises(ConfigError, match=r"'spise' is neither a data set \(.*spice.*\) nor a layout \(.*ase"):
        prepare_named("spise", ["x"], tmp_path / "t", options={})
    with pytest.raises(ConfigError, match="has no split while others do"):
        prepare_named("ase", ["train=a.xyz", "b.xyz"], tmp_path / "t", options={})


def killed(files: Path, out: Path) -> None:
    """A slowed run of two workers that is killed without warning some time after it has made two parts."""
    code = (
        "from escaip.data.prepare import prepare\n"
        "import sys, time, escaip.data.store_writer as parts\n"
        "genuine = parts.PartWriter.write\n"
        "def slow(self, data):\n"
        "    time.sleep(0.02)\n"
        "    genuine(self, data)\n"
        "parts.PartWriter.write = slow\n"
        "if __name__ == '__main__':\n    prepare([sys.argv[1]], sys.argv[2], workers=2, shard_atoms=25)\n"
    )
    script = out.with_suffix(".py")
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script), str(files / "*.extxyz"), str(out)])
    deadline = time.monotonic() + 60
    work = out.parent / f".{out.name}.work"
    while time.monotonic() < deadline and len(list(work.glob("part-*"))) < 2:
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_and_run_again(files: Path, tmp_path: Path) -> None:
    killed(files, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    report = prepare([str(files / "*.extxyz")], tmp_path / "s", shard_atoms=25)
    assert 2 <= report.kept_parts < 6
    assert_holds(tmp_path / "s", list(open_source(str(files / "*.extxyz"))))


def test_a_worker_that_outlives_its_run_gives_no_emptied_part_its_name(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = tmp_path / ".s.work" / "making-part-000000-1"
    leftover.mkdir(parents=True)
    (leftover / "part.json").write_text('{"shards": [], "skipped": 0, "filtered": 0, "messages": []}')
    genuine = shutil.rmtree

    def late(path: Path, **options: Any) -> None:
        if leftover.exists():
            leftover.rename(leftover.with_name("part-000000"))
        genuine(path, **options)

    monkeypatch.setattr(shutil, "rmtree", late)
    assert prepare([str(files / "*.extxyz")], tmp_path / "s").written == 60


@pytest.mark.parametrize("point", ["assemble", "_finish", "publish"])
def test_interrupted_while_joining(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    import escaip.data.prepare as module

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, point, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(files / "*.extxyz")], tmp_path / "s")
    report = prepare([str(files / "*.extxyz")], tmp_path / "s")
    assert report.kept_parts == 6
    assert_holds(tmp_path / "s", list(open_source(str(files / "*.extxyz"))))


@pytest.mark.bad_input
def test_a_bad_file_costs_only_itself(files: Path, frames: list[Atoms], tmp_path: Path) -> None:
    text = (files / "4.extxyz").read_text()
    (files / "4.extxyz").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"4.extxyz: damaged or truncated after \d structures"):
        prepare([str(files / "*.extxyz")], tmp_path / "s")
    (files / "4.extxyz").write_text(text)
    report = prepare([str(files / "*.extxyz")], tmp_path / "s")
    assert report.kept_parts == 4
    assert_holds(tmp_path / "s", list(open_source(str(files / "*.extxyz"))))


@pytest.mark.bad_input
def test_a_changed_file_is_read_again(files: Path, frames: list[Atoms], tmp_path: Path) -> None:
    (files / "5.extxyz").write_text("3\n")
    with pytest.raises(DataError, match=r"5.extxyz"):
        prepare([str(files / "*.extxyz")], tmp_path / "s")
    ase.io.write(files / "0.extxyz", frames[7:20])
    ase.io.write(files / "5.extxyz", frames[50:])
    report = prepare([str(files / "*.extxyz")], tmp_path / "s")
    assert report.kept_parts == 4
    assert_holds(tmp_path / "s", list(open_source(str(files / "*.extxyz"))))


@pytest.mark.bad_input
def test_other_options_do_not_mix(files: Path, tmp_path: Path) -> None:
    (files / "5.extxyz").write_text("3\n")
    with pytest.raises(DataError):
        prepare([str(files / "*.extxyz")], tmp_path / "s")
    (files / "5.extxyz").unlink()
    with pytest.raises(DataError, match=r"\.s\.work: holds unfinished work with other options; .* --restart"):
        prepare([str(files / "*.extxyz")], tmp_path / "s", dtype="float32")
    assert prepare([str(files / "*.extxyz")], tmp_path / "s", dtype="float32", restart=True).kept_parts == 0
    assert Store(tmp_path / "s").manifest["dtype"] == "float32"


@pytest.mark.bad_input
def test_unfinished_work_without_structures_is_in_no_way(files: Path, tmp_path: Path) -> None:
    source, work = [str(files / "*.extxyz")], tmp_path / ".s.work"
    with pytest.raises(DataError, match="no energy under the key 'enrgy'"):
        prepare(source, tmp_path / "s", reading=Reading(keys={"energy": "enrgy"}))
    assert not work.exists()
    (work / "making-part-000000-1").mkdir(parents=True)  # of a run that was killed in its first part
    (work / "plan.json").write_text(json.dumps({"settings": ["others"], "items": []}))
    assert prepare(source, tmp_path / "s").written == 60


@pytest.mark.bad_input
def test_a_full_disk_keeps_whole_parts(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, calls = store_writer.PartWriter.close, 0

    def full(self: Any, **facts: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        genuine(self, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(store_writer.PartWriter, "close", full)
        with pytest.raises(DataError, match="the disk is full, whole parts were kept for the next run; free space"):
            prepare([str(files / "*.extxyz")], tmp_path / "s")
    assert prepare([str(files / "*.extxyz")], tmp_path / "s").kept_parts == 3


@pytest.mark.bad_input
def test_one_process_at_a_time(files: Path, tmp_path: Path) -> None:
    work = tmp_path / ".s.work"
    work.mkdir()
    with open(work / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is preparing it"):
            prepare([str(files / "*.extxyz")], tmp_path / "s")


@pytest.mark.bad_input
def test_bad_settings(files: Path, tmp_path: Path) -> None:
    for options, error, message in (
        ({"workers": 0}, ConfigError, "workers: 0"),
        ({"dtype": "half"}, ConfigError, "dtype: 'half'"),
        ({"source": {"train": files / "0.extxyz"}, "split": {"val": 0.1}}, ConfigError, "named by split already"),
        ({"reading": Reading(keys={"enregy": "x"})}, ConfigError, "keys: unknown label"),
        ({"reading": Reading(options={"subset": "x"})}, ConfigError, "has no option 'subset'"),
        ({"reading": Reading(options={"index": "99:"})}, DataError, "0 structures to write"),
    ):
        with pytest.raises(error, match=message):
            prepare(**{"source": files / "0.extxyz", "out": tmp_path / "s", **options})
    assert names(tmp_path) == ["native"]


@pytest.mark.bad_input
def test_a_source_that_cannot_be_read_is_named(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Any, files: Any, report: Any, part: Any = None) -> Any:
        if not files:
            return iter(())  # settings are checked
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/0.extxyz")

    monkeypatch.setattr(Reading, "stream", refused)
    with pytest.raises(DataError, match=r"^/elsewhere/0.extxyz: cannot be read \(Permission denied\)"):
        prepare(files / "0.extxyz", tmp_path / "s")
