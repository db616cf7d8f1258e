"""The cases of attention.py that matter most: a radius of 6 Å, float32 and bfloat16, beside what else there is."""

from __future__ import annotations

from collections.abc import Iterator

import attention as bench
import torch
from gpu.runner import Row, Setting


def attention_times(setting: Setting) -> Iterator[Row]:
    """Rows of :func:`attention.measure_case`: each way, each step; none once the time is up."""
    cases = [(60, 8, 16)] if setting.small else [(1000, 32, 64), (1000, 16, 64), (10000, 32, 64), (1000, 48, 32)]
    for dtype in (torch.float32, torch.bfloat16):
        peaks = bench.limits(setting.device, dtype)
        for atoms, neighbors, head_size in cases:
            if setting.left > 0:
                yield from bench.measure_case(
                    bench.Case(atoms, neighbors, head_size, 8, dtype, setting.device), None, 3, peaks
                )
