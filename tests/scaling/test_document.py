"""The sheet and the report of a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_runs import record, write_study

from escaip.cli import main
from escaip.errors import DataError
from escaip.scaling import FitSettings
from escaip.scaling.document import write_report

FEW = FitSettings(bootstrap=60)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_study(tmp_path, [record(id="lost", losses={})])
    (tmp_path / "study.json").write_text(json.dumps({"study": {"recipe": "quickstart", "epochs": 7}}))
    return tmp_path


def test_report_sheet_and_fits(study: Path) -> None:
    found, files = write_report(study, settings=FEW)
    assert {file.name for file in files} == {"report.md", "scaling.png", "scaling.pdf"}
    assert sorted(p.name for p in study.iterdir()) == [
        "fit.json", "records.jsonl", "report.md", "scaling.pdf", "scaling.png", "study.json",
    ]  # fmt: skip
    text = (study / "report.md").read_text("utf-8")
    assert found.summary() in text
    assert "![sheet](scaling.png)" in text
    assert "epochs: 7" in text
    assert "Diverged, and in no fit: lost." in text
    assert "code: abc" in text
    assert (study / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert (study / "scaling.pdf").read_bytes().startswith(b"%PDF")


def test_the_same_study_is_the_same_sheet(study: Path) -> None:
    write_report(study, settings=FEW)
    before = {name: (study / name).read_bytes() for name in ("scaling.png", "scaling.pdf", "report.md")}
    write_report(study, settings=FEW)
    assert before == {name: (study / name).read_bytes() for name in before}


def test_the_command(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "plot", str(study), "--bootstrap", "60"]) == 0
    assert "report.md" in capsys.readouterr().out


@pytest.mark.bad_input
def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no records: run `escaip scaling run` first"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
