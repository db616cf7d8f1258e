"""Benchmarks are programs that measure, not a part of the package: each starts, and the quick ones run once, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(Path(__file__).parent)]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch-sim's own, at its import
    import engines
from gpu.runner import Part, Row, Setting, run_together  # noqa: E402
from tiny import make_potential  # noqa: E402

PROGRAMS = sorted(
    path.relative_to(BENCHMARKS).with_suffix("")
    for path in BENCHMARKS.rglob("*.py")
    if not {"adapters", "fairchem"} & set(path.parts) and "def main() -> None" in path.read_text(encoding="utf-8")
)
SMALL = {
    "attention": "--atoms 20 --neighbors 4 --head-sizes 32 --repeats 1 --names reference dense",
    "flops": "--presets 300k --atoms 32",
    "step_time": "--presets 300k --structures aspirin",
    "scaling_recovery": "--repeats 1 --bootstrap 50 --only power",
}


def run(monkeypatch: pytest.MonkeyPatch, name: str, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    __import__(name.replace("/", "."), fromlist=["main"]).main()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_every_program_explains_itself(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, program.as_posix(), "--help")
    assert stop.value.code == 0


@pytest.mark.parametrize("name", SMALL)
def test_quick_programs_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, name, *SMALL[name].split(), "--out", str(tmp_path / "result.json"))
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))


def test_every_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "deck_figures", "--out", str(tmp_path))
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 80_000


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_engine_agrees_or_is_named() -> None:
    potential = make_potential()
    rows = {row["engine"]: row for row in engines.measure(potential, engines.structure(1), 2, 1)}
    assert list(rows) == list(engines.ENGINES)
    for name, row in rows.items():
        if "absent" in row:
            assert "pip install" in row["absent"]
            continue
        tolerance = {"ASE": 1e-30, "i-PI": 1e-5}.get(name, 1e-8)
        assert max(row[what] for what in ("energy", "forces", "virial", "last_energy", "positions")) < tolerance


def good(setting: Setting) -> Iterator[Row]:
    yield {"x": 1}
    yield {"x": 2, "device": setting.device}


def dies(setting: Setting) -> Iterator[Row]:
    yield {"x": 1}
    os.abort()


def hangs(setting: Setting) -> Iterator[Row]:
    yield {"x": 1}
    # as a compiler's process would: it must end with the part
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(60); open({str(setting.out)!r}, 'w')"])
    time.sleep(60)


def test_a_part_of_the_gpu_suite_that_dies_or_hangs_keeps_its_rows(tmp_path: Path) -> None:
    parts = [Part(name, Path(__file__).stem, name, 8.0, "") for name in ("good", "dies", "hangs")]
    setting = Setting("cpu", True, tmp_path / "file", deadline=time.monotonic() + 8.0)
    found = run_together(parts, [setting] * 3, lambda name, outcome: None)
    ends = {"good": "done", "dies": "its process ended with status -6", "hangs": "no time left"}
    assert {name: outcome.ended for name, outcome in found.items()} == ends
    assert [len(outcome.rows) for outcome in found.values()] == [2, 1, 1]
    listed = subprocess.run(["pgrep", "-f", str(tmp_path / "file")], capture_output=True, text=True, check=False)
    assert not listed.stdout.split()


@pytest.mark.slow
def test_the_gpu_suite_runs_small_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--parts", "overhead"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_suite.json").read_text("utf-8"))["parts"]
    assert {name: part["ended"] for name, part in report.items()} == {"overhead": "done"}
    assert all(row.get("failed") is None and row.get("ok", True) for part in report.values() for row in part["rows"])
