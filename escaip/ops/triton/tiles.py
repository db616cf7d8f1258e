"""Tile sizes and warps of each kernel: one table, made from what ptxas reports and still to be tuned on a GPU.

``OVERRIDES`` is the tuner's hook: an entry ``OVERRIDES["forward_rows"] = Tile(own=64, other=64, warps=4, stages=2)``
takes the place of the table for that kernel until it is deleted. Nothing else writes to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from escaip.ops.triton.chunks import Chunks


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        own: tokens a program owns at a time, a power of two from 16 on.
        other: tokens per step of its walk, a power of two from 16 on.
        warps: warps per program.
        stages: depth of the software pipeline of the walk; 1 for none.
    """

    own: int
    other: int
    warps: int
    stages: int = 1


OVERRIDES: dict[str, Tile] = {}

# From this mean size on, a walk is long enough for a pipeline and for wide tiles.
LONG = 64
# Tiles of long walks without angles, by bytes of a channel and by columns: up to 32, up to 64, more.
_LONG_TILES = {
    2: {
        "forward_rows": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        "backward_rows": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        "backward_columns": (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
        "double_backward_rows": (Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(16, 32, 4)),
        "double_backward_columns": (Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(16, 32, 4)),
    },
    4: {
        "forward_rows": (Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(16, 32, 4)),
        "backward_rows": (Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(16, 32, 4)),
        "backward_columns": (Tile(16, 64, 4, 2), Tile(32, 32, 4), Tile(16, 32, 4)),
        "double_backward_rows": (Tile(16, 64, 4, 2), Tile(32, 32, 4), Tile(16, 32, 4)),
        "double_backward_columns": (Tile(16, 64, 4, 2), Tile(32, 32, 4), Tile(16, 32, 4)),
    },
}


def padded_columns(logits: Chunks, values: Chunks) -> int:
    """Columns of the widest operand, as its tiles pad it."""
    return max(sum(chunk[2] for chunk in chunks) for chunks in (logits, values))


def choose_tile(kernel: str, angles: bool, item_bytes: int, columns: int, own_mean: float, other_mean: float) -> Tile:
    """The tile of a kernel.

    16 owned tokens against 32 others let four warps share the pairs without repeating each other's products; wider
    tiles spill registers where there are angles.

    Args:
        kernel: name of the kernel.
        angles: whether logits have angular groups.
        item_bytes: bytes of a channel.
        columns: see :func:`padded_columns`.
        own_mean: mean number of tokens of a neighborhood on the owned side.
        other_mean: on the other side.
    """
    if kernel in OVERRIDES:
        return OVERRIDES[kernel]
    if not angles and min(own_mean, other_mean) >= LONG:
        return _LONG_TILES[item_bytes][kernel][(columns > 32) + (columns > 64)]
    return Tile(16, 16, 2) if other_mean <= 16 else Tile(16, 32, 4)
