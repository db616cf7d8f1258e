"""Signals that end a long run after the step in progress, so that its state can be saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Notes signals while it is entered, instead of ending the process; a second Ctrl-C ends it at once.

    Signals that the process ignores, such as Ctrl-C under ``nohup``, stay ignored. Threads other than the main one note
    nothing.

    Attributes:
        received: the first signal noted; None before.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        """Chooses signals."""
        self.received: signal.Signals | None = None
        self._signals = signals
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
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before.pop(signal.SIGINT))
        # A print could interrupt another one half-way.
        os.write(2, f"\n{self.received.name}: ending after this step; Ctrl-C ends at once\n".encode())
