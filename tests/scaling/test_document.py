"""The sheet and the report of a study."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import record, records, write, write_study

from escaip.cli import main
from escaip.errors import DataError
from escaip.scaling import FitSettings, fit_study
from escaip.scaling.document import write_report
from escaip.scaling.records import read_records
from escaip.scaling.sheet import make_figure

FEW = FitSettings(bootstrap=60)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_study(tmp_path, [record(id="lost", losses={}, profiled=1.0), record(id="spent", profiled=1.02)])
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
    assert "under PyTorch's counter, had 1 to 1.02 times the formula's operations (2 runs)" in text
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


def test_panels(study: Path, tmp_path: Path) -> None:
    """A grid has sizes and data, budgets have parabolas and their minima, and learning curves are always there."""
    c = np.repeat([1e11, 1e12, 1e13], 5)
    best = 1e5 * (c / 1e11) ** 0.5
    n = best * np.tile([0.3, 0.5, 1.0, 2.0, 3.0], 3)
    write_study(tmp_path, records(n, c / 60 / n, c**-0.1 * np.exp(0.3 * np.log(n / best) ** 2), "spent"))
    axes = make_figure(fit_study(study, settings=FEW), read_records(study)).axes
    titles = [axis.get_title() for axis in axes]
    assert titles[:5] == ["default: compute", "size", "data", "runs about the law of N and D", "learning curves"]
    row = titles.index("spent: compute")
    assert titles[row + 1 : row + 3] == ["budgets", "best size and data of a budget"]
    assert all(axis.lines and not axis.texts for axis in axes)


def test_a_panel_with_nothing_to_show_says_so(tmp_path: Path) -> None:
    n = np.array([1e5, 3e5, 1e6])
    write(tmp_path, records(n, 1e10 / n, np.array([0.1, 0.2, 0.4])))  # one budget; the smallest is the best
    axes = make_figure(fit_study(tmp_path, settings=FEW), read_records(tmp_path)).axes
    texts = [" ".join(text.get_text().split()) for axis in axes[2:4] for text in axis.texts]
    assert texts == ["no budget has a minimum within its sizes", "no law of N and D: too few sizes and data"]


@pytest.mark.bad_input
def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no records: run `escaip scaling run` first"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
