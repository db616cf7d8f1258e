"""A process of one peer's environment that holds one model and times it when told to.

python benchmarks/peers/adapters/worker.py ADAPTER

Requests and replies are lines of JSON on standard input and output; what libraries print goes to standard error. The
driver asks one worker at a time. Only the standard library, NumPy, PyTorch, ASE and the peer are imported here.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tasks import Answer, Model, Task

STEP = 0.02  # Å, standard deviation of the displacements from one evaluation to the next
MiB = 2**20


class Worker:
    """Answers requests: build, prepare, warm_up, turn, memory, release."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.model: Model | None = None
        self.task: Task | None = None
        self.structures: list[dict[str, Any]] = []

    def build(self, options: dict[str, Any], threads: int, memory_GiB: float) -> dict[str, Any]:
        """Makes the model; allocations beyond ``memory_GiB`` will fail rather than take the machine down."""
        limit = int(memory_GiB * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        start = time.perf_counter()
        self.model = importlib.import_module(f"{self.adapter}_adapter").build(options)
        return {
            "parameters": self.model.parameters,
            "notes": self.model.notes,
            "seconds": time.perf_counter() - start,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "packages": packages(),
        }

    def prepare(self, suite: str, structures: list[dict[str, Any]]) -> dict[str, Any]:
        """Takes the structures of a case."""
        assert self.model is not None
        self.structures = structures
        if suite == "training":
            self.task = self.model.training(structures)
        else:
            self.task = self.model.inference(structures[0])
        return {}

    def warm_up(self, least: int, most: int) -> dict[str, Any]:
        """Evaluates until an evaluation takes no longer than half as much again as the fastest."""
        seconds: list[float] = []
        answers = []
        while len(seconds) < least or (len(seconds) < most and seconds[-1] > 1.5 * min(seconds)):
            answer, took = self._evaluate(len(seconds))
            answers.append(answer)
            seconds.append(took)
        return {"seconds": seconds, "answer": answers[0], "resident_MiB": resident("VmRSS") / MiB}

    def turn(self, number: int, count: int, lead: int) -> dict[str, Any]:
        """Times ``count`` evaluations after ``lead`` untimed ones, which bring the model back into the caches."""
        seconds = [self._evaluate(1000 * (number + 1) + i)[1] for i in range(lead + count)]
        return {"seconds": seconds[lead:]}

    def memory(self) -> dict[str, Any]:
        """How far the resident memory grows over one evaluation at most; None where Linux does not tell."""
        try:
            trim()  # what earlier evaluations freed must not serve this one unseen
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # starts the high-water mark anew
            before = resident("VmRSS")
            self._evaluate(0)
            return {"growth_MiB": (resident("VmHWM") - before) / MiB}
        except OSError as error:
            return {"growth_MiB": None, "why": str(error)}

    def release(self) -> dict[str, Any]:
        """Forgets the case, but not the model."""
        self.task, self.structures = None, []
        trim()
        return {"resident_MiB": resident("VmRSS") / MiB}

    def _evaluate(self, number: int) -> tuple[Answer, float]:
        assert self.task is not None
        rng = np.random.default_rng(number)
        moved = [np.asarray(item["positions"]) for item in self.structures]
        prepared = self.task.prepare([x + STEP * rng.normal(size=x.shape) for x in moved])
        start = time.perf_counter()
        answer = self.task.run(prepared)
        seconds = time.perf_counter() - start
        wrong = [name for name, value in answer.items() if not np.isfinite(value)]
        if wrong:
            raise ArithmeticError(f"{wrong[0]} is {answer[wrong[0]]}")
        return answer, seconds


def packages() -> dict[str, str]:
    """Everything that is installed here."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return dict(sorted(found.items()))


def resident(what: str) -> float:
    """Bytes, ``VmRSS`` or ``VmHWM``."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(what):
            return 1024.0 * float(line.split()[1])
    raise OSError(f"{what} is not told")


def trim() -> None:
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def reason(error: BaseException) -> str:
    """One line: the class of the error and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


def serve(worker: Worker, requests: Any, replies: Any) -> None:
    for line in requests:
        request = json.loads(line)
        try:
            reply = {"ok": True, **getattr(worker, request.pop("do"))(**request)}
        except Exception as error:  # whatever a peer raises is the result of the case
            import traceback

            traceback.print_exc()
            reply = {"ok": False, "why": reason(error)}
            worker.task = None
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(Worker(sys.argv[1]), sys.stdin, replies)


if __name__ == "__main__":
    main()
