"""One run of a study: what is trained, counted and written down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
from training_stand_ins import TINY, write_molecules

from escaip.errors import DataError
from escaip.scaling.files import claim
from escaip.scaling.flops import training_flops
from escaip.scaling.job import RECORD, as_json, folder_of, main, read_job, read_validations, train
from escaip.scaling.plan import Job, StudyPlan
from escaip.scaling.records import Record
from escaip.scaling.shapes import GraphShape

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's


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
    place = folder_of(folder, job.id)
    place.mkdir(parents=True)
    (place / "job.json").write_text(as_json(job), "utf-8")
    return job


def test_a_run_and_its_record(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert read_job(tmp_path, job.id) == job
    assert main([str(tmp_path), job.id]) == 0
    record = Record.from_json((folder_of(tmp_path, job.id) / RECORD).read_text("utf-8"))
    assert (record.id, record.size, record.seed, record.structures) == (job.id, "tiny", 0, 8)
    assert (record.steps, record.epochs) == (6, 3.0)
    assert set(record.losses) == {"loss", "energy_mae", "forces_mae"}
    assert [step for step, _, _ in record.curve][-1] == 6
    assert record.curve[-1][2] == record.losses["loss"]
    assert record.curve[-1][1] == record.flops
    assert record.profiled == 1.0
    assert 0 < record.parameters < record.parameters_total
    # Eight molecules of a few atoms, whose neighborhoods are whole molecules, three times.
    few, many = (GraphShape(n, n * n, n**3) for n in (3.0, 5.0))
    plan = StudyPlan.parse({"recipe": "quickstart", "sizes": {"tiny": TINY}, "epochs": 3, "learning_rate": 0.01})
    config = plan.architecture("default", "tiny")
    low, high = (training_flops(config, shape, batch_size=4, steps=6).total for shape in (few, many))
    assert low < record.flops < high


def test_a_killed_run_goes_on_to_the_same_record(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    whole = train(tmp_path, job)
    folder = folder_of(tmp_path, job.id)
    (folder / RECORD).unlink()
    again = train(tmp_path, job)  # all is trained, the record is missing
    assert again.losses == whole.losses
    assert (again.steps, again.flops, again.curve) == (whole.steps, whole.flops, whole.curve)


def test_a_task_of_an_array_leaves_what_another_process_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path)
    folder = folder_of(tmp_path, job.id)
    (tmp_path / "jobs.txt").write_text(f"other\n{job.id}\n", "utf-8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    lock = claim(folder)
    assert lock is not None
    assert main([str(tmp_path), "jobs.txt", "--array"]) == 0
    assert not (folder / RECORD).exists()
    lock.close()
    assert main([str(tmp_path), "jobs.txt", "--array"]) == 0
    assert (folder / RECORD).exists()


def test_the_processes_of_other_devices_run_under_the_claim_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs.txt").write_text("a\n", "utf-8")
    folder = folder_of(tmp_path, "a")
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(as_json(Job("a", "default", "tiny", 0, 1.0, None, False, {})), "utf-8")
    trained: list[str] = []
    monkeypatch.setattr("escaip.scaling.job.train", lambda study, job: trained.append(job.id))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    lock = claim(folder)  # the first process has it
    assert lock is not None
    for rank, expected in (("0", []), ("1", ["a"])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main([str(tmp_path), "jobs.txt", "--array"]) == 0
        assert trained == expected
    lock.close()


@pytest.mark.slow
def test_a_task_of_an_array_with_two_devices(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1, trainer={"accelerator": "cpu", "devices": 2, "strategy": "ddp"})
    (tmp_path / "jobs.txt").write_text(f"{job.id}\n", "utf-8")
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "escaip.scaling.job", str(tmp_path), "jobs.txt", "--array"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    record = Record.from_json((folder_of(tmp_path, job.id) / RECORD).read_text("utf-8"))
    assert (record.structures, record.steps) == (8, 1)  # four to each device
    assert record.losses


def test_a_budget_is_spent(tmp_path: Path) -> None:
    one = train(tmp_path / "a", make_job(tmp_path / "a"))
    budget = 4.2 * one.flops / one.steps
    job = make_job(tmp_path / "b", epochs=None, budgets=[budget], learning_rate=0.01)
    record = train(tmp_path / "b", job)
    assert record.steps == 4
    assert record.flops == pytest.approx(budget, rel=0.1)


def test_a_budget_that_ends_before_its_data_do_counts_what_was_seen(tmp_path: Path) -> None:
    one = train(tmp_path / "a", make_job(tmp_path / "a"))
    record = train(tmp_path / "b", make_job(tmp_path / "b", epochs=None, budgets=[one.flops / one.steps]))
    assert (record.steps, record.epochs) == (1, 0.5)
    assert (record.structures, record.atoms) == (one.structures // 2, round(one.atoms / 2))
    assert record.losses


@pytest.mark.bad_input
def test_a_budget_below_one_step(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=None, budgets=[10.0])
    with pytest.raises(DataError, match="is less than one step"):
        train(tmp_path, job)


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


@pytest.mark.bad_input
def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no run x"):
        read_job(tmp_path, "x")
