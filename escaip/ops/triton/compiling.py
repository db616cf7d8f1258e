"""Kernels compiled before they are launched, for any GPU and without one, side by side in processes of their own.

Triton compiles a kernel at its first launch, some seconds for each tile. A worker (``python -m
escaip.ops.triton.compiling``) makes the same call on a few tokens in main memory, under a driver that only names the
GPU: what it leaves in Triton's cache is what the launch then finds. Not threads: they share Python's lock, and a
compiler that aborts would end them all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, TextIO

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from escaip.ops.triton.cases import Case
from escaip.ops.triton.launch import Call
from escaip.ops.triton.tiles import Tile

_READY = "ready"


class _Named:
    """A driver that launches nothing: which GPU to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend} {self._target.arch}"  # kernels are kept apart by device

    def get_current_stream(self, _: object = None) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: GPUTarget) -> Iterator[None]:
    """Kernels within compile for a GPU, here or not (:meth:`escaip.ops.triton.launch.Call.compile`)."""
    before = driver._active
    driver.set_active(_Named(target))
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True)
class Job:
    """A kernel to compile with a tile; ``case`` is any whose kernels compile to the same code."""

    case: Case
    kernel: str
    tile: Tile


def reason(error: BaseException) -> str:
    """The kind of an error and the first line of its message, or the last, where Triton's own error stands."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[-1] if lines and lines[0].startswith("at ") else "".join(lines[:1])
    return f"{type(error).__name__}: {told}"[:200].rstrip(": ")


def compile_ahead(jobs: Sequence[Job], target: GPUTarget, workers: int, seconds: float) -> dict[Job, str | None]:
    """Compiles jobs into Triton's cache, first ones first.

    Args:
        jobs: what to compile; a worker whose compiler dies fails that job alone.
        target: the GPU.
        workers: processes at once.
        seconds: after which what is not done is left.

    Returns:
        Of each job that was reached why it failed, in one line, or None.
    """
    pending: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        pending.put(job)
    outcomes: dict[Job, str | None] = {}
    running: list[subprocess.Popen[str]] = []
    stopped = threading.Event()
    serve = functools.partial(_serve, pending, outcomes, running, stopped, target)
    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(workers, len(jobs)))]
    until = time.monotonic() + seconds
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
    finally:
        stopped.set()
        for process in list(running):
            process.kill()  # threads that wait for its answer go on
        for thread in threads:
            thread.join()
        for process in running:
            _end(process)
    return dict(outcomes)


def _serve(
    pending: queue.SimpleQueue[Job],
    outcomes: dict[Job, str | None],
    running: list[subprocess.Popen[str]],
    stopped: threading.Event,
    target: GPUTarget,
) -> None:
    """Hands jobs to one worker, and to another where it dies, until there are none left."""
    worker = None
    while not stopped.is_set():
        try:
            job = pending.get_nowait()
        except queue.Empty:
            break
        if worker is None:
            worker = _start(target)
            running.append(worker)
            if stopped.is_set():
                return
            if not worker.stdout or worker.stdout.readline().strip() != _READY:
                pending.put(job)  # what keeps one from starting would keep the next
                return
        answer = _ask(worker, job)
        if stopped.is_set():
            return
        if answer is None:
            outcomes[job] = f"the compiler ended with status {worker.wait()}"
            worker = None
        else:
            outcomes[job] = answer["failure"]


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # of what it was not there to read
                pipe.close()


def _start(target: GPUTarget) -> subprocess.Popen[str]:
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, target.backend, str(target.arch), str(target.warp_size)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, bufsize=1, env=environment
    )


def _ask(worker: subprocess.Popen[str], job: Job) -> dict[str, Any] | None:
    """A worker's answer; None where it died."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(json.dumps([asdict(job.case), job.kernel, astuple(job.tile)]) + "\n")
        line = worker.stdout.readline()
    except OSError:
        return None
    return dict(json.loads(line)) if line.endswith("\n") else None


@functools.lru_cache(maxsize=1)
def _calls(case: Case) -> dict[str, Call]:
    return {call.key.kernel: call for call in case.calls(torch.device("cpu"))}


def compile_one(job: Job) -> Any:
    """The compiled kernel of a job, for the GPU that is set around."""
    return _calls(job.case.small())[job.kernel].compile(job.tile)


def work(requests: TextIO, answers: TextIO) -> None:
    """Answers jobs, a line each, until there are none."""
    print(_READY, file=answers, flush=True)
    for line in requests:
        case, kernel, tile = json.loads(line)
        job = Job(Case(**{**case, "widths": tuple(case["widths"])}), kernel, Tile(*tile))
        failure = None
        try:
            compile_one(job)
        except Exception as error:  # whatever Triton raises: the job has failed, the worker has not
            failure = reason(error)
        print(json.dumps({"failure": failure}), file=answers, flush=True)


def main() -> None:
    backend, arch, warp_size = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    with compiling_for(GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))):
        work(sys.stdin, answers)


if __name__ == "__main__":
    main()
