"""``check``, ``--committee``, ``--d3`` and ``select`` as they are typed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import pytest
from ase import Atoms
from tiny import make_potential

from escaip import EScAIPCalculator
from escaip.cli import main
from escaip.signals import StopSignals
from escaip.simulate import MDSettings, read_log, run_md

Capture = pytest.CaptureFixture[str]


def test_check(model: Path, molecule: Path, tmp_path: Path, capsys: Capture) -> None:
    ase.io.write(molecule, ase.build.molecule("H2O"))
    assert main(["check", str(model), "--structure", str(molecule)]) == 0
    printed = capsys.readouterr().out
    assert "pass  forces: F = -dE/dr, some atoms" in printed
    assert "FAIL" not in printed
    jumping = tmp_path / "jumping.escaip"
    make_potential(boo_weighting="uniform").save(jumping)
    assert main(["check", str(jumping), "--structure", str(molecule)]) == 1
    printed = capsys.readouterr()
    assert "FAIL  energy where neighbors come and go" in printed.out
    assert "comparisons failed" in printed.err


def test_check_of_any_calculator_on_structures_that_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from ase.calculators.emt import EMT\n"
        "class Wrong(EMT):\n"
        "    def calculate(self, *args, **kwargs):\n"
        "        super().calculate(*args, **kwargs)\n"
        "        self.results['forces'] = 1.1 * self.results['forces']\n"
    )
    assert main(["check", "--calculator", "ase.calculators.emt:EMT"]) == 0
    printed = capsys.readouterr().out
    assert "C2H6O, 9 atoms" in printed
    assert "Cu4, 4 atoms" in printed
    assert main(["check", "--calculator", "mine:Wrong"]) == 1
    printed = capsys.readouterr()
    assert "FAIL  forces: F = -dE/dr" in printed.out
    assert printed.err.count("\n") == 1
    for arguments in ([], ["--calculator", "mine:Nothing"], ["--calculator", "json:dumps"]):
        assert main(["check", *arguments]) == 2


def test_a_committee_runs_and_frames_are_selected(
    model: Path, second: Path, molecule: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run.extxyz"
    run = ["md", str(model), str(molecule), "--ensemble", "nve", "--temperature", "300", "--steps", "12", "--quiet",
           "--interval", "2", "--out", str(out), "--committee", str(second)]  # fmt: skip
    assert main([*run, "--save-spread", "1e-9"]) == 0
    assert (read_log(out.with_suffix(".csv"))["max_forces_spread_eV_A"] > 0).all()
    assert len(ase.io.read(tmp_path / "run.uncertain.extxyz", ":")) == 7
    assert main([*run, "--max-spread", "1e-9", "--overwrite"]) == 1
    assert "stopped at step 0: the committee's forces" in capsys.readouterr().err
    assert main(["relax", str(model), str(molecule), "--committee", str(second), "--fmax", "5",
                 "--out", str(tmp_path / "r.extxyz")]) == 0  # fmt: skip
    chosen = tmp_path / "chosen.extxyz"
    select = ["select", str(out), "--committee", str(model), str(second), "--count", "2", "--out", str(chosen)]
    assert main([*run, "--overwrite"]) == 0
    assert main([*select, "--min-distance", "0"]) == 0
    assert "2 of 7 frames chosen" in capsys.readouterr().out
    assert len(ase.io.read(chosen, ":")) == 2
    assert len(json.loads(chosen.with_suffix(".json").read_text())["frames"]["frame"]) == 7


def test_charge_and_spin_are_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    make_potential(charge=True, spin=True).save("ions.escaip")
    water = ase.build.molecule("H2O")
    ase.io.write("in.extxyz", water)
    water.info.update(charge=-1, spin=2)
    water.calc = EScAIPCalculator("ions.escaip")
    ion = ["--charge", "-1", "--spin", "2"]
    for command in ("md --steps 1 --quiet", "relax --fmax 100", "relax --fmax 100 --all"):
        name, *options = command.split()
        assert main([name, "ions.escaip", "in.extxyz", *options, *ion, "--out", "out.extxyz", "--overwrite"]) == 0
        frame = ase.io.read("out.extxyz", 0)
        assert frame.get_potential_energy() == pytest.approx(water.get_potential_energy(), abs=1e-6)
        assert (frame.info["charge"], frame.info["spin_multiplicity"]) == (-1, 2)
    water.info["charge"] = 1
    ase.io.write("in.extxyz", water)
    for command in ("md", "relax", "relax --all", "vibrations"):
        name, *options = command.split()
        assert main([name, "ions.escaip", "in.extxyz", *options, *ion, "--out", f"{name}{options}.extxyz"]) == 1
        assert "its info states charge 1, the calculator -1" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "timestep"), [("CH3OH", 0.5), ("CO2", 1.0), ("Si", 2.0)])
def test_md_runs_without_options(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, timestep: float
) -> None:
    asked: list[MDSettings] = []

    def run(atoms: Atoms, settings: MDSettings, **options: Any) -> Any:
        asked.append(settings)
        return run_md(atoms, dataclasses.replace(settings, steps=2), **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("escaip.simulate.md.run_md", run)
    ase.io.write("a.extxyz", ase.build.bulk("Si") if name == "Si" else ase.build.molecule(name))
    elements = make_potential()
    elements.metadata = dataclasses.replace(elements.metadata, elements=())
    elements.save("any.escaip")
    assert main(["md", "any.escaip", "a.extxyz"]) == 0
    assert (asked[0].ensemble, asked[0].temperature, asked[0].timestep) == ("nvt", 300.0, timestep)
    assert 1000 <= asked[0].steps <= 10_000
    assert read_log("md.csv")["step"][-1] == 0


STOPPED = "stopped at step {} of {}; continue with"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_md_which_the_printed_line_continues(
    model: Path, molecule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["md", str(model), str(molecule), "--steps", "20000", "--interval", "1", "--seed", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-m", "escaip", *command], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 300.0
        while not Path("md.csv").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        printed, errors = process.communicate()
    assert process.returncode == 128 + getattr(signal, name)
    assert f"{name}: ending after this step" in errors
    *_, stopped, line = printed.splitlines()
    done = int(read_log("md.csv")["step"][-1])
    assert stopped == f"{name}: {STOPPED.format(done, 20000)}"
    assert line == shlex.join(["escaip", *command, "--resume"])
    assert main([*shlex.split(line)[1:], "--steps", str(done + 5)]) == 0
    assert main([*command, "--steps", str(done + 5), "--out", "whole.extxyz"]) == 0
    assert Path("md.extxyz").read_bytes() == Path("whole.extxyz").read_bytes()


def test_md_ends_at_its_time_limit_and_goes_on_to_the_steps_asked_for(
    model: Path, molecule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["md", str(model), str(molecule), "--steps", "12", "--interval", "1", "--max-time", "0-00:02:00"]
    monkeypatch.setattr(sys, "argv", ["escaip", *command, "--overwrite"])
    with monkeypatch.context() as patch:
        start, calls = time.monotonic(), itertools.count()
        patch.setattr(time, "monotonic", lambda: start + 30.0 * next(calls))
        assert main([*command, "--overwrite"]) == 0
    *_, stopped, line = capsys.readouterr().out.splitlines()
    done = int(read_log("md.csv")["step"][-1])
    assert 0 < done < 12
    assert stopped == f"time limit: {STOPPED.format(done, 12)}"
    assert line == shlex.join(["escaip", *command, "--resume"])
    assert main(["md", str(model), str(molecule), "--interval", "1", "--resume"]) == 0
    assert read_log("md.csv")["step"].tolist() == list(range(13))


def test_a_second_interruption_ends_at_once_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals(signal.SIGINT, signal.SIGTERM) as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals(signal.SIGINT) as signals:
            signal.raise_signal(signal.SIGINT)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGINT, before[0])


@pytest.mark.bad_input
def test_what_is_missing(
    model: Path, molecule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["md", str(model), str(molecule)]
    run = [*common, "--ensemble", "nve", "--steps", "2", "--temperature", "300", "--quiet"]
    assert main([*run, "--out", "run.h5"]) == 2
    assert "run.h5 has no known format: choose a name that ends in .extxyz or .traj" in capsys.readouterr().err
    assert main([*run, "--max-spread", "1"]) == 2
    assert "need a committee: give further models with --committee" in capsys.readouterr().err
    for wrong in ("90", "1:30", "00:00:00", "1 day"):
        assert main([*run, "--max-time", wrong]) == 2
        assert f"--max-time is '{wrong}': write it as HH:MM:SS or D-HH:MM:SS" in capsys.readouterr().err
    assert main([*run, "--resume", "--overwrite"]) == 2
    assert "choose one of them" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "dftd3.ase", None)
    assert main([*run, "--d3", "pbe"]) == 2
    assert "pip install dftd3" in capsys.readouterr().err
    assert main(["select", "t.extxyz", "--committee", str(model), "--count", "1", "--out", "o.extxyz"]) == 1
    assert "t.extxyz does not exist" in capsys.readouterr().err
    assert not (tmp_path / "md.extxyz").exists()


def test_dispersion_is_added(model: Path, molecule: Path, tmp_path: Path) -> None:
    pytest.importorskip("dftd3.interface", reason="pip install dftd3")
    energies = []
    for extra in ([], ["--d3", "pbe"], ["--d3", "pbe", "--d3-damping", "zero"]):
        out = tmp_path / "r.extxyz"
        assert main(["relax", str(model), str(molecule), "--fmax", "100", "--out", str(out), *extra]) == 0
        energies.append(ase.io.read(out).get_potential_energy())
    assert len(set(energies)) == 3
    assert energies[1] < energies[0]
