"""Studies that are run, killed, continued, submitted; and what a run trains, counts and writes down."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import submitit
import yaml
from test_study import study
from training_stand_ins import TINY, write_molecules

from escaip.errors import ConfigError, DataError, TrainingError
from escaip.files import try_lock
from escaip.scaling import run
from escaip.scaling.flops import GraphShape, training_flops
from escaip.scaling.run import folder_of, main, read_validations, run_study, train
from escaip.scaling.study import Job, Record, StudyPlan, read_records

STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in_job.py")))
PROGRAM = """
import sys
from escaip.scaling import run
run.COMMAND, run._POLL = tuple(sys.argv[3:]), 0.01
run.run_study(sys.argv[1], sys.argv[2], workers=2)
"""
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's


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


def program(config: Path, out: Path, **options: Any) -> subprocess.Popen[bytes]:
    """The same study in another process."""
    command = [sys.executable, "-c", PROGRAM, str(config), str(out), *STAND_IN]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)


def test_every_run_once_in_the_order_of_the_plan(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_study(config, out, workers=3)
    assert [record.id for record in read_records(out)] == json.loads((out / "study.json").read_text())["jobs"]
    assert len(capsys.readouterr().out.splitlines()) == 8
    before = (out / "records.jsonl").read_bytes()
    assert run_study(config, out)
    assert capsys.readouterr().out == "8 of 8 runs are done already\n"
    assert starts(out) == [1] * 8
    assert (out / "records.jsonl").read_bytes() == before
    with pytest.raises(DataError, match="holds another study"):
        run_study(write(tmp_path, epochs=4), out)
    assert len(read_records(out)) == 8


def test_a_study_killed_thrice_ends_as_one_that_was_not(config: Path, tmp_path: Path) -> None:
    assert run_study(config, tmp_path / "whole")
    out, rng = tmp_path / "killed", random.Random(0)
    for _ in range(3):
        before = sum(starts(out))
        process = program(config, out, start_new_session=True)
        while sum(starts(out)) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run_study(config, out)
    assert (out / "records.jsonl").read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()
    assert sum(starts(out)) > 8


def test_a_run_that_another_command_has_is_waited_for(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = StudyPlan.read(config).jobs()[0]
    folder_of(out, job.id).mkdir(parents=True)
    lock = try_lock(folder_of(out, job.id) / "lock")
    assert lock is not None
    others = [program(config, out) for _ in range(2)]
    while len(list(out.glob("jobs/*/record.json"))) < 7:
        assert None in [other.poll() for other in others]
        time.sleep(0.02)
    time.sleep(0.3)
    assert not (folder_of(out, job.id) / "starts.txt").exists()
    lock.close()
    assert run_study(config, out)
    assert [other.wait() for other in others] == [0, 0]
    assert len(read_records(out)) == 8
    assert starts(out) == [1] * 8


def test_a_sweep_then_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    config = write(tmp_path, learning_rate={"sweep": [0.001, 0.01, 0.2]}, seeds=[0])
    assert run_study(config, out)
    assert {record.learning_rate for record in read_records(out)} == {0.01}
    assert len(read_records(out / "sweep.jsonl")) == 6
    assert "\nlearning rate of default, w16: 0.01\n" in capsys.readouterr().out
    base = write(tmp_path, learning_rate={"sweep": [0.001, 0.01], "base_width": 32}, data_sizes=[1.0], seeds=[0])
    assert run_study(base, tmp_path / "base")
    assert {(one.size, one.learning_rate) for one in read_records(tmp_path / "base")} == {("w16", 0.01), ("w32", 0.01)}
    assert {one.size for one in read_records(tmp_path / "base" / "sweep.jsonl")} == {"w32"}
    with pytest.raises(DataError, match="holds another study"):
        run_study(write(tmp_path, learning_rate={"sweep": [0.002, 0.01]}, seeds=[0]), out)
    with pytest.raises(TrainingError, match="add lower ones"):
        run_study(write(tmp_path, learning_rate={"sweep": [0.2, 0.3]}), tmp_path / "other")


def test_failed_runs_are_named_after_all_others(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "w32-d1-s0")
    with pytest.raises(TrainingError, match=r"1 of 8 runs failed; of default-w32-d1-s0-\w+: out of memory"):
        run_study(config, tmp_path / "out")
    assert len(read_records(tmp_path / "out")) == 7
    monkeypatch.delenv("FAIL")
    assert run_study(config, tmp_path / "out")
    assert len(read_records(tmp_path / "out")) == 8


def test_slurm_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config, tools, out = write(tmp_path, seeds=[0]), tmp_path / "bin", tmp_path / "out"
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        run_study(config, out, slurm=["time=1:00:00"])
    tools.mkdir()
    for name, line in (("sbatch", "echo Submitted batch job 4711"), ("srun", ""), ("squeue", "echo $*")):
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        run_study(config, out, slurm=["time"])
    assert not run_study(config, out, slurm=["time=1:00:00", "gres=gpu:1"])
    assert capsys.readouterr().out == "4 runs are submitted as array 4711: run the same command when it has ended\n"
    script = next((out / "slurm").glob("*4711*.sh")).read_text().splitlines()
    assert {"#SBATCH --time=1:00:00", "#SBATCH --gres=gpu:1", "#SBATCH --array=0-3%4"} < set(script)
    with pytest.raises(DataError, match="array 4711 is still in the queue"):
        run_study(config, out, slurm=[])


def test_tasks_of_an_array(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executed in this process: each run once, but for those that another process has; failures are errors."""
    jobs = StudyPlan.read(config).jobs()[:3]
    for job in jobs:
        folder_of(tmp_path, job.id).mkdir(parents=True)
        (folder_of(tmp_path, job.id) / "job.json").write_text(json.dumps(vars(job)))
    lock = try_lock(folder_of(tmp_path, jobs[0].id) / "lock")
    assert lock is not None
    tasks: list[submitit.Job[None]] = []
    map_array = submitit.AutoExecutor.map_array

    def keep(self: submitit.AutoExecutor, function: Callable[..., Any], *inputs: Any) -> list[submitit.Job[Any]]:
        tasks[:] = map_array(self, function, *inputs)
        return list(tasks)

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", keep)
    monkeypatch.setenv("FAIL", jobs[1].id)
    run.submit(tmp_path, jobs, [], cluster="debug")
    assert tasks[0].exception() is tasks[2].exception() is None
    assert isinstance(tasks[1].exception(), TrainingError)
    assert [(folder_of(tmp_path, job.id) / "record.json").exists() for job in jobs] == [False, False, True]
    lock.close()


@pytest.mark.bad_input
def test_no_workers(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--workers 0: at least 1"):
        run_study(config, tmp_path / "out", workers=0)


def make_job(folder: Path, trainer: dict[str, Any] | None = None, **changes: Any) -> Job:
    """A run on eight of sixteen molecules, for three epochs of two steps."""
    content: dict[str, Any] = {
        "recipe": "quickstart",
        "settings": {
            "model": {"level_of_theory": "none", "datasets": ["none"]}, "trainer": trainer or {},
            "data": {
                "train": str(write_molecules(folder / "train.xyz", 16)), "batch_size": 4, "max_atoms": None,
                "val": str(write_molecules(folder / "val.xyz", 6, seed=1)), "split": {"by": "structure"},
            },
        },
        "sizes": {"tiny": TINY}, "data_sizes": [0.5], "epochs": 3, "learning_rate": 0.01, **changes,
    }  # fmt: skip
    (job,) = StudyPlan.parse({key: value for key, value in content.items() if value is not None}).jobs()
    folder_of(folder, job.id).mkdir(parents=True)
    (folder_of(folder, job.id) / "job.json").write_text(json.dumps(vars(job)), "utf-8")
    return job


def test_a_run_and_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escaip.signals.end_with_parent", lambda: None)
    job = make_job(tmp_path)
    assert main([str(tmp_path), job.id]) == 0
    file = folder_of(tmp_path, job.id) / "record.json"
    record = Record.from_json(file.read_text("utf-8"))
    assert (record.id, record.size, record.seed, record.structures) == (job.id, "tiny", 0, 8)
    assert (record.steps, record.epochs) == (6, 3.0)
    assert set(record.losses) == {"loss", "energy_mae", "forces_mae"}
    assert record.curve[-1] == (6, record.flops, record.losses["loss"])
    assert record.profiled == 1.0
    assert 0 < record.parameters < record.parameters_total
    # Eight molecules of a few atoms, whose neighborhoods are whole molecules, three times.
    plan = StudyPlan.parse({"recipe": "quickstart", "sizes": {"tiny": TINY}, "epochs": 3, "learning_rate": 0.01})
    config = plan.architecture("default", "tiny")
    shapes = [GraphShape(n, n * n, n**3) for n in (3.0, 5.0)]
    low, high = (training_flops(config, shape, batch_size=4, steps=6) for shape in shapes)
    assert low < record.flops < high
    file.unlink()
    again = train(tmp_path, job)  # all is trained, the record is missing
    for name in ("losses", "steps", "flops", "curve"):
        assert getattr(again, name) == getattr(record, name)
    # A budget is spent; one that ends before its data do counts what was seen.
    for steps, seen in ((4.2, 8), (1.0, 4)):
        folder = tmp_path / f"{steps}"
        spent = train(folder, make_job(folder, epochs=None, budgets=[steps * record.flops / record.steps]))
        assert (spent.steps, spent.epochs, spent.structures) == (int(steps), int(steps) / 2, seen)
        assert spent.atoms == round(record.atoms * seen / 8)
        assert spent.losses
    with pytest.raises(DataError, match="is less than one step"):
        train(tmp_path / "less", make_job(tmp_path / "less", epochs=None, budgets=[10.0]))


@pytest.mark.slow
def test_a_task_with_two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that submitit starts, which SLURM has given one task."""
    job = make_job(tmp_path, epochs=1, trainer={"accelerator": "cpu", "devices": 2, "strategy": "ddp"})
    monkeypatch.setenv("PYTHONPATH", str(Path(run.__file__).parents[2]))
    for name in ("OMP_NUM_THREADS", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "1")
    run.submit(tmp_path, [job], [], cluster="local")
    folder, end = folder_of(tmp_path, job.id), time.time() + 120
    while not (folder / "record.json").exists() and time.time() < end:
        time.sleep(0.2)
    record = Record.from_json((folder / "record.json").read_text("utf-8"))
    assert (record.structures, record.steps) == (8, 1)  # four to each device
    assert record.losses


def test_a_run_that_diverges_has_no_losses(tmp_path: Path) -> None:
    record = train(tmp_path, make_job(tmp_path, learning_rate=1e30))
    assert record.losses == {}


def test_a_line_that_was_cut_is_not_read(tmp_path: Path) -> None:
    for number, lines in enumerate((["1,0.5", "3,0.4", "5,0.3"], ["3,0.35", "5,0.2", "7"])):
        folder = tmp_path / f"version_{number}"
        folder.mkdir()
        (folder / "metrics.csv").write_text("\n".join(["step,val/loss", *lines]), "utf-8")
    found = read_validations(tmp_path, 5)
    assert found == {2: {"val/loss": 0.5}, 4: {"val/loss": 0.35}, 5: {"val/loss": 0.2}}
