"""Jobs in processes of their own: answers, failures, and a log that kills leave whole."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT

from escaip.distil.labels import Job, Labeler, LabelLog, frames_of
from escaip.distil.structures import Structure
from escaip.errors import ConfigError, DataError

HERE = Path(__file__).parent
PROGRAM = """
import sys
from pathlib import Path
from test_labels import rattled
from escaip.distil.labels import LabelLog, Labeler
Labeler("teachers:slow").run(rattled(40), LabelLog(Path(sys.argv[1])), workers=2)
"""


@pytest.fixture(autouse=True)
def _beside_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@pytest.fixture
def log(tmp_path: Path) -> LabelLog:
    return LabelLog(tmp_path / "labels.jsonl")


def job_of(atoms: Atoms, kind: str = "label", **settings: Any) -> Job:
    return Job(Structure("one/0", "one", atoms), kind, settings)


def rattled(count: int, repeats: int = 1) -> list[Job]:
    rng, jobs = np.random.default_rng(0), []
    for number in range(count):
        atoms = ase.build.bulk("Cu", cubic=True) * (repeats, 1, 1)
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
        jobs.append(Job(Structure(f"one/{number}", "one", atoms), "label"))
    return jobs


def keys_in(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text("utf-8").splitlines()]


def test_labels_are_the_calculators_to_the_last_bit(log: LabelLog) -> None:
    jobs = rattled(6)
    assert Labeler("ase.calculators.emt:EMT").run(jobs, log, workers=2).startswith("ase ")
    for job in jobs:
        (frame,) = frames_of(job, log[job.key])
        atoms = job.structure.atoms.copy()
        atoms.calc = EMT()
        assert frame.get_potential_energy() == atoms.get_potential_energy()
        assert np.array_equal(frame.get_forces(), atoms.get_forces())
        assert np.array_equal(frame.get_stress(), atoms.get_stress())
    before = log.path.read_bytes()
    assert Labeler("no.such:Thing").run(jobs, log) == ""  # nothing is left to do
    assert log.path.read_bytes() == before


def test_a_crystal_is_relaxed_from_a_poor_guess(log: LabelLog) -> None:
    guess = ase.build.bulk("Cu", cubic=True, a=4.3)
    job = job_of(guess, "relax", steps=40, fmax=0.01)
    Labeler("ase.calculators.emt:EMT").run([job], log)
    frames = frames_of(job, log[job.key])
    assert frames[-1].cell.lengths() == pytest.approx([3.5898] * 3, abs=2e-3)
    assert abs(frames[-1].get_stress()).max() < 2e-3
    assert len({round(frame.get_volume(), 6) for frame in frames}) == len(frames) > 8


@pytest.mark.parametrize("temperature", [300, 1200])
def test_dynamics_reach_their_temperature_and_repeat(log: LabelLog, tmp_path: Path, temperature: int) -> None:
    atoms = ase.build.bulk("Cu", cubic=True) * (2, 2, 2)
    settings = {"temperature": temperature, "timestep": 5.0, "every": 10, "frames": 30, "relax": 2, "seed": 3}
    job = job_of(atoms, "dynamics", **settings)
    again = LabelLog(tmp_path / "again.jsonl")
    for one in (log, again):
        Labeler("ase.calculators.emt:EMT").run([job], one)
    assert log[job.key]["frames"] == again[job.key]["frames"]
    frames = frames_of(job, log[job.key])
    assert len(frames) == 30
    energies = [frame.get_potential_energy() for frame in frames[10:]]
    atoms.calc = EMT()
    hot = 1.5 * 32 * 8.617e-5 * temperature  # of harmonic vibrations
    assert np.mean(energies) - atoms.get_potential_energy() == pytest.approx(hot, rel=0.5)


def test_a_relaxation_without_a_minimum_stays_where_it_began(log: LabelLog) -> None:
    crystal = ase.build.bulk("Cu", cubic=True)
    job = job_of(crystal, "relax", steps=20, fmax=0.01)
    Labeler("teachers:Hollow").run([job], log)
    answer = log[job.key]
    assert "above max_stress, 0.6" in answer["ended"]
    frames = frames_of(job, answer)
    # The smallest crystal within the bound: a smaller one has less energy, and more stress.
    assert len(frames) == 8 - (answer["dropped"] - 1)
    assert frames[-1].get_volume() == min(frame.get_volume() for frame in frames)
    assert abs(frames[-1].get_stress()).max() <= 0.6


def test_charge_and_spin_reach_the_calculator(log: LabelLog) -> None:
    jobs = [job_of(Atoms("OH", [[0, 0, 0], [0, 0, 1]], info=info)) for info in ({}, {"charge": -1}, {"spin": 2})]
    Labeler("teachers:Charged").run(jobs, log)
    assert [log[job.key]["frames"][0]["energy"] for job in jobs] == [10.0, -90.0, 20.0]
    assert "stress" not in log[jobs[0].key]["frames"][0]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nan", "not finite"),
        ("raise", "RuntimeError: the SCF did not converge"),
        ("unconverged", "has not converged"),
        ("die", r"its process ended \(3\)"),
        ("hang", "more than 1 s"),
    ],
)
def test_a_job_that_fails_costs_itself_alone(log: LabelLog, fault: str, reason: str) -> None:
    jobs = [*rattled(2), *rattled(1, repeats=2), *rattled(4)[2:]]
    Labeler("teachers:Faulty", {"fault": fault, "size": 8}, timeout=1.0).run(jobs, log)
    (bad,) = [job for job in jobs if len(job.structure.atoms) == 8]
    assert re.search(reason, log[bad.key]["error"])
    assert log[bad.key]["frames"] == []
    assert all(len(log[job.key]["frames"]) == 1 for job in jobs if job is not bad)


def test_large_forces_are_left_out(log: LabelLog) -> None:
    close = ase.build.bulk("Cu", cubic=True)
    close.positions[1] = close.positions[0] + [1.2, 0, 0]
    jobs = [*rattled(3), job_of(close)]
    Labeler("ase.calculators.emt:EMT", max_force=10.0).run(jobs, log)
    assert "above max_force, 10" in log[jobs[-1].key]["error"]
    assert log[jobs[-1].key]["dropped"] == 1


@pytest.mark.parametrize(
    ("labeler", "message"),
    [
        (Labeler("no_such_module:Thing"), "calculator no_such_module:Thing: ModuleNotFoundError"),
        (Labeler("ase.calculators.emt:Thing"), "calculator ase.calculators.emt:Thing: AttributeError"),
        (Labeler("teachers:Faulty", {"wrong": 1}), "TypeError.*'wrong'"),
        (Labeler("ase.calculators.emt:EMT", python="/no/such/python"), "/no/such/python: No such file"),
        (Labeler("teachers:Faulty", {"fault": "raise", "size": 4}), "failed in each of the first 4 jobs.*SCF"),
    ],
)
def test_a_teacher_that_cannot_work_is_named(log: LabelLog, labeler: Labeler, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        labeler.run(rattled(4), log, workers=2)
    assert "\n" not in str(error.value)


def test_a_line_that_was_cut_is_done_again(log: LabelLog) -> None:
    jobs = rattled(3)
    Labeler("ase.calculators.emt:EMT").run(jobs, log)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-40])
    again = LabelLog(log.path)
    assert [job.key in again for job in jobs] == [True, True, False]
    Labeler("ase.calculators.emt:EMT").run(jobs, again)
    assert log.path.read_bytes() == whole
    log.path.write_bytes(b"{" + whole)
    with pytest.raises(DataError, match="line 1 is damaged"):
        LabelLog(log.path)


def test_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    path, rng = tmp_path / "labels.jsonl", random.Random(0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    known: list[str] = []
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], env=environment, cwd=HERE)
        while len(keys_in(path) if path.exists() else []) <= len(known) + 1 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        process.wait()
        LabelLog(path)
        assert keys_in(path)[: len(known)] == known
        known = keys_in(path)
    log = LabelLog(path)
    Labeler("teachers:slow").run(rattled(40), log, workers=2)
    assert sorted(keys_in(path)) == sorted(job.key for job in rattled(40))
