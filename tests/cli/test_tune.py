"""``escaip tune``: what is asked of the tuner, what is printed, and one line where nothing can be measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import escaip.tune
from escaip.cli import main
from escaip.ops.triton import tile_files, tuning
from escaip.ops.triton.cases import Case
from escaip.ops.triton.tile_files import Entry, Identity
from escaip.ops.triton.tiles import Tile, TileKey
from escaip.ops.triton.tuning import Failure, Record

Capture = pytest.CaptureFixture[str]
KEY = TileKey("forward_rows", "angles", "tf32x3", 96, 128, "<=32", "<=32")
RECORDS = [
    Record(KEY, Tile(16, 32, 4), 0.25, Tile(32, 32, 4, 2), 0.125, 9, (Failure(Tile(64, 64, 8), "OutOfResources"),)),
    Record(replace(KEY, kernel="backward_rows"), Tile(16, 32, 4), None, Tile(16, 32, 4), None, 0, ()),
]
GPU = Identity("NVIDIA H200", 90, "3.6.0", "0123456789ab")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Case], dict[str, Any]]]:
    """A GPU to all appearances, and what the tuner is asked for on it."""
    calls: list[tuple[list[Case], dict[str, Any]]] = []

    def tune(cases: list[Case], device: torch.device, *, progress: Any, **options: Any) -> list[Record]:
        calls.append((cases, options))
        for record in RECORDS:
            progress(record)
        return RECORDS

    monkeypatch.setattr(escaip.tune, "require_gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(tuning, "tune", tune)
    return calls


def test_a_preset_is_measured(asked: list[Any], tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "tiles.json")
    options = ["--seconds", "30", "--workers", "4", "--precision", "highest", "bfloat16", "--out", out]
    assert main(["tune", "--preset", "20m", *options]) == 0
    ((cases, given),) = asked
    assert given == {"seconds": 30.0, "workers": 4, "path": out}
    assert {(case.head_size, case.heads, case.widths) for case in cases} == {(64, 6, (20, 10, 4, 10, 20))}
    assert [case.mode for case in cases] == ["tf32x3"] * 4 + ["bfloat16"] * 4
    heading, first, second, summary = capsys.readouterr().out.splitlines()
    assert heading.split() == ["kernel", "use", "mode", "own", "other", "table", "ms", "best", "ms", "tile"]
    assert first.split(maxsplit=7)[5:] == ["0.2500", "0.1250", "32x32 w4 s2 (of 9, 1 dropped)"]
    assert second.endswith("-  16x32 w4 s1 (not measured)")
    assert summary == "1 of 2 measured, 1 faster with another tile than the table's"


def test_by_default_it_is_the_5m_preset_and_a_file_is_what_it_says(asked: list[Any], model: Path) -> None:
    assert main(["tune"]) == 0
    assert main(["tune", "--model", str(model)]) == 0
    (first, given), (second, _) = asked
    assert given == {"seconds": 120.0, "workers": None, "path": None}
    assert {(case.head_size, case.heads) for case in first} == {(32, 6)}
    assert {(case.head_size, case.heads, case.widths) for case in second} == {(8, 2, (3, 2, 1, 1, 1))}
    assert {case.size for case in second} == {12}  # at most eight neighbors


def test_what_was_measured_is_shown(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("ESCAIP_CACHE", str(tmp_path))
    monkeypatch.setattr(tile_files, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(tile_files, "identity_of", lambda device: GPU)
    assert main(["tune", "--show"]) == 0
    assert capsys.readouterr().out == (
        "NVIDIA H200, Triton 3.6.0, kernels 0123456789ab: nothing measured, the built-in table is used\n"
    )
    path = tile_files.user_file(GPU)
    assert path is not None
    tile_files.write(path, GPU, [Entry(KEY, Tile(32, 32, 4, 2), 0.125, 0.25)])
    assert main(["tune", "--show"]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.endswith(f": {path}")
    assert line.split() == [
        "forward_rows",
        "angles",
        "tf32x3",
        "up",
        "to",
        "128",
        "columns,",
        "<=32",
        "by",
        "<=32",
        "32x32",
        "w4",
        "s2",
    ]
    assert asked == []


def fails(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(["tune", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.bad_input
def test_what_cannot_be_measured_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["--show"], ["--preset", "1m"]):
        fails(arguments, "an NVIDIA GPU, and none is usable here", capsys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    fails([], "unset TRITON_INTERPRET", capsys)
    monkeypatch.setitem(sys.modules, "triton", None)
    fails([], "needs Triton: pip install", capsys)


@pytest.mark.bad_input
def test_usage(asked: list[Any], model: Path, capsys: Capture) -> None:
    fails(["--preset", "5m", "--model", str(model)], "choose one", capsys)
    fails(["--preset", "6m"], "preset '6m' does not exist", capsys)
    fails(["--seconds", "0"], "more than 0 s", capsys)
    fails(["--workers", "-1"], "no negative number", capsys)
    fails(["--precision", "half"], "invalid choice: 'half'", capsys)
    assert asked == []
