"""Value: ``out_j = Σ_k p_jk v_k`` by a running softmax over tiles of keys (docs/concepts/attention.md)."""

# ruff: noqa: RUF005 -- Triton compiles sums of tuples, not stars
# mypy: disable-error-code="no-untyped-def, no-untyped-call, operator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from escaip.ops.triton.common import (
    add_angular_rows,
    add_rows,
    autotuned,
    both_directed,
    cosines,
    count,
    load_directions,
    load_rows,
    load_tokens,
    owned_tokens,
    pair_products,
    rounded,
    store_rows,
    zero_rows,
)


@autotuned(0)
@triton.jit(do_not_specialize=["neighborhoods"])
def forward_rows(
    q, k, v, log_envelope, direction, query_offsets, key_offsets, neighborhoods, out, lse, scale,
    H: tl.constexpr, D: tl.constexpr, LOGITS: tl.constexpr, VALUES: tl.constexpr, ANGLES: tl.constexpr,
    TURNED: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
    OTHER: tl.constexpr, OWN_SIZE: tl.constexpr, OTHER_SIZE: tl.constexpr,
):  # fmt: skip
    """Writes ``out (Q, H, D)`` and ``lse (Q, H)``."""
    head = tl.program_id(1)
    owner, first_query, last_query = owned_tokens(query_offsets, neighborhoods, SPLIT, OWN)
    first_key = tl.load(key_offsets + owner)
    last_key = tl.load(key_offsets + owner + 1)
    column = tl.arange(0, OTHER)
    for j in range(first_query, last_query, OWN):
        x = load_rows(q, j, last_query, head, H, D, LOGITS, OWN)
        n = load_directions(direction, j, last_query, ANGLES, OWN)
        largest = tl.full([OWN], float("-inf"), tl.float32)
        total = tl.zeros([OWN], tl.float32)
        sums = zero_rows(VALUES, OWN)
        for i in range(first_key, last_key, OTHER):
            y = load_rows(k, i, last_key, head, H, D, LOGITS, OTHER)
            m = load_directions(direction, i, last_key, ANGLES, OTHER)
            logits, _ = pair_products(x, y, n, m, LOGITS, ANGLES, TURNED, False, PRECISION, OWN, OTHER)
            logits *= scale
            if BIAS:
                logits += load_tokens(log_envelope, i, last_key, OTHER)[None, :]
            logits = tl.where((column < last_key - i)[None, :], logits, float("-inf"))
            grown = tl.maximum(largest, tl.max(logits, 1))
            finite = tl.where(grown == float("-inf"), 0.0, grown)  # a tile may hold no key with a finite logit
            p = tl.exp(logits - finite[:, None])
            shrink = tl.exp(largest - finite)
            total = total * shrink + tl.sum(p, 1)
            scaled = ()
            for g in tl.static_range(count(VALUES)):
                scaled = scaled + (sums[g] * shrink[:, None],)
            w = load_rows(v, i, last_key, head, H, D, VALUES, OTHER)
            if TURNED:
                c = cosines(n, m, both_directed(n, m), TURNED)
                sums = add_angular_rows(scaled, p, p, w, c, VALUES, PRECISION)
            else:
                sums = add_rows(scaled, rounded(p, v.dtype.element_ty), w, VALUES, PRECISION)
            largest = grown
        store_rows(out, sums, (1.0 / total)[:, None], j, last_query, head, H, D, VALUES, OWN)
        rows = tl.arange(0, OWN)
        tl.store(lse + (j + rows) * H + head, largest + tl.log(total), mask=rows < last_query - j)
