"""Signals that end a long run so that it can go on later, and the command that continues it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from escaip.errors import EscaipError


class StopSignals:
    """Notes signals while it is entered, instead of ending the process; a second Ctrl-C ends it at once.

    Signals that the process ignores, such as Ctrl-C under ``nohup``, stay ignored. Threads other than the main one note
    nothing.

    Attributes:
        received: the first signal noted; None before.
    """

    def __init__(self, *signals: signal.Signals, at_once: bool = False) -> None:
        """Chooses signals; with ``at_once`` each raises KeyboardInterrupt, for runs that lose nothing by it."""
        self.received: signal.Signals | None = None
        self._signals, self._at_once = signals, at_once
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in self._signals:
            main = threading.current_thread() is threading.main_thread()
            if main and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._at_once:
            self.received = self.received or signal.Signals(number)
            raise KeyboardInterrupt
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before.pop(signal.SIGINT))
        # A print could interrupt another one half-way.
        os.write(2, f"\n{self.received.name}: ending after this step; Ctrl-C ends at once\n".encode())


@contextmanager
def continued_by_same_command(at_once: bool = True) -> Iterator[StopSignals]:
    """At Ctrl-C and SIGTERM prints the command of this process, which continues its work, and ends with 130 or 143.

    Without ``at_once``, for work that is not ended anywhere, it asks the yielded signals and raises KeyboardInterrupt.
    """
    with StopSignals(signal.SIGINT, signal.SIGTERM, at_once=at_once) as signals:
        try:
            yield signals
        except KeyboardInterrupt:
            received = signals.received or signal.SIGINT
            print(f"{received.name}: stopped; continue with")
            print(shlex.join(["escaip", *sys.argv[1:]]))
            raise SystemExit(128 + received) from None


def run_as_child(work: Callable[[], object]) -> int:
    """Does the work of a process that ends with the one that began it, and returns its exit status.

    What a user can cause is printed as one line.
    """
    end_with_parent()
    try:
        work()
    except EscaipError as error:
        print(f"escaip: {error}", file=sys.stderr)
        return 1
    return 0


def end_with_parent() -> None:
    """Lets the kernel kill this process when its parent dies (Linux), so that no process is left behind."""
    if sys.platform.startswith("linux"):
        import ctypes

        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
