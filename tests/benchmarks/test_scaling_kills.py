"""What benchmarks/scaling_kills.py compares two studies by, and when it kills. Trains nothing."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from scaling_kills import alive, compared, differences, killed_study, moments, state, unlike_weights

from escaip.files import try_lock


def record(number: int, **changes: Any) -> dict[str, Any]:
    """A line of records.jsonl: four sizes, three data sizes."""
    parameters, structures = 1000 * 4 ** (number % 4), 100 * 3 ** (number // 4)
    return {
        "id": f"r{number}", "size": f"s{number % 4}", "seed": 0, "parameters": parameters,
        "parameters_total": parameters + 10, "structures": structures, "atoms": 9 * structures, "epochs": 2.0,
        "steps": 20, "flops": 1e3 * parameters * structures, "learning_rate": 0.01,
        "losses": {"loss": 0.1, "forces_mae": 0.02 + parameters**-0.4 + structures**-0.5}, "variant": "default",
        "curve": [[10, 5e7, 0.3], [20, 1e8, 0.1]], "seconds": 3.0, "commit": "abc", "config": {"model": {"rate": 0.01}},
        **changes,
    }  # fmt: skip


RECORDS = [record(number) for number in range(12)]


def changed(**fields: Any) -> list[dict[str, Any]]:
    records = copy.deepcopy(RECORDS)
    records[1] |= fields
    return records


def test_the_same_table_but_for_time_and_commit() -> None:
    assert differences(RECORDS, changed(seconds=99.0, commit="def")) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"losses": {**RECORDS[1]["losses"], "loss": 0.1 + 2e-17}}, "r1: losses.loss 0.1 and 0.10000000000000002"),
        ({"losses": {"loss": 0.1}}, "r1: losses.forces_mae is in one alone"),
        ({"curve": [[10, 5e7, 0.3], [20, 1e8, 0.11]]}, "r1: curve[1][2] 0.1 and 0.11 (+0.01)"),
        ({"curve": [[20, 1e8, 0.1]]}, "r1: curve [[10, "),
        ({"structures": 101}, "r1: structures 100 and 101 (+1)"),
        ({"flops": 1.0}, "r1: flops 400000000.0 and 1.0"),
        ({"config": {"model": {"rate": 0.02}}}, "r1: config.model.rate 0.01 and 0.02 (+0.01)"),
        ({"config": {"model": {"rate": 0.01, "commit": "x"}}}, "r1: config.model.commit is in one alone"),
        ({"hostname": "x"}, "r1: hostname is in one alone"),
    ],
)  # fmt: skip
def test_a_changed_field_is_named(fields: dict[str, Any], text: str) -> None:
    (found,) = differences(RECORDS, changed(**fields))
    assert found.startswith(text)


def test_lost_doubled_and_moved_runs() -> None:
    assert differences(RECORDS, RECORDS[1:]) == ["r0: lost"]
    assert differences(RECORDS[1:], RECORDS) == ["r0: in the killed study alone"]
    assert differences(RECORDS, [*RECORDS, RECORDS[0]]) == ["r0: 2 times in the killed study"]
    assert differences(RECORDS, RECORDS[::-1]) == ["the order of the runs"]


def write_study(folder: Path, records: list[dict[str, Any]], weight: float = 0.0) -> Path:
    for one in records:
        job = folder / "jobs" / one["id"]
        run = job / "run" / "version_0"
        run.mkdir(parents=True, exist_ok=True)
        (job / "job.json").write_text("{}")
        values = {"w": torch.full((2,), weight)}
        torch.save({"state_dict": values, "current_model_state": {}, "loops": {}}, run / "last.ckpt")
    (folder / "study.json").write_text("{}")
    (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def test_whole_studies(tmp_path: Path) -> None:
    whole = write_study(tmp_path / "a" / "study", RECORDS)
    result = compared(whole, write_study(tmp_path / "b" / "study", changed(seconds=1.0)))
    assert (result["different"], result["records"], result["fit_status"]) == ([], 12, 0)
    assert "alpha" in result["fit"]
    losses = {"loss": 0.1, "forces_mae": 0.5}
    result = compared(whole, write_study(tmp_path / "c" / "study", changed(losses=losses)))
    assert len(result["different"]) == 3
    assert result["different"][1:] == ["output of escaip scaling fit", "fit.json of escaip scaling fit"]


def test_weights(tmp_path: Path) -> None:
    whole = write_study(tmp_path / "a", RECORDS[:2])
    assert unlike_weights(whole, write_study(tmp_path / "b", RECORDS[:2])) == []
    found = unlike_weights(whole, write_study(tmp_path / "c", RECORDS[:2], weight=1e-7))
    assert found == [f"r{number}: weights state_dict.w and 0 more" for number in (0, 1)]
    assert unlike_weights(whole, tmp_path / "nowhere")[0] == "r0: other weights, or none"


def test_kills_are_spread_over_the_run() -> None:
    for seed in range(20):
        found = moments(100.0, 5, random.Random(seed))
        assert [int(moment // 20.0) for moment in found] == [0, 1, 2, 3, 4]
    assert found != moments(100.0, 5, random.Random(0))


def test_what_a_kill_meets(tmp_path: Path) -> None:
    study = write_study(tmp_path, RECORDS[:4])
    for number in (0, 1, 2):
        (study / "jobs" / f"r{number}" / "log.txt").touch()
    (study / "jobs" / "r0" / "record.json").touch()
    (study / "jobs" / "r1" / "run" / "version_0" / "last.ckpt").unlink()
    assert state(study) == {"finished": 1, "begun": 2, "with_checkpoint": 1}
    lock = try_lock(study / "jobs" / "r1" / "lock")
    assert lock is not None
    assert alive(study) == 1
    lock.close()
    assert alive(study) == 0


STAND_IN = """
echo $$ >> {0}/starts
[ $(wc -l < {0}/starts) -gt 2 ] || {{ sleep 60 & echo $! >> {0}/runs; wait; }}
"""


def runs_on(pid: int) -> bool:
    """Whether a process is there and no zombie, which nobody may have fetched yet."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_a_study_is_killed_alone_and_with_its_runs_and_then_ends(tmp_path: Path) -> None:
    arguments = ["sh", "-c", STAND_IN.format(tmp_path)]
    kills = killed_study(arguments, tmp_path, [1.0, 2.0], tmp_path / "log")
    assert [(kill["seconds"], kill["killed"]) for kill in kills] == [(1.0, "runner"), (2.0, "runner and its group")]
    assert len((tmp_path / "starts").read_text().split()) == 3
    runs = [int(pid) for pid in (tmp_path / "runs").read_text().split()]
    assert [runs_on(pid) for pid in runs] == [True, False]  # unlike a real one, this stand-in outlives its runner
    os.kill(runs[0], signal.SIGKILL)
    with pytest.raises(SystemExit, match=r"the study ended .status 0. after 0 kills"):
        killed_study(arguments, tmp_path, [5.0], tmp_path / "log")
