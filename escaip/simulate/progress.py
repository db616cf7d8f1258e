"""One line that says where a run is and when it will be done."""

from __future__ import annotations

import math
import sys
from typing import IO

from escaip.simulate.md import MDStatus


class ProgressLine:
    """Rewrites one line on a terminal; elsewhere prints about ten lines in all.

    Args:
        stream: where to; by default the error stream.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._next = 0.0

    def __call__(self, status: MDStatus) -> None:
        """Shows a status."""
        fraction = status.step / status.steps
        finished = status.step >= status.steps
        if math.isnan(status.seconds_left) or (not self.live and not finished and fraction < self._next):
            return
        self._next = fraction + 0.1
        line = (
            f"step {status.step}/{status.steps} ({100 * fraction:.0f} %)  {status.time / 1000:.3f} ps  "
            f"{status.temperature:.0f} K  {status.energy:.4f} eV  {status.ns_per_day:.3g} ns/day  "
            f"{_duration(status.seconds_left)} left"
        )
        end = "\n" if finished or not self.live else ""
        print(f"\r{line}\x1b[K" if self.live else line, end=end, file=self.stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
