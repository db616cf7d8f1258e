"""LMDB files, lists and batches of Open Catalyst records: what they hold, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data
from toys import assert_bad, assert_parts, write_lmdb

from escaip.data import AtomicData, open_source
from escaip.data.readers import check_magnitudes, ocp_lmdb
from escaip.data.readers.ocp_lmdb import READER, divide, list_lmdb_files, matches, matches_pyg, read_ocp_lmdb, read_pyg
from escaip.data.readers.policy import ReadPolicy
from escaip.errors import ConfigError, DataError
from escaip.files import dataset_card
from escaip.units import Units

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")

OC20 = dataset_card("oc20").path
OC22 = dataset_card("oc22").path / "sample" / "data.0000.lmdb"
SAMPLES = [OC20 / "sample_lmdb" / name for name in ("data.0000.lmdb", "data.0001.lmdb")]
RNG = np.random.default_rng(0)


def record(**changes: Any) -> dict[str, Any]:
    """A slab of four atoms with an adsorption energy; None leaves an attribute out."""
    fields: dict[str, Any] = {
        "y": -1.25,
        "pos": torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 1.0, 1.5]]),
        "atomic_numbers": torch.tensor([29.0, 29.0, 29.0, 8.0]),
        "cell": torch.tensor([[[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 15.0]]]),
        "natoms": 4,
        "tags": torch.tensor([0, 1, 1, 2]),
        "fixed": torch.tensor([1.0, 0.0, 0.0, 0.0]),
        "force": torch.tensor(RNG.normal(size=(4, 3)), dtype=torch.float32),
        "sid": 77,
        "fid": 3,
    }
    fields.update(changes)
    return {key: value for key, value in fields.items() if value is not None}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes records, or raw values by key, as an LMDB file."""

    def make(values: list[Any] | dict[bytes, bytes], name: str = "made.lmdb", length: int | None = -1) -> Path:
        entries = values
        if isinstance(values, list):
            entries = {str(k).encode(): pickle.dumps(Data(**value), protocol=-1) for k, value in enumerate(values)}
            if length is not None:
                entries[b"length"] = pickle.dumps(len(values) if length < 0 else length)
        return write_lmdb(tmp_path / name, entries)

    return make


def read(path: Path, policy: ReadPolicy | None = None, **options: Any) -> list[AtomicData]:
    return list(read_ocp_lmdb(path, path.name, policy or ReadPolicy(), **options))


def read_file(path: Path, **options: Any) -> list[AtomicData]:
    return list(read_pyg(path, path.name, ReadPolicy(), **options))


@pytest.mark.parametrize("path", SAMPLES, ids=["PyG 2", "PyG 1"])
def test_sample_is_the_published_form_of_the_same_frames(path: Path) -> None:
    raw = {
        data.structure_id.split(":", 1)[1].removeprefix("random"): data
        for data in open_source(OC20 / "sample" / "0.extxyz.xz", energy="total")
    }
    adsorption = read(path, energy="adsorption")
    total = read(path, energy="adsorption", reference=OC20 / "sample_ref.pkl")
    assert len(adsorption) == len(total) == 40
    for data, summed in zip(adsorption, total, strict=True):
        file, system, frame = data.structure_id.split(":")
        same = raw[f"{system.removeprefix('sid')}:{frame}"]
        assert file == path.name
        assert data.group == system
        assert same.group == system.replace("sid", "random")
        assert float(summed.energy) == pytest.approx(float(same.energy), abs=1e-9)
        assert -5.0 < float(data.energy) < 13.0
        torch.testing.assert_close(data.positions, same.positions, atol=2e-6, rtol=0)
        torch.testing.assert_close(data.forces, same.forces, atol=1e-5, rtol=1e-6)
        for name in ("atomic_numbers", "fixed", "tags", "pbc"):
            assert torch.equal(data[name], same[name]), name
    assert len({data.structure_id for data in adsorption}) == 40


def test_parts_are_the_whole() -> None:
    assert divide(SAMPLES[0], 12) == [(0, 12), (12, 24), (24, 36), (36, 40)]
    assert_parts(SAMPLES[0], divide, partial(read, energy="adsorption"), 12)


def test_numbers_count_not_the_order_of_keys(write: Callable[..., Path]) -> None:
    path = write([record(fid=k) for k in range(12)])
    assert [data.structure_id for data in read(path, energy="adsorption")] == [
        f"made.lmdb:sid77:{k}" for k in range(12)
    ]
    bare = write([record(fid=k) for k in range(12)], "bare.lmdb", length=None)
    assert len(read(bare, energy="adsorption")) == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"y": None, "force": None, "energy": -1.25, "forces": torch.full((4, 3), 0.5)},
        {"y": torch.tensor([-1.25]), "force": torch.full((4, 3), 0.5)},
        {"y": np.float64(-1.25), "force": np.full((4, 3), 0.5), "pos": record()["pos"].numpy()},
        {"natoms": torch.tensor([4]), "sid": torch.tensor([77]), "force": torch.full((4, 3), 0.5)},
        {
            "cell": record()["cell"][0],
            "edge_index": torch.zeros(2, 9, dtype=torch.long),
            "force": torch.full((4, 3), 0.5),
        },
    ],
)
def test_forms_of_the_same_record(changes: dict[str, Any], write: Callable[..., Path]) -> None:
    (data,) = read(write([record(**changes)]), energy="adsorption")
    assert float(data.energy) == -1.25
    assert torch.equal(data.forces, torch.full((4, 3), 0.5, dtype=torch.float64))
    assert data.fixed.tolist() == [True, False, False, False]
    assert data.tags.tolist() == [0, 1, 1, 2]
    assert data.pbc.all()
    assert (data.structure_id, data.group) == ("made.lmdb:sid77:3", "sid77")


def test_systems_by_name_and_none(write: Callable[..., Path]) -> None:
    path = write([record(sid="random5", fid=1), record(sid="random5", fid=None), record(sid=None, fid=None)])
    found = [(data.structure_id, data.group) for data in read(path, energy="adsorption")]
    assert found == [
        ("made.lmdb:random5:1", "random5"),
        ("made.lmdb:random5:1", "random5"),
        ("made.lmdb:2", "Cu3O"),
    ]


def test_test_files_have_no_labels_and_need_no_statement(write: Callable[..., Path]) -> None:
    path = write([record(y=None, force=None)])
    (data,) = read(path)
    assert not data.has_label("energy")
    assert not data.has_label("forces")
    with pytest.raises(
        DataError, match=r"sid77:3: has no energy, which required_labels asks for; found record keys at"
    ):
        read(path, ReadPolicy(required=("energy",)))


def relaxation(**changes: Any) -> dict[str, Any]:
    moved = record()["pos"] + torch.tensor([0.0, 0.0, 0.25])
    return record(y=None, force=None, fid=None, y_init=3.0, y_relaxed=-2.0, pos_relaxed=moved, **changes)


def test_relaxations(write: Callable[..., Path]) -> None:
    path = write([relaxation(sid=1), relaxation(sid=2)])
    initial = read(path, energy="adsorption", is2re="initial")
    relaxed = read(path, energy="adsorption", is2re="relaxed")
    for first, last in zip(initial, relaxed, strict=True):
        assert float(first.energy) == float(last.energy) == -2.0
        assert not first.has_label("forces")
        assert torch.equal(first.positions, record()["pos"].double())
        torch.testing.assert_close(last.positions[:, 2], first.positions[:, 2] + 0.25)
    assert [data.structure_id for data in initial] == ["made.lmdb:sid1", "made.lmdb:sid2"]


@pytest.mark.bad_input
def test_relaxations_need_a_choice(write: Callable[..., Path]) -> None:
    path = write([relaxation()])
    with pytest.raises(ConfigError, match=r"whole relaxation; state is2re: initial .* or is2re: relaxed"):
        read(path, energy="adsorption")
    with pytest.raises(ConfigError, match=r"is2re: 'first' is not one of initial, relaxed"):
        read(path, energy="adsorption", is2re="first")
    with pytest.raises(ConfigError, match=r"is2re: initial is for records of whole relaxations.*drop is2re"):
        read(SAMPLES[0], energy="adsorption", is2re="initial")
    with pytest.raises(DataError, match=r"is2re: relaxed needs more than y_relaxed"):
        read(write([{**relaxation(), "pos_relaxed": None}], "part.lmdb"), energy="adsorption", is2re="relaxed")


@pytest.mark.bad_input
def test_energies_must_be_stated_and_plausible(write: Callable[..., Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.0000\.lmdb: energy is not stated; state energy: total .* or energy: adsorption"
    ):
        read(SAMPLES[0])
    with pytest.raises(ConfigError, match=r"energy: 'free' is not one of adsorption, total"):
        read(SAMPLES[0], energy="free")
    with pytest.raises(DataError, match=r"stated as total are .* eV per atom.*adsorption energies look like that"):
        read(SAMPLES[0], energy="total")
    with pytest.raises(DataError, match=r"stated as adsorption energies are .* per atom.*state energy: total"):
        read(write([record(y=-13.0 + 0.1 * k, fid=k) for k in range(20)]), energy="adsorption")
    with pytest.raises(DataError, match=r"stated as adsorption energies are .* 80 eV in magnitude"):
        read(write([record(y=80.0, fid=k) for k in range(3)], "far.lmdb"), energy="adsorption")
    with pytest.raises(ConfigError, match=r"marked as OC22, whose energies are total; state energy: total"):
        read(OC22, energy="adsorption")
    assert len(read(OC22, energy="total")) == 80


@pytest.mark.bad_input
def test_plausibility_holds_in_later_windows_and_lets_nothing_through(write: Callable[..., Path]) -> None:
    path = write([record(y=-1.0 if k < 256 else -13.0, fid=k) for k in range(300)])
    seen: list[AtomicData] = []
    with pytest.raises(DataError, match="medians of 44 structures"):
        seen.extend(read_ocp_lmdb(path, path.name, ReadPolicy(), energy="adsorption"))
    assert len(seen) == 256


@pytest.mark.bad_input
def test_references(write: Callable[..., Path], tmp_path: Path) -> None:
    path, reference = write([record(fid=k, y=-1.0 - k) for k in range(3)]), tmp_path / "ref.pkl"
    content: Any
    for content in ({77: -12.5}, {"random77": -12.5}, {"77": -12.5}, {77: np.float64(-12.5)}):
        reference.write_bytes(pickle.dumps(content, protocol=4))
        os.utime(reference, ns=(len(str(content)), hash(str(content)) % 10**9))
        energies = [float(data.energy) for data in read(path, energy="adsorption", reference=reference)]
        assert energies == [-13.5, -14.5, -15.5]
    for content, expected in (
        ({5: 1.0}, "made.lmdb:sid77:0: the reference has no energy for its system"),
        ({77: "text"}, "reference energy holds something else than numbers"),
        ([1.0], r"ref\.pkl: holds a list, expected a dict"),
    ):
        reference.write_bytes(pickle.dumps(content, protocol=4))
        with pytest.raises(DataError, match=expected):
            read(path, energy="adsorption", reference=reference)
    with pytest.raises(DataError, match=r"absent\.pkl: reference cannot be read"):
        read(path, energy="adsorption", reference=tmp_path / "absent.pkl")
    with pytest.raises(ConfigError, match=r"reference is added to adsorption energies"):
        read(path, energy="total", reference=reference)
    reference.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match=r"ref\.pkl: names 'os\.system'"):
        read(path, energy="adsorption", reference=reference)


BAD_RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "natoms": ({"natoms": 5}, "sid77:3: natoms is 5, but there are 4 atomic_numbers"),
    "no positions": (
        {"pos": None},
        "record 0: has no pos and atomic_numbers, which records have; found atomic_numbers, c",
    ),
    "another layout": ({"pos": None, "positions": 1.0}, "found .*positions, sid"),
    "positions": ({"pos": torch.zeros(3, 3)}, r"sid77:3: positions have shape \(3, 3\), expected \(4, 3\)"),
    "text for positions": ({"pos": "here"}, "pos holds something else than numbers"),
    "ragged positions": ({"pos": [[1.0], [1.0, 2.0]]}, "pos holds something else than numbers"),
    "numbers": (
        {"atomic_numbers": torch.tensor([29.0, 29.0, 29.0, 8.5])},
        "atomic_numbers holds something else than wh",
    ),
    "unknown element": ({"atomic_numbers": torch.tensor([29.0, 29.0, 29.0, 0.0])}, "atom 3 has atomic number 0"),
    "nan": ({"force": torch.full((4, 3), float("nan"))}, "forces holds NaN or Inf"),
    "forces": ({"force": torch.zeros(3, 3)}, r"forces has shape \(3, 3\)"),
    "energy": ({"y": torch.zeros(2)}, "energy is .*expected one finite number"),
    "infinite energy": ({"y": float("inf")}, "energy is 'inf', expected one finite number"),
    "two energies": ({"energy": -2.0}, "has energy and y, which differ"),
    "cell": ({"cell": torch.zeros(1, 3, 3)}, "span no volume"),
    "cell shape": ({"cell": torch.zeros(2, 3)}, r"cell \(2, 3\)"),
    "pbc": ({"pbc": torch.ones(2)}, "pbc has 2 values, expected 3"),
    "tags": ({"tags": torch.zeros(3)}, r"tags has shape \(3,\)"),
    "fixed": ({"fixed": torch.full((4,), 0.5)}, "fixed holds something else than whole numbers"),
    "sid": ({"sid": torch.tensor([1, 2])}, "record 0: sid is .*expected a number or a name"),
    "fid": ({"fid": 0.5}, "record 0: fid holds something else than whole numbers"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_give_one_line_or_are_counted(name: str, write: Callable[..., Path]) -> None:
    changes, expected = BAD_RECORDS[name]
    path = write([record(**changes), record(fid=9)])
    assert_bad(lambda policy: read(path, policy, energy="adsorption"), expected)


@pytest.mark.bad_input
def test_damaged_files(write: Callable[..., Path], tmp_path: Path) -> None:
    good = pickle.dumps(record(), protocol=4)
    evil = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."
    for number, (values, expected) in enumerate([
        ({b"0": good, b"01": good, b"length": pickle.dumps(2)}, r"key '1' is missing"),
        ({b"0": good, b"1": good, b"length": pickle.dumps(1)}, r"length is 1, but there is a record 1"),
        ({b"0": good, b"length": pickle.dumps(9)}, r"length is 9, but it holds 1 records"),
        ({b"0": good, b"length": pickle.dumps("one")}, r"length is 'one', expected a number of records"),
        ({b"0": good, b"length": evil}, r"length: names 'posix\.system'"),
        ({b"0": good, b"1": good[:-30], b"length": pickle.dumps(2)}, r"key '1': not a readable pickle, or damaged"),
        ({b"0": evil}, r"key '0': names 'posix\.system'"),
        ({b"0": pickle.dumps([1])}, r"key '0': holds a list, expected"),
        ({b"1": b"x", b"nextid": b"2"}, r"is an ASE database in LMDB.*format: aselmdb"),
        ({}, r"holds no records"),
    ]):  # fmt: skip
        path = write(values, f"{number}.lmdb")
        with pytest.raises(DataError, match=expected) as caught:
            read(path, energy="adsorption")
        assert str(caught.value).startswith(str(path))
    for name, content in (("text.lmdb", b"no LMDB" * 2000), ("empty.lmdb", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="not a readable LMDB file"):
            read(tmp_path / name, energy="adsorption")
    with pytest.raises(DataError, match=r"absent\.lmdb: not a readable LMDB file"):
        divide(tmp_path / "absent.lmdb", 10)
    assert not ocp_lmdb._OPEN


@pytest.mark.bad_input
def test_truncated_file_does_not_kill_the_process(tmp_path: Path) -> None:
    path, whole = tmp_path / "cut.lmdb", SAMPLES[0].read_bytes()
    for length in (len(whole) - 1, len(whole) - 4096, 8192, 9000, 4096, 100):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.lmdb: (is truncated|not a readable LMDB file)"):
            read(path, energy="adsorption")
    assert not ocp_lmdb._OPEN


def test_readers_of_one_file_share_it() -> None:
    with ocp_lmdb.open_environment(SAMPLES[0]) as first:
        assert divide(SAMPLES[0], 100) == [(0, 40)]
        assert len(read(SAMPLES[0], energy="adsorption")) == 40
        assert ocp_lmdb.count_records(first, SAMPLES[0]) == 40
    assert not ocp_lmdb._OPEN


def test_folders(write: Callable[..., Path], tmp_path: Path) -> None:
    for number in (10, 2, 1):
        write([record(fid=number)], f"data.{number:04d}.lmdb" if number < 10 else f"data.{number}.lmdb")
    (tmp_path / "data.0001.lmdb-lock").write_bytes(b"")
    names = ["data.0001.lmdb", "data.0002.lmdb", "data.10.lmdb"]
    assert [path.name for path in list_lmdb_files(tmp_path)] == names
    assert READER.expand is list_lmdb_files
    assert READER.parts is divide
    assert matches(tmp_path, b"")
    assert not matches(tmp_path / "nothing.xyz", b"")
    assert matches(SAMPLES[0], SAMPLES[0].read_bytes()[:4096])
    assert not matches(SAMPLES[0], b"text")


def test_units_are_converted() -> None:
    policy, reference = ReadPolicy(Units.parse({"energy": "meV"})), OC20 / "sample_ref.pkl"
    plain, total = (read(SAMPLES[0], energy="adsorption", **more)[0].energy for more in ({}, {"reference": reference}))
    first = {"energy": "adsorption", "part": (0, 1)}
    (data,), (summed,) = (read(SAMPLES[0], policy, **first, **more) for more in ({}, {"reference": reference}))
    assert float(data.energy) == pytest.approx(float(plain) * 1e-3)
    assert float(summed.energy) - float(data.energy) == pytest.approx(float(total) - float(plain))  # eV in any case


def test_lists_and_batches(tmp_path: Path) -> None:
    records = [Data(**record(fid=k, y=-1.0 - k, id=f"0_{k}")) for k in range(3)]
    for data in records:
        data.edge_index = torch.zeros(2, 5, dtype=torch.long)
    listed, batch, single = (tmp_path / name for name in ("list.pkl", "batch.pt", "one.pt"))
    listed.write_bytes(pickle.dumps(records, protocol=4))
    torch.save(Batch.from_data_list(records), batch)
    torch.save(records[1], single)
    for path, numbers in ((listed, range(3)), (batch, range(3)), (single, [1])):
        found = read_file(path, energy="adsorption")
        assert [data.structure_id for data in found] == [f"{path.name}:sid77:{k}" for k in numbers]
        for data, number in zip(found, numbers, strict=True):
            assert float(data.energy) == -1.0 - number
            assert torch.equal(data.forces, records[number].force.double())
        assert matches_pyg(path, path.read_bytes()[:100])
    assert not matches_pyg(tmp_path / "model.pt", b"text")


@pytest.mark.bad_input
def test_bad_lists_and_batches(tmp_path: Path) -> None:
    path = tmp_path / "made.pkl"
    for value, expected in (
        ([], "holds no records"),
        ([1], r"made\.pkl: record 0: holds a int"),
        ("text", "holds a str, expected a PyTorch Geometric record"),
    ):
        path.write_bytes(pickle.dumps(value, protocol=4))
        with pytest.raises(DataError, match=expected):
            read_file(path)
    batch = Batch.from_data_list([Data(**record()), Data(**record())])
    for name, slices, expected in (
        ("force", torch.tensor([0, 4, 9]), "cut beyond its 8 entries"),
        ("force", torch.tensor([0, 6, 8, 8]), "cut into different numbers of records"),
        ("pos", torch.tensor([0, 5, 4, 8]), "cut beyond"),
        ("pos", "text", "does not say how it is cut"),
    ):
        changed = batch.clone()
        changed._slice_dict = {**batch._slice_dict, name: slices}
        torch.save(changed, path)
        with pytest.raises(DataError, match=expected):
            read_file(path, energy="adsorption")
    with pytest.raises(DataError, match=r"absent\.pkl: cannot be read"):
        read_file(tmp_path / "absent.pkl")


# Real data, against an independent reading.


def assert_as_trusted(data: AtomicData, value: Any) -> None:
    """Equal to the record as pickle itself reads it."""
    items = value.to_dict() if isinstance(value, Data) else value
    fields = {key: np.asarray(item) for key, item in items.items() if not isinstance(item, str)}
    assert float(data.energy) == float(fields["y" if "y" in fields else "energy"])
    assert np.array_equal(data.forces.numpy(), fields["force"].astype(np.float64))
    assert np.array_equal(data.positions.numpy(), fields["pos"].astype(np.float64))
    assert np.array_equal(data.atomic_numbers.numpy(), fields["atomic_numbers"])
    assert np.array_equal(data.fixed.numpy(), fields.get("fixed", np.zeros(len(data.fixed))) != 0)
    if bool(data.pbc.any()):
        assert np.array_equal(data.cell.numpy().ravel(), fields["cell"].astype(np.float64).ravel())


@pytest.mark.parametrize(
    ("name", "options", "count", "step"),
    [
        ("oc20_s2ef_lmdb_derived/data.0000.lmdb", {"energy": "total"}, 264, 20),
        ("oc22_s2ef_lmdb_derived/data.0000.lmdb", {}, 16, 4),
        ("lips_ocp_lmdb_genuine/data.lmdb", {}, 200, 20),
    ],
)
def test_real_files(
    name: str, options: dict[str, Any], count: int, step: int, shared_data: Callable[[str], Path]
) -> None:
    path = shared_data(f"native_formats/{name}")
    structures = read(path, **options)
    assert len(structures) == count == len({data.structure_id for data in structures})
    check_magnitudes(structures)
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment, environment.begin() as access:
        for number in range(0, count, step):
            assert_as_trusted(structures[number], pickle.loads(access.get(str(number).encode()) or b""))


@pytest.mark.parametrize(
    ("name", "periodic"),
    [
        ("oc22_genuine/oc22_pickle16_train.pkl", True),
        ("ani1x_trans1x_pyg_genuine/ani1x_pickle16_train.pkl", False),
        ("ani1x_trans1x_pyg_genuine/ani1x_pickle16_val.pkl", False),
        ("ani1x_trans1x_pyg_genuine/trans1x_pickle16_train.pkl", False),
        ("ani1x_trans1x_pyg_genuine/trans1x_pickle16_val.pkl", False),
    ],
)
def test_real_lists(name: str, periodic: bool, shared_data: Callable[[str], Path]) -> None:
    path = shared_data(f"native_formats/{name}")
    structures = read_file(path)
    check_magnitudes(structures)
    records = pickle.loads(path.read_bytes())
    assert len(structures) == len(records) == 16
    for data, value in zip(structures, records, strict=True):
        assert_as_trusted(data, value)
        assert bool(data.pbc.all()) == periodic == bool(data.pbc.any())


class Trusting(pickle.Unpickler):
    """Runs what the file names: for files that are known."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        super().__init__(io.BytesIO(archive.read("batch/data.pkl")))

    def persistent_load(self, pid: Any) -> Any:
        storage = torch.UntypedStorage.from_buffer(self.archive.read(f"batch/data/{pid[2]}"), dtype=torch.uint8)
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=pid[1].dtype, _internal=True)


def test_real_batch(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("native_formats/oc20_genuine/OC20_batch_3.pt")
    structures = read_file(path, energy="adsorption")
    with zipfile.ZipFile(path) as archive:
        batch = Trusting(archive).load()
    assert [data.num_nodes for data in structures] == batch.natoms.tolist() == [88, 28, 83]
    assert torch.equal(torch.cat([data.energy for data in structures]), batch.energy)
    assert torch.equal(torch.cat([data.forces for data in structures]), batch.forces.double())
    assert torch.equal(torch.cat([data.fixed for data in structures]), batch.fixed.bool())
    assert [data.group for data in structures] == [f"sid{sid}" for sid in batch.sid.tolist()]
    with pytest.raises(DataError, match="stated as total are"):
        read_file(path, energy="total")
