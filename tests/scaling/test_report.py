"""The report of a study, its sheet, and the commands that write them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import grid, loss, record, records, write_study

from escaip.cli import main
from escaip.errors import DataError
from escaip.scaling.fits import StudyFit, fit_study
from escaip.scaling.laws import FitSettings
from escaip.scaling.report import draw_sheet, markdown, write_fit, write_report

FEW = FitSettings(bootstrap=60)


def write(folder: Path) -> Path:
    n, d = grid()
    alone = [record(id="lost", losses={}, profiled=1.0), record(id="spent", profiled=1.02)]
    write_study(folder, records(n, d, loss(n, d, 0.02, 1, E=0.03), "hard"), alone)
    (folder / "study.json").write_text(json.dumps({"study": {"recipe": "quickstart", "epochs": 7}}))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two variants on a grid, one of budgets, one run that diverged and one that stands alone."""
    return write(tmp_path)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> StudyFit:
    """Fits of that study."""
    return fit_study(write(tmp_path_factory.mktemp("study")), settings=FEW)


def test_the_same_study_is_the_same_report(study: Path, found: StudyFit) -> None:
    files = write_report(found, study)
    assert {path.name for path in study.iterdir()} == {*(one.name for one in files), "records.jsonl", "study.json"}
    before = {file.name: file.read_bytes() for file in files}
    assert set(before) == {"fit.json", "report.md", "scaling.png", "scaling.pdf"}
    write_report(fit_study(study, settings=FEW), study)
    assert before == {file.name: file.read_bytes() for file in files}
    text = (study / "report.md").read_text("utf-8")
    for part in (
        markdown(found), "# Scaling of forces_mae", "| variant", "## Variants beside each other", "## default",
        "fits within the noise of seeds", "largest N (1e+07) left out", "γ of the frontier less αβ/(α+β)",
        "IsoFLOP parabolas", "Intervals hold 90 % (60 refits)", "![sheet](scaling.png)", "epochs: 7",
        "Diverged, and in no fit: lost.", "code: abc", "had 1 to 1.02 times the formula's operations (2 runs)",
    ):  # fmt: skip
        assert part in text, part
    assert "nan" not in text


def test_fits_as_json_and_the_commands(study: Path, found: StudyFit, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--bootstrap", "60", "--level", "0.8", "--no-floor", "--huber", "1"]
    for command in ("fit", "plot"):
        assert main(["scaling", command, str(study), *options]) == 0
    printed = capsys.readouterr().out
    assert "Intervals hold 80 % (60 refits), Huber δ = 1, E fixed to 0" in printed
    assert "report.md" in printed
    assert json.loads((study / "fit.json").read_text("utf-8"))["settings"]["floor"] is False
    written = json.loads(write_fit(found, study / "records.jsonl").read_text("utf-8"))
    default = found.variants["default"].joint
    alpha = default.estimates["alpha"]
    assert written["variants"]["default"]["joint"]["estimates"]["alpha"] == [alpha.value, alpha.low, alpha.high]
    assert written["settings"]["bootstrap"] == 60
    assert written["comparisons"][0]["quantity"] == "alpha"


def test_panels(study: Path) -> None:
    """A grid has sizes and data, budgets have parabolas and their minima, and learning curves are always there."""
    c = np.repeat([1e11, 1e12, 1e13], 5)
    best = 1e5 * (c / 1e11) ** 0.5
    n = best * np.tile([0.3, 0.5, 1.0, 2.0, 3.0], 3)
    write_study(study, records(n, c / 60 / n, c**-0.1 * np.exp(0.3 * np.log(n / best) ** 2), "spent"))
    axes = draw_sheet(fit_study(study, settings=FEW)).axes
    titles = [axis.get_title() for axis in axes]
    assert titles[:5] == ["default: compute", "size", "data", "runs about the law of N and D", "learning curves"]
    row = titles.index("spent: compute")
    assert titles[row + 1 : row + 3] == ["budgets", "best size and data of a budget"]
    assert all(axis.lines and not axis.texts for axis in axes)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--metric", "energy_mae"], 1, "no record holds 'energy_mae'"),
        (["--level", "90"], 2, "level is 90.0"),
    ],
)
def test_usage(study: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str) -> None:
    assert main(["scaling", "fit", str(study), *options]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.bad_input
def test_nothing_half_written(study: Path, found: StudyFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "fit.json").mkdir()
    with pytest.raises(DataError, match=r"cannot write .*fit\.json: "):
        write_fit(found, study)
    assert main(["scaling", "plot", str(tmp_path / "nowhere")]) == 1
    assert "no records: run `escaip scaling run` first" in capsys.readouterr().err
    assert not list(study.glob("*.p*"))
