"""The suite for GPUs: parts that fail, hang or run out of time cost their own rows alone, and it runs on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(Path(__file__).parent)]

import gpu_suite  # noqa: E402
from gpu.runner import Outcome, Part, Row, Setting, run_together  # noqa: E402


def good(setting: Setting) -> Iterator[Row]:
    yield {"x": 1}
    yield {"x": 2, "device": setting.device}


def fails(setting: Setting) -> Iterator[Row]:
    yield {"x": 1}
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def dies(setting: Setting) -> Iterator[Row]:
    yield {"x": 1}
    os.abort()


def hangs(setting: Setting) -> Iterator[Row]:
    yield {"x": 1}
    # as a compiler's process would: it must end with the part
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(60); open({str(setting.out)!r}, 'w')"])
    time.sleep(60)


def run(tmp_path: Path, *functions: str, seconds: float = 30.0) -> tuple[dict[str, Outcome], list[tuple[str, int]]]:
    parts = [Part(name, Path(__file__).stem, name, seconds, "") for name in functions]
    setting = Setting("cpu", True, tmp_path / "file", deadline=time.monotonic() + seconds)
    kept: list[tuple[str, int]] = []
    found = run_together(parts, [setting] * len(parts), lambda name, o: kept.append((name, len(o.rows))))
    return found, kept


def test_rows_are_kept_as_they_come_and_what_fails_is_named(tmp_path: Path) -> None:
    found, kept = run(tmp_path, "good", "fails", "dies")
    assert found["good"].ended == "done"
    assert found["good"].rows == [{"x": 1}, {"x": 2, "device": "cpu"}]
    assert found["fails"].ended == "RuntimeError CUDA error: an illegal memory access was encountered"
    assert found["dies"].ended == "its process ended with status -6"
    assert found["fails"].rows == found["dies"].rows == [{"x": 1}]
    assert [count for name, count in kept if name == "good"] == [1, 2, 2]


def test_a_part_that_hangs_ends_in_time_with_what_it_started(tmp_path: Path) -> None:
    start = time.monotonic()
    found, _ = run(tmp_path, "hangs", seconds=10.0)
    assert found["hangs"].ended == "no time left"
    assert found["hangs"].rows == [{"x": 1}]
    assert time.monotonic() - start < 55.0  # it would have taken 60
    listed = subprocess.run(["pgrep", "-f", str(tmp_path / "file")], capture_output=True, text=True, check=False)
    assert not listed.stdout.split()


def test_parts_stand_in_order_of_worth_and_need_their_data() -> None:
    names = [[part.name for part in group] for group in gpu_suite.planned(None, with_data=False)]
    assert names[0] == ["kernels", "compiling"]
    assert not {"training", "scaling"} & {name for group in names for name in group}
    assert [[part.name for part in group] for group in gpu_suite.planned(["scaling", "dynamics"], True)] == [
        ["dynamics"], ["scaling"],
    ]  # fmt: skip


@pytest.mark.slow
def test_parts_run_tiny_on_a_cpu_and_are_kept(tmp_path: Path) -> None:
    """Those that take seconds; ``--small`` alone runs them all."""
    parts = ["kernels", "dynamics", "overhead"]
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--parts", *parts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_suite.json").read_text("utf-8"))["parts"]
    assert list(report) == parts
    for name, part in report.items():
        assert part["ended"] == "done", name
        assert part["rows"], name
        assert all(row.get("failed") is None and row.get("ok", True) for row in part["rows"]), part["rows"]
