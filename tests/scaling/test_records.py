"""Lines of JSON that a study leaves, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_runs import record, write

from escaip.errors import DataError
from escaip.scaling import Record, read_records
from escaip.scaling.records import variants


def test_a_record_survives_its_line() -> None:
    one = record()
    line = one.to_json()
    assert "\n" not in line
    assert Record.from_json(line) == one
    assert Record.from_json(json.dumps({**json.loads(line), "commit": "", "losses": {}})).losses == {}


def test_records_are_read_in_order_and_twins_count_once(tmp_path: Path) -> None:
    file = write(tmp_path, [record(id="b"), record(id="a", variant="hard"), record(id="b")])
    assert [one.id for one in read_records(tmp_path)] == ["b", "a"]
    assert read_records(file) == read_records(tmp_path)
    assert {name: len(group) for name, group in variants(read_records(file)).items()} == {"default": 1, "hard": 1}


@pytest.mark.bad_input
def test_a_line_cut_by_a_kill_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, [record(id="a"), record(id="b")])
    file.write_text(file.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2 is damaged, its writer was killed: delete that line and run"):
        read_records(tmp_path)


@pytest.mark.bad_input
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, [record(id="a"), record(id="b")])
    file.write_text(file.read_text(encoding="utf-8").replace('"id": "a",', '"id": "a"'), encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: a record is no JSON .*: remove its line and run the study again"):
        read_records(tmp_path)


@pytest.mark.bad_input
def test_two_different_records_of_one_run(tmp_path: Path) -> None:
    write(tmp_path, [record(), record(seed=1)])
    with pytest.raises(DataError, match=r"line 2: a second, different record of 'a': keep one of them"):
        read_records(tmp_path)


@pytest.mark.bad_input
def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no records: run `escaip scaling run` first, or name the folder"):
        read_records(tmp_path)
    (tmp_path / "records.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no records"):
        read_records(tmp_path)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 3}, "record a: unknown field 'width'"),
        ({"id": ""}, "id is ''"),
        ({"parameters": 0}, "parameters is 0, not a whole number above zero"),
        ({"parameters": True}, "parameters is True"),
        ({"structures": 1.5}, "structures is 1.5"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"flops": -1.0}, "flops is -1.0, not a number above zero"),
        ({"seconds": -1}, "seconds is -1"),
        ({"losses": {"forces_mae": 0.0}}, "losses.forces_mae is 0.0"),
        ({"losses": [1.0]}, "losses is .*not a mapping"),
        ({"curve": [[1, 2]]}, "curve is .*not a list of"),
        ({"curve": 3}, "curve is no list of"),
        ({"config": None}, "config is None"),
    ],
)
def test_impossible_fields(change: dict[str, object], message: str) -> None:
    line = json.dumps({**json.loads(record().to_json()), **change})
    with pytest.raises(DataError, match=message):
        Record.from_json(line)


@pytest.mark.bad_input
def test_missing_fields_and_other_json() -> None:
    values = json.loads(record().to_json())
    del values["flops"]
    with pytest.raises(DataError, match="field 'flops' is missing"):
        Record.from_json(json.dumps(values))
    with pytest.raises(DataError, match="no mapping"):
        Record.from_json("[1]")
