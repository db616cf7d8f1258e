"""Tile sizes and warps of each kernel: what was measured on the device, else a table made from what ptxas reports.

:func:`choose_tile` takes the first that has an answer: ``OVERRIDES``, the user's file of ``escaip tune``, the package's
file of this device, the table. Nothing is timed while a model runs (docs/attention.md, "Tiles").

``OVERRIDES`` is for experiments: an entry ``OVERRIDES["forward_rows"] = Tile(own=64, other=64, warps=4, stages=2)``
takes the place of all else for that kernel until it is deleted. Nothing else writes to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from escaip.ops.triton.chunks import Chunks

KERNELS = ("forward_rows", "backward_rows", "backward_columns", "double_backward_rows", "double_backward_columns")
# What the logits of a kernel have: angular groups and a bias, a bias, or neither.
USES = ("angles", "envelope", "node")
# How a matrix product rounds: of float32 tokens in Triton's words, else the type of the tokens.
MODES = ("tf32x3", "tf32", "ieee", "float16", "bfloat16")
# Mean tokens of a neighborhood.
SIZES = ("<=16", "<=32", "<64", ">=64")
WIDEST = (32, 64)  # bounds of the three kinds of operands: up to so many columns, or more


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

    def __str__(self) -> str:
        return f"{self.own}x{self.other} w{self.warps} s{self.stages}"


@dataclass(frozen=True)
class TileKey:
    """All that a tile depends on besides the device.

    Attributes:
        kernel: of :data:`KERNELS`.
        use: of :data:`USES`.
        mode: of :data:`MODES`.
        widest: columns of the widest operand, as its tiles pad it.
        columns: of the operands of logits and of values together, which shared memory grows with.
        own: mean size of a neighborhood on the owned side, of :data:`SIZES`.
        other: on the other side.
    """

    kernel: str
    use: str
    mode: str
    widest: int
    columns: int
    own: str
    other: str

    @property
    def kind(self) -> tuple[str, str, str, int, str, str]:
        """Within which tiles are shared: the key with operands up to 32 columns, up to 64, or more, as 0, 1 or 2."""
        return self.kernel, self.use, self.mode, sum(self.widest > bound for bound in WIDEST), self.own, self.other


OVERRIDES: dict[str, Tile] = {}

# From this mean size on, a walk is long enough for a pipeline and for wide tiles.
LONG = ">=64"
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


def padded_columns(chunks: Chunks) -> int:
    """Columns of an operand, as its tiles pad it."""
    return sum(chunk[2] for chunk in chunks)


def size_class(mean: float) -> str:
    """Of :data:`SIZES`, that of a mean size."""
    return SIZES[(mean > 16) + (mean > 32) + (mean >= 64)]


def choose_tile(key: TileKey, device: torch.device | None = None) -> Tile:
    """The tile of a kernel.

    Args:
        key: what it depends on.
        device: of the tensors; without a CUDA device nothing was measured.
    """
    if key.kernel in OVERRIDES:
        return OVERRIDES[key.kernel]
    if device is not None and device.type == "cuda":
        from escaip.ops.triton.tile_files import measured_tiles  # which knows tiles in turn

        measured = measured_tiles(device).find(key)
        if measured is not None:
            return measured
    return table_tile(key)


def table_tile(key: TileKey) -> Tile:
    """The tile where nothing was measured.

    16 owned tokens against 32 others let four warps share the pairs without repeating each other's products; wider
    tiles spill registers where there are angles.
    """
    if key.use != "angles" and key.own == key.other == LONG:
        item_bytes = 2 if key.mode in ("float16", "bfloat16") else 4
        return _LONG_TILES[item_bytes][key.kernel][key.kind[3]]
    return Tile(16, 16, 2) if key.other == SIZES[0] else Tile(16, 32, 4)
