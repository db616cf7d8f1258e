"""The tiles that a kernel is tried with, by the sizes of neighborhoods, less those that spill registers."""

from __future__ import annotations

from escaip.ops.triton.tiles import SIZES, Tile, TileKey, table_tile

# By the longer side of the walk, up to 16, up to 32, below 64 and from 64 tokens on: all tokens in one step or several,
# little work for one warp or a share for several, a pipeline where there is something to load ahead.
_POOLS = (
    (
        Tile(16, 16, 1), Tile(16, 16, 2), Tile(16, 16, 4), Tile(16, 16, 8), Tile(16, 32, 1), Tile(16, 32, 2),
        Tile(16, 32, 4), Tile(16, 32, 8),
    ),
    (
        Tile(16, 16, 1), Tile(16, 16, 2), Tile(16, 16, 4), Tile(16, 16, 8), Tile(16, 32, 2), Tile(16, 32, 4),
        Tile(16, 32, 8), Tile(16, 32, 4, 2), Tile(16, 64, 8), Tile(32, 16, 2), Tile(32, 16, 4), Tile(32, 32, 2),
        Tile(32, 32, 4), Tile(32, 32, 8),
    ),
    (
        Tile(16, 16, 4), Tile(16, 32, 2), Tile(16, 32, 4), Tile(16, 32, 8), Tile(16, 32, 4, 2), Tile(16, 64, 4),
        Tile(16, 64, 8), Tile(16, 64, 8, 2), Tile(32, 16, 4), Tile(32, 32, 4), Tile(32, 32, 8), Tile(32, 64, 4),
        Tile(32, 64, 8), Tile(64, 64, 4),
    ),
    (
        Tile(16, 16, 4), Tile(16, 32, 4), Tile(16, 32, 8), Tile(16, 32, 4, 2), Tile(16, 64, 8), Tile(16, 64, 4, 2),
        Tile(16, 64, 8, 2), Tile(32, 32, 4, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2),
        Tile(64, 64, 8, 2), Tile(128, 64, 8, 2),
    ),
)  # fmt: skip


def candidates(key: TileKey) -> tuple[Tile, ...]:
    """The table's tile, then the others, 4 to 14 in all."""
    own, other = SIZES.index(key.own), SIZES.index(key.other)
    tiles = [table_tile(key)]
    for tile in _POOLS[max(own, other)]:
        fits = (own > 0 or tile.own == 16) and (other > 0 or tile.other <= 32)
        if fits and tile not in tiles and _keeps_registers(key, tile):
            tiles.append(tile)
    return tuple(tiles)


def _keeps_registers(key: TileKey, tile: Tile) -> bool:
    """Whether ptxas spills little; bounds are on pairs of tokens per warp, from ``benchmarks/attention_compile.py``.

    Products in three TF32 ones hold each operand twice, angles their polynomials, the second derivative tangents.
    """
    pairs = tile.own * tile.other // tile.warps
    exact, order = key.mode in ("tf32x3", "ieee"), key.kernel.count("backward") + key.kernel.count("double")
    if key.use == "angles":
        if order + exact >= 2:
            return tile.own == 16 and pairs <= 128
        return tile.own * tile.other <= (512 if order else 1024) and (pairs <= 256 or not order)
    wide = key.widest > 64
    if not exact:
        return pairs <= (512 if order == 2 and wide else 1024)
    if order and wide:
        return pairs <= 128
    if order == 2:
        return (pairs <= 256 and tile.warps >= 2) or (pairs <= 512 and tile.own >= 64)
    return pairs <= 256 or (tile.warps >= 4 and (pairs <= 512 or not (order or wide)))
