"""``escaip analyze``: from the files of a run to numbers, tables and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from escaip.cli import main
from escaip.errors import DataError, UsageError
from escaip.simulate import AnalysisSettings, MDSettings, analyze, read_log, run_md
from escaip.simulate.report import QUANTITIES


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hot copper with gold, 120 frames 10 fs apart."""
    atoms = ase.build.bulk("Cu", a=3.7, cubic=True).repeat((2, 2, 2))
    atoms.numbers[::4] = 79
    atoms.calc = EMT()
    asked = MDSettings(temperature=1500.0, timestep=5.0, steps=238, log_interval=2, trajectory_interval=2)
    return run_md(atoms, asked, out=tmp_path_factory.mktemp("run") / "cu.traj").trajectory


def walkers(path: Path, seed: int = 0, count: int = 120, **info: Any) -> Path:
    """Frames without momenta, energies or a log."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(0, 9, size=(10, 3))
    frames = []
    for index in range(count):
        place = place + rng.normal(size=place.shape) * 0.2
        frame = Atoms("Li10", positions=place, cell=[9.0] * 3, pbc=True)
        if info.get("timed"):
            frame.info["time_fs"] = 4.0 * index
        frames.append(frame)
    ase.io.write(path, frames)
    return path


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b"
    assert main(["analyze", str(run), "--out", str(out), "--rmax", "6"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for text in ("120 frames of Au8Cu24 (32 atoms), 10 fs apart, 1.19 ps", "g(r) Cu-Au", "  D Cu", "energy drift"):
        assert text in printed.out
    names = ["analysis.json", "log.png", "msd.png", "rdf.png", "vacf.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names[1:])
    report = json.loads((out / "analysis.json").read_text())
    log = read_log(run.with_suffix(".csv"))
    assert report["temperature"]["mean_K"] == pytest.approx(log["temperature_K"].mean())
    assert report["pressure"]["mean_GPa"] == pytest.approx(log["pressure_GPa"].mean())
    assert report["density"]["mean_g_per_cm3"] == pytest.approx(
        (24 * 63.546 + 8 * 196.96657) / (7.4**3) * 1.66053907, rel=1e-7
    )
    assert report["frame_interval_fs"] == 10.0
    assert set(report["rdf"]["pairs"]) == {"all", "Au-Au", "Au-Cu", "Cu-Au", "Cu-Cu"}
    assert report["rdf"]["pairs"]["all"]["first_shell"]["coordination"] == pytest.approx(12, abs=1)
    assert set(report["msd"]["groups"]) == {"all", "Au", "Cu"}
    assert report["msd"]["center_of_mass_removed"] is True
    assert report["vacf"]["highest_per_cm"] == pytest.approx(1667.8, abs=0.1)
    assert abs(report["drift"]["slope_meV_per_atom_per_ps"]) < 5
    assert report["notes"] == []


def test_a_part_of_a_run_uses_that_part_of_its_log(run: Path, tmp_path: Path) -> None:
    found = analyze(run, AnalysisSettings(quantities=("temperature", "vacf"), start=20, stop=101, every=2))
    log = read_log(run.with_suffix(".csv"))
    chosen = (log["time_fs"] >= 200) & (log["time_fs"] <= 1000)
    assert found.num_frames == 41
    assert found.interval == 20.0
    assert found.temperature.mean == pytest.approx(log["temperature_K"][chosen].mean())
    assert found.temperature.num_samples == 81
    assert found.radial is None
    assert found.transport is None
    elsewhere = run.rename(tmp_path / "moved.traj")
    try:
        asked = AnalysisSettings(quantities=("drift",), log=run.with_suffix(".csv"))
        assert analyze(elsewhere, asked).drift is not None
    finally:
        elsewhere.rename(run)


def test_what_is_not_possible_is_left_out_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = walkers(tmp_path / "a.extxyz")
    assert main(["analyze", str(path), "--timestep", "2", "--every", "2", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "60 frames of Li10 (10 atoms), 4 fs apart" in printed
    assert "left out: vacf: the frames hold no momenta" in printed
    for name in ("temperature", "pressure", "drift"):
        assert f"left out: {name}: there is no log" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["analysis.json", "msd.png", "rdf.png"]
    report = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert report["vacf"] is None
    assert len(report["notes"]) == 4
    single = analyze(walkers(tmp_path / "b.extxyz", count=1, timed=True))
    assert any("one frame only" in note for note in single.notes)
    molecule = tmp_path / "c.extxyz"
    ase.io.write(molecule, [ase.build.molecule("CH4")] * 3)
    asked = AnalysisSettings(timestep=1.0)
    assert sum("periodic along all three axes" in note for note in analyze(molecule, asked).notes) == 2


def test_the_drift_of_the_center_of_mass(tmp_path: Path) -> None:
    frames = [Atoms("Li2", positions=[[0.05 * i, 0, 0], [2 + 0.05 * i, 0, 0]]) for i in range(100)]
    ase.io.write(tmp_path / "a.extxyz", frames)
    values: dict[str, Any] = {"quantities": ("msd",), "timestep": 1.0}
    removed = analyze(tmp_path / "a.extxyz", AnalysisSettings(**values))
    for frame in frames:
        frame.set_constraint(FixAtoms([0]))  # then the frame of reference is given
    ase.io.write(tmp_path / "b.traj", frames)
    kept = analyze(tmp_path / "b.traj", AnalysisSettings(**values))
    assert (removed.drift_removed, kept.drift_removed) == (True, False)
    assert removed.transport.msd["all"] == pytest.approx(0.0, abs=1e-12)
    assert kept.transport.msd["all"][10] == pytest.approx(0.25)
    assert "not diffusive: MSD grows as t^2.00" in kept.table()


def test_doubts_are_told(tmp_path: Path) -> None:
    far = [Atoms("Li2", positions=[[4.3 * i, 0, 0], [0, 5, 0]], cell=[10.0] * 3, pbc=True) for i in range(100)]
    ase.io.write(tmp_path / "a.extxyz", far)
    asked: dict[str, Any] = {"quantities": ("msd",), "timestep": 1.0}
    assert "moved by 0.43 of the cell" in analyze(tmp_path / "a.extxyz", AnalysisSettings(**asked)).notes[0]
    assert analyze(tmp_path / "a.extxyz", AnalysisSettings(**asked, unwrap=False)).notes == ()
    water = [ase.build.molecule("H2O") for _ in range(60)]
    for index, frame in enumerate(water):
        frame.set_velocities(np.full((3, 3), np.cos(index)))
    ase.io.write(tmp_path / "b.extxyz", water)
    (note,) = analyze(tmp_path / "b.extxyz", AnalysisSettings(quantities=("vacf",), timestep=5.0)).notes
    assert "up to 3336 cm⁻¹; bonds of H may vibrate at up to 4500" in note


def test_help_and_quantities_say_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "--help"]) == 0
    assert ", ".join(QUANTITIES) in " ".join(capsys.readouterr().out.split())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 2, "does not say when its frames were taken: give --timestep"),
        (["--quantities", "vacf", "--timestep", "1"], 1, "vacf: the frames hold no momenta"),
        (["--quantities", "rdf,xrd"], 2, "quantity 'xrd' is unknown: choose rdf, msd"),
        (["--quantities", ","], 2, "no quantity is asked for"),
        (["--quantities", "drift"], 1, "there is no log"),
        (["--quantities", "msd", "--timestep", "1", "--stop", "20"], 1, "msd: too few frames"),
        (["--quantities", "msd", "--timestep", "1", "--fit", "50", "90"], 2, "end before 0.9 of a block"),
        (["--timestep", "-1"], 2, "timestep is -1.0: it must be above 0"),
        (["--timestep", "1", "--rmax", "nan"], 2, "--rmax is 'nan'"),
        (["--start", "500", "--quantities", "rdf"], 1, "has no frame number 500"),
        (["--start", "5", "--stop", "2"], 2, "no frame is in start 5, stop 2"),
    ],
)
def test_wrong_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str
) -> None:
    path = walkers(tmp_path / "a.traj")
    assert main(["analyze", str(path), "--out", str(tmp_path / "out"), *options]) == status
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.bad_input
def test_files_that_do_not_fit(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        analyze(tmp_path / "a.traj")
    frames = [Atoms("Li", positions=[[0, 0, 0]]), Atoms("Na", positions=[[0, 0, 0]])]
    ase.io.write(tmp_path / "a.extxyz", frames)
    with pytest.raises(DataError, match="frame 1 of those read holds other atoms"):
        analyze(tmp_path / "a.extxyz", AnalysisSettings(timestep=1.0))
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"b\.csv is none of escaip md"):
        analyze(run, AnalysisSettings(quantities=("drift",), log=tmp_path / "b.csv"))
    with pytest.raises(UsageError, match="10 fs apart: leave --timestep out"):
        analyze(run, AnalysisSettings(timestep=3.0))
    (tmp_path / "file").write_text("")
    assert main(["analyze", str(run), "--out", str(tmp_path / "file" / "out"), "--no-plots"]) == 1
