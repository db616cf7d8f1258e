"""What the kernels share: which tokens a program owns, tiles of channels in and out, logits, Legendre polynomials.

Symbols as in docs/attention.md. A program owns a tile of tokens of one head (rows of the score matrix, or its columns)
and walks over the others of the same neighborhood. In every kernel the owner is axis 0 of a tile of pairs and the other
is axis 1: the column kernels compute transposed tiles, so that rows and columns share this code.
"""

# ruff: noqa: RUF005 -- Triton compiles sums of tuples, not stars
# mypy: disable-error-code="no-untyped-def, no-untyped-call, operator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from escaip.ops.triton.chunks import count, padded, start, width

# The interpreter keeps bfloat16 as bits and would multiply those.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def owned_tokens(offsets, owners, SPLIT: tl.constexpr, OWN: tl.constexpr):
    """Neighborhood of this program, and the tokens ``[first, last)`` it owns.

    A program owns a whole neighborhood; with SPLIT, one tile of it: slot ``offsets[i] // OWN + i`` and those after it
    are the tiles of neighborhood ``i`` (launch.py says why that many slots suffice).
    """
    slot = tl.program_id(0)
    owner = slot
    if SPLIT:
        owner = tl.load(owners + slot)
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
    """Accumulators of :func:`store_rows`."""
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


# Branches of compiled functions assign and return once: what follows a return inside of a branch is compiled too.


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

    For the same reason the loops of the derivatives disable the hoisting of loop invariants; spills fell from some
    kilobytes per thread to 200 bytes (benchmarks/attention_compile.py).
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


@triton.jit(do_not_specialize=["num_slots", "num_neighborhoods", "steps"])
def assign_tiles(offsets, owners, num_slots, num_neighborhoods, steps, OWN: tl.constexpr, BLOCK: tl.constexpr):
    """Neighborhood of each slot (see ``launch.tile_owners``): the last whose first slot is not beyond it."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + num_neighborhoods
    for _ in range(steps):
        middle = (low + high) // 2
        reached = tl.load(offsets + middle) // OWN + middle <= slot
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    tl.store(owners + slot, low, mask=slot < num_slots)
