"""Training real sets on one GPU: how time is divided, what a run changes, what travels. Trains nothing."""

from __future__ import annotations

import json
import lzma
import math
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu import fitted, fitting, pack, training
from gpu.fitting import Clock, Job
from gpu.pack import MIB, Limits
from gpu.training import Times
from real_data import NUM_VALIDATIONS, Timing, fit_arguments, steps_within
from real_data_report import errors_by_file, read_log
from real_data_sets import SETS, RealSet, assign_parts, describe_split, divided, prepare, thin_validation

from escaip.data import AtomicData, Store
from escaip.errors import DataError
from escaip.evaluate import Records
from escaip.graph import search_cutoff
from escaip.models import EScAIPConfig
from escaip.train.cli import build

SharedData = Callable[[str], Path]


def atoms(numbers: list[int], name: str, group: str, energy: float = -1.0) -> AtomicData:
    return AtomicData.from_fields({
        "positions": torch.arange(3.0 * len(numbers), dtype=torch.float64).view(-1, 3),
        "atomic_numbers": torch.tensor(numbers), "cell": torch.zeros(1, 3, 3, dtype=torch.float64),
        "pbc": torch.zeros(1, 3, dtype=torch.bool), "charge": torch.tensor([0]),
        "spin_multiplicity": torch.tensor([1]), "energy": torch.tensor([energy], dtype=torch.float64),
        "forces": torch.full((len(numbers), 3), 0.25, dtype=torch.float64),
        "stress": torch.full((1, 3, 3), math.nan, dtype=torch.float64),
        "fixed": torch.zeros(len(numbers), dtype=torch.bool), "tags": torch.zeros(len(numbers), dtype=torch.int64),
        "dataset": torch.tensor([-1]), "structure_id": name, "group": group, "num_nodes": len(numbers),
    })  # fmt: skip


# Planning


@pytest.mark.parametrize("seconds", [5.0, 60.0, 173.0, 3600.0])
@pytest.mark.parametrize("step", [0.004, 0.1, 1.7])
def test_planned_steps_and_validations_end_in_time(seconds: float, step: float) -> None:
    timing = Timing(step=step, validation=0.4, start=1.0)
    steps = steps_within(seconds, timing)
    assert steps > 0
    assert steps % NUM_VALIDATIONS == 0
    taken = timing.start + NUM_VALIDATIONS * timing.validation + steps * step
    assert taken <= seconds or steps == NUM_VALIDATIONS
    more = taken + NUM_VALIDATIONS * step
    assert more > 0.9 * seconds  # and use it


def test_shares_are_equal_and_end_in_time() -> None:
    times = Times.divide(540.0, runs=12, workers=4)
    assert times.share == pytest.approx(times.last / 3)
    now, ends = 0.0, []
    for _ in range(3):
        ends.append(times.deadline(now))
        now = ends[-1]
    assert np.diff([0.0, *ends]) == pytest.approx(times.share)
    assert ends[-1] + training.GRACE < 540.0
    assert Times.divide(540.0, runs=13, workers=4).share == pytest.approx(times.last / 4)


def test_a_run_is_not_begun_without_time() -> None:
    times = Times.divide(540.0, runs=12, workers=4)
    assert times.deadline(times.last - 60.0) == times.last
    assert times.deadline(times.last - 20.0) is None
    assert Times.divide(60.0, runs=4, workers=1).deadline(0.0) is not None  # short shares are begun all the same


def test_the_clock_leaves_warm_up_and_validations_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(warm_up=1, enough=(3, 2.5))
    trainer, batch = SimpleNamespace(global_step=0, should_stop=False), SimpleNamespace(positions=torch.zeros(7, 3))
    now = [0.0]
    monkeypatch.setattr(fitting.time, "perf_counter", lambda: now[0])

    def step(seconds: float) -> None:
        now[0] += seconds
        trainer.global_step += 1
        clock.on_train_batch_end(trainer, None, None, batch, 0)  # type: ignore[arg-type]

    step(30.0)
    step(1.0)
    clock.on_validation_start(trainer, None)  # type: ignore[arg-type]
    now[0] += 5.0
    clock.on_validation_end(trainer, None)  # type: ignore[arg-type]
    step(1.0)
    step(1.0)
    assert not trainer.should_stop
    step(1.0)
    assert trainer.should_stop
    assert clock.intervals == [1.0, 1.0, 1.0]
    assert (clock.atoms, clock.validation_seconds) == (21, 5.0)


# What a run changes


def job(tmp_path: Path, **fields: Any) -> Job:
    given = {"name": "inp-1m", "set": "inp", "size": "1m", "device": "cpu", "deadline": 0.0, **fields}
    return Job(data=str(tmp_path / "data"), folder=str(tmp_path / "run"), **given)


def test_a_gpu_has_larger_batches_and_a_somewhat_higher_rate(tmp_path: Path) -> None:
    assert "data.max_atoms" not in fitting.changes(job(tmp_path))
    found = fitting.changes(job(tmp_path, device="cuda"))
    assert found["data.max_atoms"] == 512
    assert found["model.learning_rate"] == pytest.approx(2e-3 * 2**0.5, rel=1e-2)
    assert found["data.neighbor_cutoff"] == search_cutoff(EScAIPConfig.preset("1m", cutoff=5.5, num_neighbors=20).graph)
    assert "model.base_width" not in found


@pytest.mark.parametrize(("name", "size"), [("mptrj", "5m"), ("solvents", "1m"), ("oc20_direct", "5m")])
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_recipes_carry_over_to_sizes(name: str, size: str, tmp_path: Path) -> None:
    chosen = SETS[name]
    stores = {part: tmp_path / part for part in ("train", "val", "test")}
    on_gpu = fitting.changes(job(tmp_path, set=name, size=size, device="cuda"))
    on_gpu |= {"trainer.accelerator": "cpu"}
    cli = build(fit_arguments(chosen, stores, tmp_path, 80, on_gpu))
    config = cli.model.potential.config
    assert (config.hidden_size, cli.model.base_width) == ((192, 96) if size == "5m" else (96, None))
    assert config.is_conservative == (name != "oc20_direct")
    assert (cli.trainer.max_steps, cli.trainer.val_check_interval) == (80, 10)
    assert cli.model.losses.stress.weight == (50.0 if name == "mptrj" else 0.0)


# What travels


def test_files_find_room_by_priority() -> None:
    sizes = {"plot": MIB, "a": 6 * MIB, "b": 6 * MIB, "c": 7 * MIB, "large": 14 * MIB, "d": 7 * MIB}
    limits = Limits(file_bytes=15 * MIB, all_bytes=40 * MIB, files=2)
    assert pack.choose(sizes, limits) == [["plot", "a", "b"], ["c", "d"]]
    limits = Limits(file_bytes=15 * MIB, all_bytes=45 * MIB, files=3)
    assert pack.choose(sizes, limits) == [["plot", "a", "b"], ["c", "d"], ["large"]]
    limits = Limits(file_bytes=15 * MIB, all_bytes=30 * MIB, files=3)
    assert pack.choose(sizes, limits) == [["plot", "a", "b"], ["c", "d"]]
    assert pack.choose({"too large": 16 * MIB}, limits) == []


def test_archives_stay_within_their_limits(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    files = {}
    for number in range(40):
        path = tmp_path / f"file-{number}"
        path.write_bytes(random.bytes(int(random.integers(0, 40_000))))
        files[f"{path.name}.bin"] = path
    limits = Limits(file_bytes=100_000, all_bytes=350_000, files=5)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x-9.tar").touch()  # of an earlier call
    found = pack.write_archives(files, tmp_path / "out", "x", limits)
    written = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in written] == sorted(set(found.values()))
    assert 2 < len(written) <= limits.files
    assert max(path.stat().st_size for path in written) <= limits.file_bytes
    assert 250_000 < sum(path.stat().st_size for path in written) <= limits.all_bytes
    assert found["file-0.bin"] == "x-0.tar"
    for member, archive in found.items():
        with tarfile.open(tmp_path / "out" / archive) as stream:
            content = stream.extractfile(member)
            assert content is not None
            assert content.read() == files[member].read_bytes()


def test_weights_are_compressed_and_come_back(tmp_path: Path) -> None:
    plain = (0.02 * np.random.default_rng(0).standard_normal(200_000)).astype("f4").tobytes()
    (tmp_path / "a").write_bytes(plain)
    pack.compress(tmp_path / "a", tmp_path / "a.xz")
    assert lzma.decompress((tmp_path / "a.xz").read_bytes()) == plain
    assert (tmp_path / "a.xz").stat().st_size < 0.88 * len(plain)  # 5m: 16.5 MiB, of 15.5 at most
    assert Limits().file_bytes > 0.88 * 16.52 * MIB


def test_a_curve_is_thinned_and_a_kill_leaves_it_readable(tmp_path: Path) -> None:
    folder = tmp_path / "version_0"
    folder.mkdir()
    lines = [f"{step},0.1,{1000.0 / (step + 1)}," for step in range(1000)]
    lines[500] = "500,0.1,nan,"
    lines[10] = "10,,,25.5"
    (folder / "metrics.csv").write_text("\n".join(["step,lr,train/loss,val/loss", *lines, "1000,0.1"]))
    curve = fitted.read_curve(tmp_path)
    assert max(read_log(tmp_path)["lr"]) == 999
    assert curve["val/loss"] == [(10, 25.5)]
    assert len(curve["train/loss"]) == fitted.CURVE_POINTS
    assert curve["train/loss"][-1][0] == 999
    assert all(math.isfinite(value) for _, value in curve["train/loss"])


# Sets


def test_a_group_stays_whole_across_files() -> None:
    chosen = RealSet("x", {"a": {}, "b": {"index": ":3"}}, "group", "", options={"keys": {"group": "id"}})
    assert chosen.sources == {"a": {"keys": {"group": "id"}}, "b": {"keys": {"group": "id"}, "index": ":3"}}
    structures = [atoms([1, 8], f"{'ab'[i % 2]}:{i}", f"g{i % 17}") for i in range(51)]
    structures.append(atoms([1, 92], "b:51", "the only one with U"))
    assigned = thin_validation(structures, assign_parts(structures, chosen), 10)
    part_of: dict[str, set[str]] = {}
    for data, part in zip(structures, assigned, strict=True):
        part_of.setdefault(data.group, set()).add(part.replace("unused", "val"))
    assert all(len(parts) == 1 for parts in part_of.values())
    assert part_of["the only one with U"] == {"train"}
    assert sum(data.num_nodes for data, part in zip(structures, assigned) if part == "val") <= 10
    described = describe_split(structures, assigned, chosen)
    assert described["source"] == "a b"
    assert not set(described["test"]["group_names"]) & set(described["val"]["group_names"])


@pytest.mark.parametrize("name", ["mptrj", "solvents"])
def test_real_groups_stay_whole(name: str, shared_data: SharedData, tmp_path: Path) -> None:
    chosen = SETS[name]
    for path in chosen.sources:
        data = shared_data(path).parents[1]
    stores = prepare(chosen, data, tmp_path, dtype="float32", max_val_atoms=pack.MAX_VAL_ATOMS)
    assert divided(chosen, tmp_path) == stores
    parts = {part: list(Store(path)) for part, path in stores.items()}
    groups = {part: {data.group for data in structures} for part, structures in parts.items()}
    assert not groups["train"] & (groups["val"] | groups["test"])
    assert not groups["val"] & groups["test"]
    elements = {part: {z for data in found for z in data.atomic_numbers.tolist()} for part, found in parts.items()}
    assert elements["val"] | elements["test"] <= elements["train"]
    files = {data.structure_id.partition(":")[0] for data in parts["test"]}
    assert files == {Path(path).name for path in chosen.sources}
    assert all(data.num_nodes > 1 or data.pbc.any() for found in parts.values() for data in found)
    assert 0.1 < len(groups["test"]) / sum(len(found) for found in groups.values()) < 0.3


def test_sets_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no inp, mptrj: make it by python benchmarks/gpu/pack\.py"):
        training.train_sets(tmp_path, tmp_path, 10.0, "cpu", only=["inp", "mptrj"])
    with pytest.raises(DataError, match="no such file"):
        pack.pack(tmp_path, tmp_path, ["solvents"])


def test_errors_of_each_file_by_hand() -> None:
    records = Records(
        structure_id=("a.xyz:0", "b.xyz:7"), num_atoms=np.array([1, 2]), numbers=np.array([1, 1, 1]),
        fixed=np.array([False, False, True]), structure=np.array([0, 1, 1]), reference_energy=np.zeros(2),
        labels={"energy": np.array([1.0, 2.0]), "forces": np.full((3, 3), 0.5)},
        predictions={"energy": np.array([1.5, 1.0]), "forces": np.array([[0.4] * 3, [0.7] * 3, [9.0] * 3])},
    )  # fmt: skip
    found = errors_by_file(records, free_atoms_only=True)
    assert found["a.xyz"] == pytest.approx({"structures": 1, "energy": 500.0, "forces": 100.0, "zero_forces": 500.0})
    assert found["b.xyz"] == pytest.approx({"structures": 1, "energy": 500.0, "forces": 200.0, "zero_forces": 500.0})


# Runs that end well, fail, or are cut


def results(tmp_path: Path) -> tuple[fitted.Results, Job]:
    folder = tmp_path / "data" / "inp"
    for part in ("train", "val", "test"):
        with pack_store(folder / part) as writer:
            for number in range(3):
                writer.write(atoms([15, 49, 49], f"inp:{number}", "g", energy=-3.0 - number))
    parts = {part: {"structures": 3, "atoms": 9} for part in ("train", "val", "test")}
    (folder / "split.json").write_text(json.dumps({"split": "structure", **parts}))
    return fitted.Results(tmp_path / "data", tmp_path / "out", tmp_path), job(tmp_path)


def pack_store(path: Path) -> Any:
    from escaip.data import StoreWriter

    return StoreWriter(path, dtype="float32")


def test_a_run_that_was_cut_is_a_row_and_is_evaluated_later(tmp_path: Path) -> None:
    found, one = results(tmp_path)
    checkpoint = one.path / "runs" / "version_0" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    (checkpoint.parent / "metrics.csv").write_text("step,train/loss\n0,2.0\n30,1.0\n")
    (one.path / fitting.TRAINED).write_text(json.dumps({"steps": 0, "failed": "cut before its 80 steps"}))
    row = found.add(one, "cut by the time", 63.0)
    assert (row["failed"], row["steps"], row["energy"]) == ("cut by the time", 31, None)
    assert row["zero_forces"] == pytest.approx(250.0)
    assert found.without_errors() == []
    checkpoint.touch()
    assert found.without_errors() == [one]
    (one.path / fitting.ERRORS).write_text(json.dumps({"energy": 3.0, "forces": 125.0}))
    one.checkpoint.write_bytes(b"weights")
    found.update(one)
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["rows"] == [json.loads(json.dumps(row))]
    assert (row["failed"], row["energy"], row["model"]) == ("cut by the time", 3.0, "training-0.tar")
    assert written["curves"]["inp-1m"]["train/loss"] == [[0, 2.0], [30, 1.0]]
    assert "cut by the time" in fitted.table([row])


def ended(one: Job, script: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Job, str | None]:
    """What the pool says of a run whose process is a script."""
    file = one.path.with_suffix(".py")
    file.write_text(script)
    monkeypatch.setattr(training, "fitting", SimpleNamespace(__file__=str(file)))
    with training.Pool(1, "cpu") as pool:
        pool.start(one)
        found: list[tuple[Job, str | None, float]] = []
        while not found:
            found = list(pool.ended())
        assert not pool.running
    return found[0][:2]


def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = job(tmp_path, deadline=training.time.time() + 600.0)
    assert ended(one, "print('CUDA error: unspecified launch failure'); exit(1)", monkeypatch) == (
        one, "CUDA error: unspecified launch failure",
    )  # fmt: skip
    assert ended(one, "pass", monkeypatch) == (one, None)
    assert json.loads((one.path / "job.json").read_text())["name"] == "inp-1m"


def test_a_run_that_hangs_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = job(tmp_path, deadline=training.time.time() - training.GRACE + 0.5)
    assert ended(late, "import time; time.sleep(600)", monkeypatch) == (late, "cut by the time")


def test_a_set_that_was_not_divided_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no divided mptrj: run benchmarks/gpu/pack\.py"):
        _ = job(tmp_path, set="mptrj").stores


def test_models_of_the_base_size_come_first(tmp_path: Path) -> None:
    found, _ = results(tmp_path)
    for name, size, forces in (("a", "5m", 20.0), ("b", "5m", 10.0), ("c", "1m", 40.0)):
        each = job(tmp_path / name, name=name, size=size)
        each.path.mkdir(parents=True)
        each.checkpoint.write_bytes(b"weights")
        (each.path / fitting.ERRORS).write_text(json.dumps({"energy": 1.0, "forces": forces}))
        found.add(each, None, 1.0)
    assert list(found._wanted()) == ["c.escaip.xz", "b.escaip.xz", "a.escaip.xz"]
