"""What a structure takes and what a pack of them may: tokens, and the memory of each."""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING

import numpy as np
import torch

from escaip.models.config import EScAIPConfig
from escaip.potential.derivatives import plan_parts
from escaip.types import GraphSettings

if TYPE_CHECKING:
    from escaip.data import AtomicData
    from escaip.potential import Potential

CPU_TOKENS = 4096
"""Tokens of a pack on a CPU, where more at once is not faster. Molecules of 20 atoms (398 tokens), 1m preset, one
thread: 37, 51, 61, 67, 68, 68 and 68 structures per second of processor time in packs of 1, 2, 4, 8, 16, 32 and 64;
docs/prediction.md has more."""

_MEMORY_SHARE = 0.5  # of what is free: the estimate knows no backend and no fragmentation
_SAMPLED_ATOMS = 32


def token_budget(potential: Potential, derivatives: bool = True) -> int:
    """Tokens of a pack: what pays on this device, and what fits into half of its free memory.

    On a CPU at most :data:`CPU_TOKENS`. On CUDA as many as fit, but none for which the potential would compute anything
    twice (:func:`escaip.potential.derivatives.plan_parts`).

    Args:
        potential: at the place and in the dtype of the evaluation.
        derivatives: whether forces or stress are wanted.
    """
    config, device = potential.config, potential.device
    limit = 2**31 if device.type == "cuda" else CPU_TOKENS
    free = _free_bytes(device)
    if free is not None:
        each = bytes_per_token(config, potential.dtype, derivatives and config.is_conservative)
        limit = min(limit, int(_MEMORY_SHARE * free / each))
    while device.type == "cuda" and limit > 1 and plan_parts(config, limit, device)[1]:
        limit -= max(1, limit // 16)
    return max(1, limit)


def bytes_per_token(config: EScAIPConfig, dtype: torch.dtype, differentiate: bool) -> int:
    """Memory that a token takes while a pack is evaluated, from above.

    Measured on a CPU, in numbers per token and feature, beside what is returned here: kept for a derivative 45 of 64,
    60 of 80, 77 of 96, 95 of 112 and 129 of 144 (presets 1m to 85m, benchmarks/kept.py); without, 20 of 27 and 39 of
    42 (1m and 45m with direct forces).
    """
    numbers = 16 * (config.num_layers + 1) if differentiate else 12 + 5 * config.num_layers
    return numbers * config.hidden_size * dtype.itemsize


def estimate_tokens(data: AtomicData, settings: GraphSettings) -> int:
    """About how many tokens a structure has: its atoms, and ``k`` neighbors of each where there are as many.

    Neighbors are counted for some of the atoms, in a box with the volume of the cutoff's sphere and the shape of the
    cell; for cells smaller than that, by their density.
    """
    from escaip.data.validation import complete_cell

    positions, cell = (x.detach().cpu().double().numpy() for x in (data.positions, data.cell[0]))
    pbc = data.pbc[0].cpu().numpy()
    n = len(positions)
    if n == 0 or not (np.isfinite(positions).all() and np.isfinite(cell).all()):
        return n  # the evaluation says what is wrong
    full = complete_cell(cell, pbc)
    volume = abs(np.linalg.det(full))
    if not volume > 0:
        return n
    inverse = np.linalg.inv(full)
    heights = 1.0 / np.linalg.norm(inverse, axis=0)  # Å between lattice planes
    side = settings.cutoff * (4.0 * math.pi / 3.0) ** (1.0 / 3.0)
    fractional = positions @ inverse
    delta = fractional[None] - fractional[:: -(-n // _SAMPLED_ATOMS), None]
    delta = np.where(pbc, delta - np.round(delta), delta)
    count = (np.abs(delta) * heights <= 0.5 * side).all(axis=2).sum(axis=1)
    images = np.where(pbc, np.maximum(side / heights, 1.0), 1.0).prod()
    neighbors = count * images * heights.prod() / volume - 1.0
    most = float("inf") if pbc.any() else n - 1.0
    if settings.num_neighbors is not None:
        most = min(most, settings.num_neighbors)
    return n + math.ceil(n * float(np.clip(neighbors, 0.0, most).mean()))


def _free_bytes(device: torch.device) -> int | None:
    """Memory that an evaluation could take; None where it cannot be known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as stream:
            found = re.search(r"^MemAvailable:\s+(\d+) kB", stream.read(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None
