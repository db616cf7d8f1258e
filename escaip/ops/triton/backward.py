"""First derivative: rows give dq and one half of dn, columns give dk, dv, db and the other half.

``R_jk = p (E − D_j)`` is the gradient of a logit, ``E_jk = G_j·v_k``, ``D_j = G_j·out_j``, ``G = grad_out``.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, operator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from escaip.ops.triton.common import (
    add_angular_rows,
    add_rows,
    add_weighted,
    autotuned,
    both_directed,
    cosines,
    load_directions,
    load_rows,
    load_tokens,
    owned_tokens,
    pair_products,
    row_dot,
    store_rows,
    store_tokens,
    store_vectors,
    zero_rows,
    zero_vectors,
)


@triton.jit
def add_products(
    totals, r, y, n, m, CHUNKS: tl.constexpr, ANGLES: tl.constexpr, TURNED: tl.constexpr, OF_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``total_j^l + Σ_k r a P_l y_k^l`` of all chunks; of values without ``a``."""
    if ANGLES:
        a = both_directed(n, m)
        angular = r if OF_VALUES else a * r
        totals = add_angular_rows(totals, r, angular, y, cosines(n, m, a, TURNED), CHUNKS, PRECISION)
    else:
        totals = add_rows(totals, r, y, CHUNKS, PRECISION)
    return totals


@autotuned(1)
@triton.jit(do_not_specialize=["neighborhoods", "num_queries"], do_not_specialize_on_alignment=["dn"])
def backward_rows(
    grad_out, q, k, v, log_envelope, direction, query_offsets, key_offsets, neighborhoods, out, lse, dq, dn, dots,
    scale, num_queries,
    H: tl.constexpr, D: tl.constexpr, LOGITS: tl.constexpr, VALUES: tl.constexpr, ANGLES: tl.constexpr,
    TURNED: tl.constexpr, BIAS: tl.constexpr, WITH_DN: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, OWN_SIZE: tl.constexpr, OTHER_SIZE: tl.constexpr,
):  # fmt: skip
    """Writes ``dq``, the row part of ``dn`` as ``(H, Q, 3)``, and ``D_j`` as ``(H, Q)`` for the columns."""
    head = tl.program_id(1)
    plane = head.to(tl.int64) * num_queries
    owner, first_query, last_query = owned_tokens(query_offsets, neighborhoods, SPLIT, OWN)
    first_key = tl.load(key_offsets + owner)
    last_key = tl.load(key_offsets + owner + 1)
    row, column = tl.arange(0, OWN), tl.arange(0, OTHER)
    for j in tl.range(first_query, last_query, OWN, disable_licm=True):
        x = load_rows(q, j, last_query, head, H, D, LOGITS, OWN)
        g = load_rows(grad_out, j, last_query, head, H, D, VALUES, OWN)
        o = load_rows(out, j, last_query, head, H, D, VALUES, OWN)
        d = row_dot(g, o, VALUES, OWN)
        store_tokens(dots + plane, d, j, last_query, OWN)
        norm = tl.load(lse + (j + row) * H + head, mask=row < last_query - j, other=0.0)
        sums, turn = zero_rows(LOGITS, OWN), zero_vectors(OWN)
        n = load_directions(direction, j, last_query, ANGLES, OWN)
        for i in tl.range(first_key, last_key, OTHER, disable_licm=True):
            y = load_rows(k, i, last_key, head, H, D, LOGITS, OTHER)
            m = load_directions(direction, i, last_key, ANGLES, OTHER)
            logits, slope = pair_products(x, y, n, m, LOGITS, ANGLES, TURNED, False, PRECISION, OWN, OTHER)
            logits *= scale
            if BIAS:
                logits += load_tokens(log_envelope, i, last_key, OTHER)[None, :]
            p = tl.where((column < last_key - i)[None, :], tl.exp(logits - norm[:, None]), 0.0)
            w = load_rows(v, i, last_key, head, H, D, VALUES, OTHER)
            e, slope_v = pair_products(g, w, n, m, VALUES, TURNED, TURNED, True, PRECISION, OWN, OTHER)
            r = p * (e - d[:, None])
            sums = add_products(sums, r, y, n, m, LOGITS, ANGLES, TURNED, False, PRECISION)
            if WITH_DN:
                of_cosine = r * slope
                if TURNED:
                    of_cosine += p * slope_v / scale
                turn = add_weighted(turn, of_cosine, m)
        store_rows(dq, sums, scale, j, last_query, head, H, D, LOGITS, OWN)
        if WITH_DN:
            store_vectors(dn + plane * 3, turn, scale, j, last_query, OWN)


@autotuned(1)
@triton.jit(do_not_specialize=["neighborhoods", "num_queries", "num_keys"], do_not_specialize_on_alignment=["dn"])
def backward_columns(
    grad_out, q, k, v, log_envelope, direction, query_offsets, key_offsets, neighborhoods, lse, dots, dk, dv, db,
    dn, scale, num_queries, num_keys,
    H: tl.constexpr, D: tl.constexpr, LOGITS: tl.constexpr, VALUES: tl.constexpr, ANGLES: tl.constexpr,
    TURNED: tl.constexpr, BIAS: tl.constexpr, WITH_DN: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, OWN_SIZE: tl.constexpr, OTHER_SIZE: tl.constexpr,
):  # fmt: skip
    """Writes ``dk``, ``dv``, each head's share of ``db``, ``(H, T)``, and the column part of ``dn``, ``(H, T, 3)``."""
    head = tl.program_id(1)
    queries, keys = head.to(tl.int64) * num_queries, head.to(tl.int64) * num_keys
    owner, first_key, last_key = owned_tokens(key_offsets, neighborhoods, SPLIT, OWN)
    first_query = tl.load(query_offsets + owner)
    last_query = tl.load(query_offsets + owner + 1)
    column = tl.arange(0, OTHER)
    for i in tl.range(first_key, last_key, OWN, disable_licm=True):
        y = load_rows(k, i, last_key, head, H, D, LOGITS, OWN)
        w = load_rows(v, i, last_key, head, H, D, VALUES, OWN)
        sums, sums_v, turn = zero_rows(LOGITS, OWN), zero_rows(VALUES, OWN), zero_vectors(OWN)
        m = load_directions(direction, i, last_key, ANGLES, OWN)
        if BIAS:
            bias = load_tokens(log_envelope, i, last_key, OWN)
            sum_b = tl.zeros([OWN], tl.float32)
        for j in tl.range(first_query, last_query, OTHER, disable_licm=True):
            x = load_rows(q, j, last_query, head, H, D, LOGITS, OTHER)
            n = load_directions(direction, j, last_query, ANGLES, OTHER)
            logits, slope = pair_products(y, x, m, n, LOGITS, ANGLES, TURNED, False, PRECISION, OWN, OTHER)
            logits *= scale
            if BIAS:
                logits += bias[:, None]
            norm = tl.load(lse + (j + column) * H + head, mask=column < last_query - j, other=0.0)
            p = tl.where((column < last_query - j)[None, :], tl.exp(logits - norm[None, :]), 0.0)
            g = load_rows(grad_out, j, last_query, head, H, D, VALUES, OTHER)
            d = load_tokens(dots + queries, j, last_query, OTHER)
            e, slope_v = pair_products(w, g, m, n, VALUES, TURNED, TURNED, True, PRECISION, OWN, OTHER)
            r = p * (e - d[None, :])
            sums_v = add_products(sums_v, p, g, m, n, VALUES, TURNED, TURNED, True, PRECISION)
            if BIAS:
                sum_b += tl.sum(r, 1)
            sums = add_products(sums, r, x, m, n, LOGITS, ANGLES, TURNED, False, PRECISION)
            if WITH_DN:
                of_cosine = r * slope
                if TURNED:
                    of_cosine += p * slope_v / scale
                turn = add_weighted(turn, of_cosine, n)
        store_rows(dk, sums, scale, i, last_key, head, H, D, LOGITS, OWN)
        store_rows(dv, sums_v, 1.0, i, last_key, head, H, D, VALUES, OWN)
        if BIAS:
            store_tokens(db + keys, sum_b, i, last_key, OWN)
        if WITH_DN:
            store_vectors(dn + keys * 3, turn, scale, i, last_key, OWN)
