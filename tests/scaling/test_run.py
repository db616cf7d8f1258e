"""Studies that are run, killed, continued, submitted; runs that fail."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_plan import study

from escaip.errors import ConfigError, DataError, TrainingError
from escaip.scaling import run
from escaip.scaling.records import read_records
from escaip.scaling.run import run_study

STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in_job.py")))
PROGRAM = """
import sys
from escaip.scaling import run
run.COMMAND, run._POLL = tuple(sys.argv[3:]), 0.01
run.run_study(sys.argv[1], sys.argv[2], workers=2)
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "COMMAND", STAND_IN)
    monkeypatch.setattr(run, "_POLL", 0.01)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(tmp_path)


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "study.yaml"
    small = {"widths": [16, 32], "variants": {"default": {}}, **changes}
    file.write_text(yaml.safe_dump(study(**small)), "utf-8")
    return file


def starts(folder: Path) -> list[int]:
    return [len(file.read_text().split()) for file in sorted(folder.glob("jobs/*/starts.txt"))]


def test_every_run_once_in_the_order_of_the_plan(config: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert run_study(config, tmp_path / "out", workers=3, say=said.append)
    records = read_records(tmp_path / "out")
    assert [record.id for record in records] == json.loads((tmp_path / "out" / "study.json").read_text())["jobs"]
    assert len(records) == 8
    assert len(said) == 8
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    assert run_study(config, tmp_path / "out", say=said.append)
    assert said[-1] == "8 of 8 runs are done already"
    assert starts(tmp_path / "out") == [1] * 8
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == before


def test_a_study_killed_five_times_ends_as_one_that_was_not(config: Path, tmp_path: Path) -> None:
    assert run_study(config, tmp_path / "whole", say=lambda line: None)
    out, rng = tmp_path / "killed", random.Random(0)
    arguments = [sys.executable, "-c", PROGRAM, str(config), str(out), *STAND_IN]
    for _ in range(5):
        before = sum(starts(out))
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, start_new_session=True)
        while sum(starts(out)) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run_study(config, out, say=lambda line: None)
    assert (out / "records.jsonl").read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()
    assert sum(starts(out)) > 8


def test_a_run_that_another_command_has_is_waited_for(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", PROGRAM, str(config), str(out), *STAND_IN]
    others = [subprocess.Popen(arguments, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert run_study(config, out, say=lambda line: None)
    assert [other.wait() for other in others] == [0, 0]
    assert len(read_records(out)) == 8
    assert starts(out) == [1] * 8


def test_a_run_that_is_claimed_is_not_started(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = run.StudyPlan.read(config).jobs()[0]
    (out / "jobs" / job.id).mkdir(parents=True)
    lock = run.claim(out / "jobs" / job.id)
    assert lock is not None
    assert run.claim(out / "jobs" / job.id) is None
    arguments = [sys.executable, "-c", PROGRAM, str(config), str(out), *STAND_IN]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as other:
        while len(list(out.glob("jobs/*/record.json"))) < 7:
            assert other.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)
        assert not (out / "jobs" / job.id / "starts.txt").exists()
        lock.close()
        assert other.wait() == 0
    assert len(read_records(out)) == 8


def test_a_sweep_then_the_grid(tmp_path: Path) -> None:
    config = write(tmp_path, learning_rate={"sweep": [0.001, 0.01, 0.2]}, seeds=[0])
    said: list[str] = []
    assert run_study(config, tmp_path / "out", say=said.append)
    assert {record.learning_rate for record in read_records(tmp_path / "out")} == {0.01}
    assert len(read_records(tmp_path / "out" / "sweep.jsonl")) == 6
    assert "learning rate of default, w16: 0.01" in said


def test_every_rate_diverged(tmp_path: Path) -> None:
    config = write(tmp_path, learning_rate={"sweep": [0.2, 0.3]})
    with pytest.raises(TrainingError, match="add lower ones"):
        run_study(config, tmp_path / "out", say=lambda line: None)


def test_failed_runs_are_named_after_all_others(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "w32-d1-s0")
    with pytest.raises(TrainingError, match=r"1 of 8 runs failed; of default-w32-d1-s0-\w+: out of memory"):
        run_study(config, tmp_path / "out", say=lambda line: None)
    assert len(read_records(tmp_path / "out")) == 7
    monkeypatch.delenv("FAIL")
    assert run_study(config, tmp_path / "out", say=lambda line: None)
    assert len(read_records(tmp_path / "out")) == 8


def test_another_sweep_is_not_mixed_in(tmp_path: Path) -> None:
    config = write(tmp_path, learning_rate={"sweep": [0.001, 0.01]}, seeds=[0])
    assert run_study(config, tmp_path / "out", say=lambda line: None)
    with pytest.raises(DataError, match="holds another study"):
        run_study(write(tmp_path, learning_rate={"sweep": [0.002, 0.01]}, seeds=[0]), tmp_path / "out")
    assert len(list((tmp_path / "out" / "jobs").iterdir())) == 8


def test_another_study_is_not_mixed_in(config: Path, tmp_path: Path) -> None:
    assert run_study(config, tmp_path / "out", say=lambda line: None)
    with pytest.raises(DataError, match="holds another study"):
        run_study(write(tmp_path, epochs=4), tmp_path / "out", say=lambda line: None)
    assert len(read_records(tmp_path / "out")) == 8


SBATCH = """#!{python}
import os, subprocess, sys
script = open(sys.argv[-1]).read()
last = int(script.split("--array=0-")[1].split()[0])
for task in range(last + 1):
    subprocess.run(["bash", sys.argv[-1]], env={{**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}}, check=True)
print("4711;cluster")
"""


def test_slurm_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tools, out = write(tmp_path, seeds=[0]), tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    (tools / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (tools / "sbatch").chmod(0o755)
    with pytest.raises(ConfigError, match=r"there is no sbatch here: submit .*slurm\.sh"):
        run_study(config, out, slurm=["--time=1:00:00"], say=lambda line: None)
    script = (out / "slurm.sh").read_text()
    assert "#SBATCH --time=1:00:00\n" in script
    assert "#SBATCH --array=0-3\n" in script
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    # The line that starts a task is the real one; what it starts is not.
    real = "-m escaip.scaling.job"
    assert real in script
    monkeypatch.setattr(
        run, "TASK", f"{STAND_IN[1]} {out} $(sed -n $((SLURM_ARRAY_TASK_ID + 1))p {out}/slurm-jobs.txt)"
    )
    said: list[str] = []
    assert not run_study(config, out, slurm=[], say=said.append)
    assert said[-1] == "4 runs are submitted as array 4711: run the same command when it has ended"
    assert run_study(config, out, slurm=[], say=said.append)
    assert len(read_records(out)) == 4


@pytest.mark.bad_input
def test_no_workers(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--workers 0: at least 1"):
        run_study(config, tmp_path / "out", workers=0)
