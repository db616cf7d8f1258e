"""Kernels compiled ahead by workers: failures, deaths, the end of time, and that launches find them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from escaip.ops.triton import compiling
from escaip.ops.triton.cases import Case
from escaip.ops.triton.compiling import Job, compile_ahead, reason
from escaip.ops.triton.tiles import KERNELS, Tile


def test_the_reason_of_a_failure_is_one_line() -> None:
    assert reason(RuntimeError("")) == "RuntimeError"
    assert reason(RuntimeError("first\nsecond")) == "RuntimeError: first"
    compiler = ValueError("at 3:4:\n  x = tl.dot(a, b)\n      ^\nInput shapes should have K >= 16")
    assert reason(compiler) == "ValueError: Input shapes should have K >= 16"


TARGET = GPUTarget("cuda", 90, 32)
CASE = Case("angles", "tf32x3", 16, 1, (8, 8), 2, 5)
JOBS = [Job(CASE.small(), kernel, Tile(16, 16, 2)) for kernel in KERNELS]
ANSWERING = """
import json, sys, time
print("ready", flush=True)
for line in sys.stdin:
    case, kernel, tile = json.loads(line)
    if kernel == "backward_rows":
        sys.exit(3)  # as a compiler that aborts
    if kernel == "backward_columns":
        print(json.dumps({"failure": "PTXASError: no"}), flush=True)
        continue
    if kernel == "double_backward_columns" and "slow" in sys.argv:
        time.sleep(60)
    print(json.dumps({"failure": None}), flush=True)
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """Workers that are another program."""
    started = []

    def start(target: GPUTarget) -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-c", program, *arguments], subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1))
        return started[-1]

    monkeypatch.setattr(compiling, "_start", start)
    return started


@pytest.mark.parametrize("workers", [1, 3])
def test_a_compiler_that_dies_fails_its_job_alone(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started = stand_in(monkeypatch, ANSWERING)
    outcomes = compile_ahead(JOBS, TARGET, workers, 30.0)
    assert [outcomes[job] for job in JOBS] == [
        None, "the compiler ended with status 3", "PTXASError: no", None, None,
    ]  # fmt: skip
    assert all(process.poll() is not None for process in started)


def test_compiling_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    started = stand_in(monkeypatch, ANSWERING, "slow")
    before = time.monotonic()
    outcomes = compile_ahead(JOBS, TARGET, 1, 2.0)
    assert 1.9 < time.monotonic() - before < 10.0
    assert list(outcomes) == JOBS[:4]
    assert all(process.poll() is not None for process in started)


def test_workers_that_do_not_start_leave_all_to_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    started = stand_in(monkeypatch, "raise SystemExit(1)")
    assert compile_ahead(JOBS, TARGET, 2, 30.0) == {}
    assert len(started) <= 2


AHEAD = """
import json, os, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from escaip.ops.triton.cases import Case
from escaip.ops.triton.compiling import Job, compile_ahead, compiling_for
from escaip.ops.triton.tiles import Tile

target = GPUTarget("cuda", 90, 32)
tile = Tile(16, 32, 4)
cases = [
    Case("angles", "bfloat16", 16, 2, (8, 8), 40, 20),
    Case("self", "float16", 16, 2, (8, 8), 40, 20),
    Case("node", "tf32", 16, 2, (16,), 3, 200),
]
jobs = [Job(case.small(), "forward_rows", tile) for case in cases]
jobs.append(Job(cases[0].small(), "forward_rows", Tile(16, 24, 4)))
outcomes = compile_ahead(jobs, target, 2, 100.0)
hits = []
triton.knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
with compiling_for(target):
    for case in cases:
        case.calls(torch.device("cpu"))[0].compile(tile)
print(json.dumps([[outcomes[job] for job in jobs], hits]))
"""


@pytest.mark.slow
def test_what_workers_compile_is_what_a_launch_finds(tmp_path: Path) -> None:
    """Compiled for tiny problems by other processes, found in the cache for the real ones."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", AHEAD], env=environment, capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes, hits = json.loads(done.stdout.splitlines()[-1])
    assert outcomes[:3] == [None] * 3
    assert "power of 2" in outcomes[3]
    assert hits == [True] * 3
