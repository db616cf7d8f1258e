"""Parts shared by the kernels: chunks of channels, tokens a program owns, loads and stores, logits, Legendre
polynomials.

Symbols as in docs/concepts. A program owns a tile of tokens of one head (rows of the score matrix, or its columns)
and walks over the others of the same neighborhood. In every kernel the owner is axis 0 of a tile of pairs and the other
is axis 1: the column kernels compute transposed tiles, so that rows and columns share this code.

A chunk is ``(start, width, padded, degree)``: channels ``[start, start + width)`` of a head, which belong to one
angular degree, in a tile of ``padded`` columns. Tensor cores take powers of two from 16 on: a group of 80 channels
becomes chunks of 64 and 16, and the published groups (20, 10, 4, 10, 20) take 112 columns, where one expanded copy per
spherical harmonic would take 320.
"""

# ruff: noqa: RUF005 -- Triton compiles sums of tuples, not stars
# mypy: disable-error-code="no-untyped-def, no-untyped-call, operator, assignment"

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

# The interpreter keeps bfloat16 as bits and would multiply those.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
SMALLEST = 16
LARGEST = 128
# Triton distributes warps over the axis that is longer in the last product of a loop: beside 16 owned tokens the last
# chunk must be wider than 16, or every warp does the work of all.
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


# Tokens that a program owns at a time, tokens per step of its walk, warps, and stages of the pipeline of the walk.
TILES = (
    (16, 16, 2, 1), (16, 16, 4, 1), (16, 32, 2, 1), (16, 32, 4, 1), (16, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1),
    (16, 64, 4, 2), (32, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2),
)  # fmt: skip
# Arguments on which the fastest tile depends, besides the types of the tensors.
KEY = (
    "H", "D", "LOGITS", "VALUES", "ANGLES", "TURNED", "BIAS", "WITH_DN", "SPLIT", "PRECISION", "OWN_SIZE", "OTHER_SIZE",
)  # fmt: skip


def autotuned(order: int) -> Callable[[Any], Any]:
    """Decorates a kernel of the value (order 0) or of a derivative: Triton times its tiles once and keeps the result.

    The interpreter, which cannot time, takes one tile.
    """
    configs = [
        triton.Config({"OWN": own, "OTHER": other}, num_warps=warps, num_stages=stages)
        for own, other, warps, stages in (((32, 32, 4, 1),) if INTERPRETED else TILES)
    ]
    prune = {"early_config_prune": functools.partial(fitting_tiles, order)}
    return triton.autotune(configs, key=KEY, prune_configs_by=prune, cache_results=True)


def fitting_tiles(order: int, configs: list[Any], _: Any, **given: Any) -> list[Any]:
    """Leaves out tiles larger than the neighborhoods, and tiles for which ptxas spills registers.

    The bounds are on pairs of tokens per warp (``benchmarks/attention_compile.py`` prints what is spilled). Products in
    three TF32 ones hold each operand twice, angles their polynomials, the second derivative its tangents.
    """
    exact = given["q"].dtype == torch.float32 and given["PRECISION"] != "tf32"
    wide = max(sum(chunk[2] for chunk in given[name]) for name in ("LOGITS", "VALUES")) > 64

    def fits(config: Any) -> bool:
        own, other = config.kwargs["OWN"], config.kwargs["OTHER"]
        pairs = own * other // config.num_warps
        if own > given["OWN_SIZE"] or other > max(32, given["OTHER_SIZE"]):
            return False
        if given["ANGLES"] and order + exact >= 2:
            return own == 16 and pairs <= 128
        if given["ANGLES"]:
            return own * other <= (512 if order else 1024) and (pairs <= 256 or not order)
        if not exact:
            return pairs <= (512 if order == 2 and wide else 1024)
        return pairs <= (128 if order and wide else 256 if order == 2 else 512)

    return [config for config in configs if fits(config)]


def size_class(mean: float) -> int:
    """The power of two from 16 to 128 that bounds a mean size of neighborhoods, or 128 for larger ones."""
    return min(max(triton.next_power_of_2(math.ceil(mean)), 16), 128)


# Constants of kernels, read while they are compiled.


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


@triton.jit
def owned_tokens(offsets, neighborhoods, SPLIT: tl.constexpr, OWN: tl.constexpr):
    """Neighborhood of this program, and the tokens ``[first, last)`` it owns.

    A program owns a whole neighborhood or, with SPLIT, one tile of it. Tiles are numbered without reading sizes on the
    host: those of neighborhood ``i`` are the programs from ``offsets[i] // OWN + i`` on, which are enough because
    ``ceil(n / OWN)`` is at most ``(o + n) // OWN - o // OWN + 1``. A few programs own nothing.
    """
    slot = tl.program_id(0)
    owner = slot
    if SPLIT:
        owner = slot * 0
        beyond = owner + neighborhoods
        while owner + 1 < beyond:  # the last neighborhood whose first tile is not beyond this one
            middle = (owner + beyond) // 2
            reached = tl.load(offsets + middle) // OWN + middle <= slot
            owner = tl.where(reached, middle, owner)
            beyond = tl.where(reached, beyond, middle)
    begin = tl.load(offsets + owner)
    end = tl.load(offsets + owner + 1)
    first = begin
    if SPLIT:
        first = begin + (slot - begin // OWN - owner) * OWN
        end = tl.minimum(end, first + OWN)
    return owner, first, end


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """``x`` in another type, rounded to nearest; the interpreter by itself would cut bfloat16 off."""
    if INTERPRETED and x.dtype == tl.float32 and tl.bfloat16 == TYPE:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def load_chunk(
    ptr,
    first,
    last,
    head,
    PIECE: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Chunk PIECE of tokens ``first .. first + BLOCK`` of ``(., H, D)``, zero from ``last`` on."""
    rows = tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, padded(CHUNKS, PIECE))[None, :]
    base = ptr + (first * H + head) * D
    mask = (rows < last - first) & (channel < width(CHUNKS, PIECE))
    return tl.load(base + rows * (H * D) + start(CHUNKS, PIECE) + channel, mask=mask, other=0.0)


@triton.jit
def load_rows(ptr, first, last, head, H: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """All chunks, as a tuple."""
    tiles = ()
    for i in tl.static_range(count(CHUNKS)):
        tiles = tiles + (load_chunk(ptr, first, last, head, i, H, D, CHUNKS, BLOCK),)
    return tiles


@triton.jit
def store_rows(
    ptr, tiles, factor, first, last, head, H: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes ``factor`` times the chunks; ``factor`` is a number or one per token, ``(BLOCK, 1)``."""
    rows = tl.arange(0, BLOCK)[:, None]
    base = ptr + (first * H + head) * D
    for i in tl.static_range(count(CHUNKS)):
        channel = tl.arange(0, padded(CHUNKS, i))[None, :]
        mask = (rows < last - first) & (channel < width(CHUNKS, i))
        value = rounded(tiles[i] * factor, ptr.dtype.element_ty)
        tl.store(base + rows * (H * D) + start(CHUNKS, i) + channel, value, mask=mask)


@triton.jit
def zero_rows(CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Accumulators of ``store_rows``."""
    tiles = ()
    for i in tl.static_range(count(CHUNKS)):
        tiles = tiles + (tl.zeros([BLOCK, padded(CHUNKS, i)], tl.float32),)
    return tiles


@triton.jit
def load_tokens(ptr, first, last, BLOCK: tl.constexpr):
    """One float32 per token, zero from ``last`` on."""
    rows = tl.arange(0, BLOCK)
    return tl.load(ptr + first + rows, mask=rows < last - first, other=0.0)


@triton.jit
def store_tokens(ptr, value, first, last, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(ptr + first + rows, value, mask=rows < last - first)


@triton.jit
def load_vectors(ptr, first, last, BLOCK: tl.constexpr):
    """x, y and z of ``(., 3)``, each ``(BLOCK,)``."""
    rows = tl.arange(0, BLOCK)
    mask = rows < last - first
    base = ptr + first * 3 + rows * 3
    return (
        tl.load(base, mask=mask, other=0.0),
        tl.load(base + 1, mask=mask, other=0.0),
        tl.load(base + 2, mask=mask, other=0.0),
    )


@triton.jit
def store_vectors(ptr, vectors, factor, first, last, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    mask = rows < last - first
    base = ptr + first * 3 + rows * 3
    for i in tl.static_range(3):
        tl.store(base + i, vectors[i] * factor, mask=mask)


@triton.jit
def zero_vectors(BLOCK: tl.constexpr):
    return tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)


@triton.jit
def inner(n, m):
    """``n_j·m_k`` of each pair: three multiply-adds in full float32, whatever the matrix products round to."""
    return n[0][:, None] * m[0][None, :] + n[1][:, None] * m[1][None, :] + n[2][:, None] * m[2][None, :]


@triton.jit
def add_weighted(total, weight, m):
    """``total_j + Σ_k weight_jk m_k`` of vectors ``m``."""
    return (
        total[0] + tl.sum(weight * m[0][None, :], 1),
        total[1] + tl.sum(weight * m[1][None, :], 1),
        total[2] + tl.sum(weight * m[2][None, :], 1),
    )


@triton.jit
def both_directed(n, m):
    """``a_jk``: 1 where neither token is a self token, else 0."""
    own = (n[0] != 0) | (n[1] != 0) | (n[2] != 0)
    other = (m[0] != 0) | (m[1] != 0) | (m[2] != 0)
    return (own[:, None] & other[None, :]).to(tl.float32)


@triton.jit
def cosines(n, m, a, TURNED: tl.constexpr):
    """``n_j·m_k``. With TURNED, 1 beside a self token: ``P_l`` is 1 there, and the logits have ``a``."""
    c = inner(n, m)
    if TURNED:
        c += 1.0 - a
    return c


# Triton also compiles the code after a `return` inside a branch, so branches assign and each function returns once.


@triton.jit
def legendre(c, L: tl.constexpr):
    """``P_L``."""
    tl.static_assert(L >= 1 and L <= 4)
    if L == 1:
        value = c
    elif L == 2:
        value = 1.5 * c * c - 0.5
    elif L == 3:
        value = (2.5 * c * c - 1.5) * c
    else:
        value = (4.375 * c * c - 3.75) * c * c + 0.375
    return value


@triton.jit
def legendre_first(c, L: tl.constexpr):
    """``P_L'``."""
    if L == 1:
        value = tl.full(c.shape, 1.0, tl.float32)
    elif L == 2:
        value = 3.0 * c
    elif L == 3:
        value = 7.5 * c * c - 1.5
    else:
        value = (17.5 * c * c - 7.5) * c
    return value


@triton.jit
def legendre_second(c, L: tl.constexpr):
    """``P_L''``."""
    if L == 1:
        value = tl.zeros(c.shape, tl.float32)
    elif L == 2:
        value = tl.full(c.shape, 3.0, tl.float32)
    elif L == 3:
        value = 15.0 * c
    else:
        value = 52.5 * c * c - 7.5
    return value


@triton.jit
def settle(PRECISION: tl.constexpr):
    """Keeps the compiler from loading all chunks first: in float32, each split in two TF32 halves, they do not fit.

    For the same reason the loops of the derivatives disable the hoisting of loop invariants.
    """
    if PRECISION == "tf32x3":
        tl.debug_barrier()


@triton.jit
def dot(x, y, total, PRECISION: tl.constexpr):
    """``total + x y``."""
    if INTERPRETED:
        total = tl.dot(x.to(tl.float32), y.to(tl.float32), total)
    else:
        total = tl.dot(x, y, total, input_precision=PRECISION)
    return total


@triton.jit
def dot_pairs(x, y, total, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """``total_jk + x_j·y_k`` over all chunks."""
    for i in tl.static_range(count(CHUNKS)):
        total = dot(x[i], tl.trans(y[i]), total, PRECISION)
    return total


@triton.jit
def weighted(total, weight, y, PRECISION: tl.constexpr):
    """``total_j + Σ_k weight_jk y_k`` of one chunk.

    A weight in float32 is rounded to bfloat16 beside bfloat16, as flash attention does; beside float16 it is not, whose
    range gradients leave easily: tensor cores take TF32 there, which rounds as float16 does.
    """
    if weight.dtype == tl.float32 and y.dtype == tl.float16:
        total = dot(weight, y.to(tl.float32), total, PRECISION)
    else:
        total = dot(rounded(weight, y.dtype), y, total, PRECISION)
    return total


@triton.jit
def add_rows(totals, weight, y, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """``total_j + Σ_k weight_jk y_k`` of all chunks, without angles."""
    sums = ()
    for i in tl.static_range(count(CHUNKS)):
        sums = sums + (weighted(totals[i], weight, y[i], PRECISION),)
    return sums


@triton.jit
def row_dot(x, y, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """``x_j·y_j`` of tuples of chunks."""
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(count(CHUNKS)):
        total += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), 1)
    return total


@triton.jit
def add_angular_rows(totals, r, angular, y, c, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """``total_j^l + Σ_k r P_l y_k^l`` of all chunks, with ``angular`` in place of ``r`` for l ≥ 1."""
    sums = ()
    for i in tl.static_range(count(CHUNKS)):
        if degree(CHUNKS, i) == 0:
            sums = sums + (weighted(totals[i], r, y[i], PRECISION),)
        else:
            sums = sums + (weighted(totals[i], angular * legendre(c, degree(CHUNKS, i)), y[i], PRECISION),)
    return sums


@triton.jit
def load_directions(direction, first, last, ANGLES: tl.constexpr, BLOCK: tl.constexpr):
    """Directions of tokens; nothing without angles."""
    vectors = ()
    if ANGLES:
        vectors = load_vectors(direction, first, last, BLOCK)
    return vectors


@triton.jit
def pair_products(
    x, y, n, m, CHUNKS: tl.constexpr, ANGLES: tl.constexpr, TURNED: tl.constexpr, OF_VALUES: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """``A^0 + a Σ_{l≥1} P_l A^l``, of values without ``a``, and its slope by the cosine, ``a Σ_l P_l' A^l``."""
    radial = tl.zeros([OWN, OTHER], tl.float32)
    angular = tl.zeros([OWN, OTHER], tl.float32)
    slope = tl.zeros([OWN, OTHER], tl.float32)
    if ANGLES:
        a = both_directed(n, m)
        c = cosines(n, m, a, TURNED)
        for i in tl.static_range(count(CHUNKS)):
            if degree(CHUNKS, i) == 0:
                radial = dot(x[i], tl.trans(y[i]), radial, PRECISION)
            else:
                product = dot(x[i], tl.trans(y[i]), tl.zeros([OWN, OTHER], tl.float32), PRECISION)
                angular += legendre(c, degree(CHUNKS, i)) * product
                slope += legendre_first(c, degree(CHUNKS, i)) * product
        radial += angular if OF_VALUES else a * angular
        slope = a * slope
    else:
        radial = dot_pairs(x, y, radial, CHUNKS, PRECISION)
    return radial, slope
