"""Measures the tiles of the kernels; later parts of the suite use what it keeps in the user's cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict

import torch
from gpu.runner import Row, Setting

from escaip.models import EScAIPConfig


def tuning(setting: Setting) -> Iterator[Row]:
    """A row per kernel and situation: the table's tile, the fastest, and what was dropped."""
    if setting.device != "cuda":
        return
    from escaip.ops.triton.tile_files import identity_of, user_file
    from escaip.ops.triton.tuning import model_cases, tune

    config = EScAIPConfig.preset("5m")
    shape = (config.hidden_size // config.num_heads, config.num_heads, config.angular_channels)
    published = (64, 8, (20, 10, 4, 10, 20))
    cases = model_cases(*shape, ("tf32x3",), config.num_neighbors)[:4]
    cases += model_cases(*shape, ("tf32",), config.num_neighbors)[:2]
    cases += model_cases(*published, ("bfloat16", "tf32x3"), config.num_neighbors)
    for record in tune(cases, seconds=max(10.0, setting.left - 5.0)):
        row: Row = {"kernel": record.kernel, "use": record.key.use, "mode": record.key.mode, "own": record.key.own}
        row |= {"other": record.key.other, "widest": record.key.widest, "table": str(record.default)}
        row |= {"table_ms": record.default_ms, "best": str(record.best), "best_ms": record.best_ms}
        yield row | {"tried": record.tried, "dropped": [asdict(failure) for failure in record.failed]}
    kept = user_file(identity_of(torch.device("cuda", 0)))
    if kept is not None and kept.is_file():  # to travel with the package, where it proves right
        setting.out.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept, setting.out / kept.name)
