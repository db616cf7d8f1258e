from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from ase.io.jsonio import decode
from toys import assert_bad, assert_parts, write_lmdb

from escaip.data import AtomicData
from escaip.data.readers import aselmdb
from escaip.data.readers.aselmdb import divide, list_aselmdb_files, matches, read_aselmdb
from escaip.data.readers.policy import ReadPolicy
from escaip.data.structure import LabelKeys
from escaip.errors import ConfigError, DataError
from escaip.files import dataset_card
from escaip.types import TARGETS, Target
from escaip.units import Units

REAL = "native_formats/aselmdb_derived/mptrj_200.aselmdb"
VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])


def encoded(values: Any, dtype: str = "float64") -> dict[str, Any]:
    array = np.asarray(values, dtype=dtype)
    return {"__ndarray__": [list(array.shape), dtype, array.ravel().tolist()]}


def water(**changes: Any) -> dict[str, Any]:
    """A row; ``changes`` replace or (None) remove entries."""
    row = {
        "numbers": encoded([8, 1, 1], "int64"),
        "positions": encoded([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]]),
        "energy": -14.2,
        "forces": encoded(np.arange(9.0).reshape(3, 3)),
        **changes,
    }
    return {key: value for key, value in row.items() if value is not None}


def raw_database(path: Path, rows: dict[int, Any], **reserved: Any) -> Path:
    """Puts rows as given: dictionaries are encoded, bytes are not."""

    def packed(value: Any) -> bytes:
        return value if isinstance(value, bytes) else zlib.compress(json.dumps(value).encode())

    reserved = {"nextid": max(rows, default=0) + 1, **reserved}
    entries = {b"%d" % row_id: value for row_id, value in rows.items()}
    entries.update({key.encode(): value for key, value in reserved.items() if value is not None})
    return write_lmdb(path, {key: packed(value) for key, value in entries.items()})


def read(path: Path, policy: ReadPolicy | None = None, **options: Any) -> list[AtomicData]:
    return list(read_aselmdb(path, path.name, policy or ReadPolicy(), **options))


def raw_rows(path: Path) -> Iterator[dict[str, Any]]:
    """An independent reading: zlib and ASE's JSON."""
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        for row_id in range(1, decode(zlib.decompress(transaction.get(b"nextid") or b"").decode())):
            yield decode(zlib.decompress(transaction.get(b"%d" % row_id) or b"").decode())


def test_real_rows_equal_an_independent_reading(shared_data: Callable[[str], Path]) -> None:
    path = shared_data(REAL)
    found = read(path, ReadPolicy(required=("energy", "forces", "stress")))
    rows = list(raw_rows(path))
    assert len(found) == len(rows) == 200
    for row_id, (data, row) in enumerate(zip(found, rows, strict=True), start=1):
        assert data.structure_id == f"mptrj_200.aselmdb:{row_id}"
        assert np.array_equal(data.atomic_numbers.numpy(), row["numbers"])
        assert np.array_equal(data.positions.numpy(), row["positions"])
        assert np.array_equal(data.cell[0].numpy(), row["cell"])
        assert bool(data.pbc.all())
        assert float(data.energy) == row["energy"]
        assert np.array_equal(data.forces.numpy(), row["forces"])
        assert np.array_equal(data.stress[0].numpy()[VOIGT], row["stress"])
    keys = LabelKeys.parse({"group": "mp_id"})
    assert [data.group for data in read(path, keys=keys)] == [row["data"]["mp_id"] for row in rows]


def test_charge_and_spin_of_data_and_pairs(tmp_path: Path) -> None:
    rows = {
        1: water(data={"charge": -1, "spin": 2}),
        2: water(key_value_pairs={"charge": 1.0, "spin_multiplicity": 3}),
        3: water(data=json.dumps({"charge": encoded([2])})),
        4: water(),
        5: water(data={"q": -2, "mult": 4, "name": "ion"}, key_value_pairs={"material": "m-1"}),
    }
    path = raw_database(tmp_path / "a.aselmdb", rows)
    assert [(int(d.charge), int(d.spin_multiplicity)) for d in read(path)] == [(-1, 2), (1, 3), (2, 1), (0, 1), (0, 1)]
    keys = LabelKeys.parse({"charge": "q", "spin": "mult", "structure_id": "name", "group": "material"})
    (data,) = read(path, keys=keys, part=(5, 6))
    assert (int(data.charge), int(data.spin_multiplicity), data.structure_id, data.group) == (-2, 4, "ion", "m-1")


def test_named_labels_and_units(tmp_path: Path) -> None:
    crystal = {"cell": encoded(np.diag([3.0, 3.0, 4.0])), "pbc": [True, True, True]}
    virial = np.diag([1.0, 2.0, 3.0])
    path = raw_database(
        tmp_path / "a.aselmdb",
        {1: water(data={"dft": -500.0, "grad": encoded(np.ones((3, 3))), "w": virial.tolist()}, **crystal)},
    )
    keys = LabelKeys.parse({"energy": "dft", "forces": "grad", "virial": "w"})
    (data,) = read(path, ReadPolicy(Units.parse({"energy": "meV"})), keys=keys)
    assert float(data.energy) == pytest.approx(-0.5)
    assert np.allclose(data.forces.numpy(), 1e-3)
    assert np.allclose(data.stress[0].numpy(), -virial * 1e-3 / 36.0)
    (plain,) = read(path, keys=LabelKeys.parse({"energy": "energy"}))
    assert float(plain.energy) == -14.2
    assert not plain.has_label("forces")


@pytest.mark.parametrize("stress", [np.arange(6.0), np.arange(6.0)[[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)])
@pytest.mark.parametrize("flat", [False, True])
def test_stress_in_every_form_and_plain_lists(tmp_path: Path, stress: np.ndarray, flat: bool) -> None:
    value = stress.ravel() if flat else stress
    row = water(numbers=[8, 1, 1], forces=[[0.0] * 3] * 3, stress=value.tolist(), pbc=[True] * 3, cell=[5.0, 6.0, 7.0])
    (data,) = read(raw_database(tmp_path / "a.aselmdb", {1: row}))
    assert np.array_equal(data.stress[0].numpy()[VOIGT], np.arange(6.0))
    assert np.array_equal(data.cell[0].numpy(), np.diag([5.0, 6.0, 7.0]))


@pytest.mark.parametrize(
    ("constraints", "fixed"),
    [
        ([{"name": "FixAtoms", "kwargs": {"indices": [0, 2]}}], [True, False, True]),
        ([{"name": "FixAtoms", "kwargs": {"indices": encoded([1], "int64")}}], [False, True, False]),
        ([{"name": "FixAtoms", "kwargs": {"mask": [False, True, True]}}], [False, True, True]),
        (json.dumps([{"__name__": "ase.constraints.FixAtoms", "indices": [2]}]), [False, False, True]),
        ([{"name": "FixCartesian", "kwargs": {"a": [0], "mask": [True, True, True]}}], [True, False, False]),
        ([{"name": "FixCartesian", "kwargs": {"a": [0], "mask": [True, True, False]}}], [False] * 3),
        ([{"name": "FixBondLengths", "kwargs": {"pairs": [[0, 1]]}}], [False] * 3),
        ([{"name": "FixAtoms", "kwargs": {"indices": []}}], [False] * 3),
    ],
)
def test_constraints(tmp_path: Path, constraints: Any, fixed: list[bool]) -> None:
    (data,) = read(raw_database(tmp_path / "a.aselmdb", {1: water(constraints=constraints, tags=[0, 1, 2])}))
    assert data.fixed.tolist() == fixed
    assert data.tags.tolist() == [0, 1, 2]


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    """ASE writes NaN as Python's JSON does; beside the labels it is no reason to refuse a row."""
    path = raw_database(tmp_path / "a.aselmdb", {1: water(data={"uncertainty": float("nan"), "charge": 1})})
    assert int(read(path)[0].charge) == 1
    path = raw_database(tmp_path / "b.aselmdb", {1: water(energy=float("nan"))})
    with pytest.raises(DataError, match="1: energy holds NaN"):
        read(path)


def test_further_targets_in_data_and_in_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "quadrupoles", Target("quadrupoles", True, (3, 3), "e·Å²", "e·Å²"))
    held = encoded(np.arange(27.0).reshape(3, 9))
    for row in (water(data={"quadrupoles": held}), water(quadrupoles=held)):
        (data,) = read(raw_database(tmp_path / f"{len(row)}.aselmdb", {1: row}))
        assert data.quadrupoles.ravel().tolist() == list(range(27))


def test_parts_are_the_whole_and_deleted_rows_are_not_there(tmp_path: Path) -> None:
    rows = {row_id: water(energy=float(-row_id)) for row_id in range(1, 31) if row_id not in (1, 7, 8, 30)}
    path = raw_database(tmp_path / "a.aselmdb", rows, nextid=31, deleted_ids=[30, 7, 8, 1])
    assert [float(data.energy) for data in read(path)] == [float(-row_id) for row_id in sorted(rows)]
    assert_parts(path, divide, read, 1, 5, 26, 100)


def test_a_hole_is_named_or_counted(tmp_path: Path) -> None:
    path = raw_database(tmp_path / "a.aselmdb", {1: water(), 3: water(), 4: water()})
    assert_bad(lambda policy: read(path, policy), r"a.aselmdb:2: the row is missing and not among deleted_ids", kept=3)


def test_folders_and_groups(tmp_path: Path) -> None:
    for folder in ("rattled", "relax"):
        (tmp_path / folder).mkdir()
        raw_database(tmp_path / folder / "data.0.aselmdb", {1: water()})
    assert matches(tmp_path, b"")
    assert matches(tmp_path / "relax" / "data.0.aselmdb", b"")
    assert not matches(Path(__file__), b"")
    files = list_aselmdb_files(tmp_path)
    assert [file.parent.name for file in files] == ["rattled", "relax"]
    kinds = ("formula", "file", "structure")
    groups = [next(read_aselmdb(files[0], "n", ReadPolicy(), group_by=kind)).group for kind in kinds]
    assert groups == ["H2O", "n", "n:1"]


def test_two_readers_of_one_file(tmp_path: Path) -> None:
    path = raw_database(tmp_path / "a.aselmdb", {row_id: water() for row_id in range(1, 6)})
    one, two = read_aselmdb(path, path.name, ReadPolicy()), read_aselmdb(path, path.name, ReadPolicy())
    assert [next(one).structure_id, next(two).structure_id, next(one).structure_id] == [
        "a.aselmdb:1",
        "a.aselmdb:1",
        "a.aselmdb:2",
    ]
    one.close()  # type: ignore[attr-defined]
    assert len(list(two)) == 4


BOMB = zlib.compress(b'{"numbers": [' + b" " * (5 << 20) + b"1]}")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"no zlib", "a.aselmdb:1: is no zlib-compressed JSON"),
        (zlib.compress(json.dumps(water()).encode())[:-9], "a.aselmdb:1: is truncated"),
        (zlib.compress(b"{'numbers': "), "is no JSON, or damaged"),
        (zlib.compress(b"[" * 100_000), "is no JSON, or damaged"),
        (BOMB, "decompresses to more than 1 MiB"),
        ([1, 2], "is no row of an ASE database"),
        (water(positions=None), "is no row of an ASE database"),
        (water(data=[1]), "data is a list, expected a dictionary"),
        (
            water(forces={"__ndarray__": [[3, 3], "float64", [1.0]]}),
            "forces holds something else than numbers",
        ),
        (water(forces={"__ndarray__": [[3, 3], "complex128", [0.0] * 9]}), "forces holds something else than numbers"),
        (water(forces={"__ndarray__": [[3, 3], "object", [0.0] * 9]}), "forces holds something else than numbers"),
        (water(forces={"__ndarray__": [[1 << 60, 0], "float64", []]}), "forces"),
        (water(forces={"__ndarray__": 7}), "forces holds something else than numbers"),
        (water(forces=[["a"] * 3] * 3), "forces holds something else than numbers"),
        (water(forces=[[0.0] * 3, [0.0]]), "forces holds something else than numbers"),
        (water(forces={"x": 1}), "forces holds something else than numbers"),
        (water(energy=10**400), "energy holds something else than numbers"),
        (water(forces=encoded(np.zeros((2, 3)))), r"forces has shape \(2, 3\), expected \(3, 3\)"),
        (water(numbers=[8.5, 1, 1]), "numbers holds something else than whole numbers"),
        (water(pbc=[True]), "cell and pbc must have shapes"),
        (water(cell=[[1.0]]), "cell and pbc must have shapes"),
        (water(constraints=[{"name": "FixAtoms", "kwargs": {"indices": [9]}}]), "FixAtoms names atoms beyond the 3"),
        (water(constraints=[{"name": "FixAtoms", "kwargs": {"indices": ["a"]}}]), "expected atom numbers or a mask"),
        (water(constraints=[3]), "constraints holds a int"),
        (water(data={"charge": "much"}), "charge is 'much', expected an integer"),
    ],
)
def test_bad_rows(tmp_path: Path, row: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aselmdb, "MAX_BYTES", 1 << 20)
    path = raw_database(tmp_path / "a.aselmdb", {1: row, 2: water()})
    assert_bad(lambda policy: read(path, policy), message)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("rows", "reserved", "message"),
    [
        ({1: water()}, {"nextid": None}, "has no nextid"),
        ({1: water()}, {"nextid": "many"}, "something else than whole numbers"),
        ({1: water()}, {"deleted_ids": [0.5]}, "something else than whole numbers"),
        ({1: water()}, {"nextid": 10**15}, "should have 999999999999999 rows"),
        ({}, {}, "holds no rows"),
        ({1: water(), 2: water()}, {"nextid": 2}, r"should have 1 rows \(nextid 2, 0 deleted\) and has 2"),
    ],
)
def test_bad_databases(tmp_path: Path, rows: dict[int, Any], reserved: dict[str, Any], message: str) -> None:
    path = raw_database(tmp_path / "a.aselmdb", rows, **reserved)
    for act in (lambda: read(path), lambda: divide(path, 10)):
        with pytest.raises(DataError, match=message):
            act()


@pytest.mark.bad_input
def test_damaged_files(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    path = tmp_path / "a.aselmdb"
    content = (dataset_card("omat24").path / "sample.aselmdb").read_bytes()
    for kept in (0, 100, 9000, len(content) // 2):
        path.write_bytes(content[:kept])
        with pytest.raises(DataError, match=r"a.aselmdb: .*(LMDB|truncated)"):
            read(path)
    with pytest.raises(DataError, match=r"No such file"):
        read(tmp_path / "missing.aselmdb")


@pytest.mark.bad_input
def test_labels_that_are_not_there(tmp_path: Path) -> None:
    path = raw_database(tmp_path / "a.aselmdb", {1: water(data={"e": 1.0}, forces=None, unique_id="u")})
    with pytest.raises(
        DataError, match=r"no energy under the key 'dft'; found info: e; arrays: none; calculator: energ"
    ):
        read(path, keys=LabelKeys.parse({"energy": "dft"}))
    with pytest.raises(DataError, match=r"a.aselmdb:1: has no forces, .*found info: e"):
        read(path, ReadPolicy(required=("forces",)))
    with pytest.raises(DataError, match="has a virial but no cell volume"):
        read(path, keys=LabelKeys.parse({"virial": "e"}))
    with pytest.raises(DataError, match="no group under the key 'mp_id'"):
        read(path, keys=LabelKeys.parse({"group": "mp_id"}))
    with pytest.raises(ConfigError, match="group_by: 'colour' is not one of"):
        read(path, group_by="colour")
