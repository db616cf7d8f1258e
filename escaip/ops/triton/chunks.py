"""How the channels of a head are cut into chunks, the operands of a kernel's matrix products.

A chunk is ``(start, width, padded, degree)``: channels ``[start, start + width)`` of a head, which belong to an angular
degree, in a tile of ``padded`` columns. Tensor cores want powers of two from 16 on: a group of 80 channels becomes
chunks of 64 and 16, and the published groups (20, 10, 4, 10, 20) take 112 columns, where one expanded copy per
spherical harmonic would take 320.
"""

from __future__ import annotations

import functools
from typing import Any

import triton

SMALLEST = 16
LARGEST = 128
# Triton deals warps out over the axis that is longer in the last product of a loop, and so in all of them: beside 16
# owned tokens the last chunk must be wider than that, else every warp does the work of all.
SMALLEST_LAST = 32

Chunk = tuple[int, int, int, int]
Chunks = tuple[Chunk, ...]


@functools.cache
def cut(widths: tuple[int, ...]) -> Chunks:
    """The chunks of groups of ``widths[l]`` channels of degree ``l``."""
    chunks: list[Chunk] = []
    start = 0
    for degree, width in enumerate(widths):
        left = width
        while left > 0:
            padded = _padded(left)
            chunks.append((start, min(left, padded), padded, degree))
            start += min(left, padded)
            left -= padded
    *others, (first, width, padded, degree) = chunks
    return (*others, (first, width, max(padded, SMALLEST_LAST), degree))


def _padded(width: int) -> int:
    """The largest power of two within ``width`` rounded up to a multiple of 16."""
    rounded = -(-width // SMALLEST) * SMALLEST
    return min(1 << (rounded.bit_length() - 1), LARGEST)


# Read inside kernels, while they are compiled.


@triton.constexpr_function
def count(chunks: Any) -> Any:
    return len(chunks)


@triton.constexpr_function
def start(chunks: Any, i: Any) -> Any:
    return chunks[i][0]


@triton.constexpr_function
def width(chunks: Any, i: Any) -> Any:
    return chunks[i][1]


@triton.constexpr_function
def padded(chunks: Any, i: Any) -> Any:
    return chunks[i][2]


@triton.constexpr_function
def degree(chunks: Any, i: Any) -> Any:
    return chunks[i][3]
