"""The tiles of the attention kernels, measured for a model on the GPU here (docs/attention.md, "Tiles")."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from escaip.errors import ConfigError, UsageError
from escaip.models import EScAIPConfig
from escaip.potential.loading import read_potential

if TYPE_CHECKING:
    from escaip.ops.triton.tuning import Record

# What each precision of an evaluation makes the kernels compute in.
_MODES = {"highest": "tf32x3", "tf32": "tf32", "float16": "float16", "bfloat16": "bfloat16"}


def require_gpu() -> torch.device:
    """The current CUDA device.

    Raises:
        ConfigError: the device or Triton is missing; the line says which.
    """
    if not torch.cuda.is_available():
        raise ConfigError("tiles are measured on an NVIDIA GPU, and none is usable here: run it where the GPU is")
    from escaip.ops.triton import availability

    missing = availability()
    if missing is not None:
        raise ConfigError(f"measuring tiles {missing}")
    import triton

    if triton.knobs.runtime.interpret:
        raise ConfigError("tiles are measured on compiled kernels, and Triton interprets here: unset TRITON_INTERPRET")
    return torch.device("cuda", torch.cuda.current_device())


def tune_model(
    model: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    precisions: Sequence[str] = ("highest",),
    seconds: float = 120.0,
    workers: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = print,
) -> list[Record]:
    """Measures tiles for a model's heads, groups and neighborhoods (:func:`escaip.ops.triton.tuning.tune`).

    Args:
        model: a .ckpt or .escaip file, or
        preset: a name of :data:`escaip.EScAIPConfig.PRESETS`, by default ``5m``.
        precisions: of :data:`escaip.potential.precision.PRECISIONS`.
        seconds: for all of it.
        workers: processes that compile; by default one per usable core, up to 16.
        out: the file; by default in the user's cache.
        progress: called with a heading and a line for each kernel and situation.

    Raises:
        UsageError: both a model and a preset, no time, or fewer than no workers.
        ConfigError: no GPU, no Triton, no such preset, or no place for the file.
    """
    if model is not None and preset is not None:
        raise UsageError("both a model and a preset are given: choose one")
    if not seconds > 0 or (workers is not None and workers < 0):
        raise UsageError(
            f"{seconds} seconds with {workers} workers cannot be: give more than 0 s and no negative number"
        )
    device = require_gpu()
    from escaip.ops.triton.tuning import HEADER, line, model_cases, tune

    config = EScAIPConfig.preset(preset or "5m") if model is None else read_potential(model).config
    assert isinstance(config, EScAIPConfig)
    cases = model_cases(
        config.hidden_size // config.num_heads, config.num_heads, config.angular_channels,
        [_MODES[name] for name in precisions], config.num_neighbors,
    )  # fmt: skip
    progress(HEADER)
    return tune(
        cases, device, seconds=seconds, workers=workers, path=out, progress=lambda record: progress(line(record))
    )


def tiles_here() -> str:
    """What was measured for the GPU here: files, and a line for each tile.

    Raises:
        ConfigError: as :func:`require_gpu`.
    """
    device = require_gpu()
    from escaip.ops.triton.tile_files import identity_of, load

    identity = identity_of(device)
    found = load(identity)
    what = f"{identity.device}, Triton {identity.triton}, kernels {identity.kernels}"
    if not found.files:
        return f"{what}: nothing measured, the built-in table is used"
    lines = [f"{what}: {', '.join(str(path) for path in found.files)}"]
    for entry in found.entries:
        key = entry.key
        situation = (
            f"{key.kernel:24} {key.use:9} {key.mode:9} up to {key.columns:3} columns, {key.own:>4} by {key.other:4}"
        )
        lines.append(f"{situation}  {entry.tile}")
    return "\n".join(lines)
