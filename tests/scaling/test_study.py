"""The fit of a whole study and its command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import grid, loss, records, write, write_study

from escaip.cli import main
from escaip.errors import DataError
from escaip.scaling import FitSettings, fit_study

FEW = FitSettings(bootstrap=80)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two variants on a grid and one of IsoFLOP runs."""
    n, d = grid()
    write_study(tmp_path, records(n, d, loss(n, d, 0.02, 1, E=0.03), "hard"))
    return tmp_path


def test_everything_the_records_allow(study: Path) -> None:
    found = fit_study(study, settings=FEW)
    assert list(found.variants) == ["default", "hard", "isoflop"]
    one = found.variants["default"]
    assert one.joint is not None
    assert one.power is not None
    assert one.gamma_difference is not None
    assert one.isoflop is None or one.isoflop.parabolas
    assert found.variants["isoflop"].isoflop is not None
    assert len(one.joint.left_out) == 2
    assert one.on_frontier.sum() >= 6
    written = json.loads((study / "fit.json").read_text(encoding="utf-8"))
    assert written == found.to_dict()
    alpha = written["variants"]["default"]["joint"]["estimates"]["alpha"]
    assert alpha[1] < alpha[0] < alpha[2]
    assert [path.name for path in study.iterdir() if "part" in path.name] == []


def test_the_report_in_words(study: Path) -> None:
    text = fit_study(study, settings=FEW).summary()
    for part in (
        "# Scaling of forces_mae", "| variant", "## Variants beside each other", "## default", "## isoflop",
        "the law fits within the noise of seeds", "largest N (1e+07) left out", "γ of the frontier less αβ/(α+β)",
        "IsoFLOP parabolas", "E = 0", "Intervals hold 90 % (80 refits)",
    ):  # fmt: skip
        assert part in text, part
    assert "nan" not in text


def test_a_variant_with_few_points_is_said_not_hidden(study: Path) -> None:
    n, d = grid(2, 2)
    write(study, records(n, d, loss(n, d, 0.02)), records(*grid(), loss(*grid(), 0.02), "full"))
    found = fit_study(study, settings=FEW)
    assert found.variants["default"].joint is None
    assert any("4 distinct points (N, D) for a law of 5 parameters" in one for one in found.variants["default"].notes)
    assert "4 distinct points" in found.summary()
    assert "not tested" in found.summary()


def test_runs_without_the_metric_are_counted(study: Path) -> None:
    n, d = grid()
    runs = records(n, d, loss(n, d, 0.02))
    write(study, [*runs[:-1], type(runs[-1])(**{**vars(runs[-1]), "losses": {}})])
    found = fit_study(study, settings=FEW, write=False)
    assert "1 of 24 runs have no forces_mae and are left out" in found.variants["default"].notes
    assert not (study / "fit.json").exists()


def test_command(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["scaling", "fit", str(study), "--bootstrap", "60", "--level", "0.8", "--no-floor", "--huber", "1"]) == 0
    )
    out = capsys.readouterr().out
    assert "Intervals hold 80 % (60 refits), Huber δ = 1, E fixed to 0" in out
    assert out.rstrip().endswith(f"wrote fit.json in {study}")
    assert json.loads((study / "fit.json").read_text(encoding="utf-8"))["settings"]["floor"] is False
    assert main(["scaling", "fit", "--help"]) == 0
    assert main(["scaling", "--help"]) == 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--metric", "energy_mae"], 1, "no record holds 'energy_mae': use --metric with one of forces_mae"),
        (["--bootstrap", "5"], 2, "bootstrap is 5"),
        (["--level", "90"], 2, "level is 90.0"),
        (["--huber", "0"], 2, "huber is 0.0"),
    ],
)
def test_usage(study: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str) -> None:
    assert main(["scaling", "fit", str(study), *options]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.bad_input
def test_nothing_can_be_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, records(np.array([1e5, 1e6]), np.array([1e3, 1e3]), np.array([0.2, 0.1])))
    with pytest.raises(DataError, match="nothing can be fitted: law of N and D not fitted: 2 distinct points"):
        fit_study(tmp_path, settings=FEW)
    assert not (tmp_path / "fit.json").exists()
    assert main(["scaling", "fit", str(tmp_path / "nowhere")]) == 1
    assert "no records: run `escaip scaling run` first" in capsys.readouterr().err


@pytest.mark.bad_input
def test_a_folder_that_cannot_be_written(study: Path) -> None:
    (study / "fit.json").mkdir()
    with pytest.raises(DataError, match=r"cannot write .*fit\.json: .*: check its folder and the disk"):
        fit_study(study, settings=FEW)
