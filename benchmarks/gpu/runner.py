"""Runs the parts of the suite, each in a process of its own and for a bounded time, and keeps every row they made.

A kernel that crashes poisons the CUDA context of its process, and one that hangs ends at its time limit: neither takes
more than its own part with it. Rows arrive as they are made, so that a part that is cut keeps what it has.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GRACE = 2.0  # seconds that a part has for its last row after its time
# Imported once and not for every part, which would take some seconds each. None of them touches a device.
PRELOADED = ["torch", "torch._dynamo", "torch._inductor", "ase.build", "escaip.potential", "escaip.calculators.ase"]


@dataclass(frozen=True)
class Setting:
    """What every part is told.

    Attributes:
        device: ``cuda`` or ``cpu``.
        small: tiny sizes: does the part itself work?
        out: folder for files.
        data: named on the command line.
        deadline: of :func:`time.monotonic`, the same clock in every process.
    """

    device: str
    small: bool
    out: Path
    data: tuple[str, ...] = ()
    deadline: float = float("inf")

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Part:
    """A generator of rows ``function(setting)`` in ``module``.

    Attributes:
        name: on the command line and in the results.
        module: to import.
        function: in it.
        seconds: at most, within what the whole suite has left.
        about: one line for the help.
    """

    name: str
    module: str
    function: str
    seconds: float
    about: str


@dataclass
class Outcome:
    """What came of a part: ``ended`` is ``done``, ``no time left`` or the error; ``seconds`` that it took."""

    rows: list[Row]
    ended: str
    seconds: float


def reason(error: BaseException) -> str:
    """Type and first line of an error, for a cell of a table."""
    lines = str(error).splitlines()
    return f"{type(error).__name__} {lines[0][:160] if lines else ''}".strip()


def run_together(
    parts: Sequence[Part], settings: Sequence[Setting], keep: Callable[[str, Outcome], None]
) -> dict[str, Outcome]:
    """Runs parts side by side, each until its deadline.

    Args:
        parts: to run.
        settings: of each.
        keep: called with a part's name and what it has so far, at every row and at the end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    running: dict[Connection, tuple[Part, Setting, BaseProcess, float]] = {}
    found: dict[str, Outcome] = {}
    for part, setting in zip(parts, settings, strict=True):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(part, setting, sender))
        process.start()
        sender.close()
        running[receiver] = (part, setting, process, time.monotonic())
        found[part.name] = Outcome([], "running", 0.0)
    while running:
        first = min(setting.left for _, setting, _, _ in running.values())
        for receiver in wait(list(running), timeout=max(0.0, first + GRACE)):
            assert isinstance(receiver, Connection)
            part, _, process, start = running[receiver]
            outcome = found[part.name]
            outcome.seconds = time.monotonic() - start
            try:
                kind, value = receiver.recv()
            except EOFError:
                process.join()
                kind, value = "end", f"its process ended with status {process.exitcode}"
            if kind == "row":
                outcome.rows.append(value)
            else:
                outcome.ended = value
                _end(process)
                del running[receiver]
            keep(part.name, outcome)
        for receiver, (part, setting, process, start) in list(running.items()):
            if setting.left < -GRACE:
                _end(process)
                found[part.name].ended, found[part.name].seconds = "no time left", time.monotonic() - start
                del running[receiver]
                keep(part.name, found[part.name])
    return found


def _child(part: Part, setting: Setting, sender: Connection) -> None:
    """In the part's own process, which leads a group so that whatever it starts ends with it."""
    os.setsid()
    try:
        rows: Iterator[Row] = getattr(importlib.import_module(part.module), part.function)(setting)
        ended = "done"
        for row in rows:
            sender.send(("row", row))
    except Exception as error:
        traceback.print_exc()
        ended = reason(error)
    sender.send(("end", ended))


def _end(process: BaseProcess) -> None:
    """Ends a process and what it started."""
    process.join(0.5)
    if process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
    process.join()
