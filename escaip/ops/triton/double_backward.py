"""Second derivative: the tangent of the first derivative's formulas at fixed ``grad_out`` (docs/concepts/attention.md).

A name that ends in ``_t`` is a tangent, written with a dot in the derivation: ``logits_t`` is Ṡ, ``r_t`` is Ṙ. The rows
walk twice over their keys, first for ``μ_j = Σ_k p Ṡ``, ``Ȯ_j`` and ``Ḋ_j = G_j·Ȯ_j``, then for what contains them.
"""

# ruff: noqa: RUF005 -- Triton compiles sums of tuples, not stars
# mypy: disable-error-code="no-untyped-def, no-untyped-call, operator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from escaip.ops.triton.common import (
    add_rows,
    add_weighted,
    autotuned,
    both_directed,
    cosines,
    count,
    degree,
    dot,
    inner,
    legendre,
    legendre_first,
    legendre_second,
    load_chunk,
    load_rows,
    load_tokens,
    load_vectors,
    owned_tokens,
    rounded,
    row_dot,
    settle,
    store_rows,
    store_tokens,
    store_vectors,
    weighted,
    zero_rows,
    zero_vectors,
)


@triton.jit
def load_geometry(direction, tn, first, last, ANGLES: tl.constexpr, BLOCK: tl.constexpr):
    """Directions and their tangents; nothing without angles."""
    if ANGLES:
        geometry = load_vectors(direction, first, last, BLOCK), load_vectors(tn, first, last, BLOCK)
    else:
        geometry = (), ()
    return geometry


@triton.jit
def load_bias(log_envelope, tb, first, last, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Log envelope and its tangent, zero where there is none."""
    bias, bias_t = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if BIAS:
        bias, bias_t = load_tokens(log_envelope, first, last, BLOCK), load_tokens(tb, first, last, BLOCK)
    return bias, bias_t


# OF is what pairs are made of: queries and keys ("logits"), or cotangents of the output and values, of which a program
# owns the cotangents ("rows") or the values ("columns"). Cotangents have no tangent; beside a self token P_l is 1.


@triton.jit
def pair_tangents(
    x, x_t, y_ptr, ty_ptr, first, last, head, n, n_t, m, m_t, H: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr,
    ANGLES: tl.constexpr, TURNED: tl.constexpr, OF: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """``A^0 + a Σ P_l A^l``, its tangent, the slope ``a Σ P_l' A^l`` by the cosine and its tangent, of each pair."""
    radial, radial_t = tl.zeros([OWN, OTHER], tl.float32), tl.zeros([OWN, OTHER], tl.float32)
    angular, angular_t = tl.zeros([OWN, OTHER], tl.float32), tl.zeros([OWN, OTHER], tl.float32)
    slope, slope_t = tl.zeros([OWN, OTHER], tl.float32), tl.zeros([OWN, OTHER], tl.float32)
    if ANGLES:
        a = both_directed(n, m)
        c, c_t = cosines(n, m, a, TURNED), inner(n_t, m) + inner(n, m_t)
    for i in tl.static_range(count(CHUNKS)):
        product, product_t = radial, radial_t
        if degree(CHUNKS, i) != 0:
            product, product_t = tl.zeros([OWN, OTHER], tl.float32), tl.zeros([OWN, OTHER], tl.float32)
        y = tl.trans(load_chunk(y_ptr, first, last, head, i, H, D, CHUNKS, OTHER))
        product = dot(x[i], y, product, PRECISION)
        if OF != "rows":
            product_t = dot(x_t[i], y, product_t, PRECISION)
        if OF != "columns":
            y_t = tl.trans(load_chunk(ty_ptr, first, last, head, i, H, D, CHUNKS, OTHER))
            product_t = dot(x[i], y_t, product_t, PRECISION)
        if degree(CHUNKS, i) == 0:
            radial, radial_t = product, product_t
        else:
            value, first_derivative = legendre(c, degree(CHUNKS, i)), legendre_first(c, degree(CHUNKS, i))
            angular += value * product
            angular_t += value * product_t
            slope += first_derivative * product
            slope_t += first_derivative * product_t + legendre_second(c, degree(CHUNKS, i)) * c_t * product
        settle(PRECISION)
    if ANGLES:
        # the tangent of P_l in the logit, P_l' ċ A^l summed over l, is ċ times the slope
        slope, slope_t = a * slope, a * slope_t
        if OF == "logits":
            angular, angular_t = a * angular, a * angular_t
        radial += angular
        radial_t += angular_t + c_t * slope
    return radial, radial_t, slope, slope_t


@triton.jit
def add_tangent_rows(
    totals, r, r_t, y_ptr, ty_ptr, first, last, head, n, n_t, m, m_t, H: tl.constexpr, D: tl.constexpr,
    CHUNKS: tl.constexpr, ANGLES: tl.constexpr, TURNED: tl.constexpr, OF: tl.constexpr, PRECISION: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """``total_j^l + Σ_k a [(Ṙ P_l + R P_l' ċ) y_k^l + R P_l ẏ_k^l]`` of all chunks."""
    if ANGLES:
        a = both_directed(n, m)
        c = cosines(n, m, a, TURNED)
        turned = a * r * (inner(n_t, m) + inner(n, m_t))
        angular, angular_t = r, r_t
        if OF == "logits":
            angular, angular_t = a * r, a * r_t
    sums = ()
    for i in tl.static_range(count(CHUNKS)):
        settle(PRECISION)
        if degree(CHUNKS, i) == 0:
            weight, weight_t = r, r_t
        else:
            value = legendre(c, degree(CHUNKS, i))
            weight, weight_t = angular * value, angular_t * value + turned * legendre_first(c, degree(CHUNKS, i))
        total = weighted(totals[i], weight_t, load_chunk(y_ptr, first, last, head, i, H, D, CHUNKS, OTHER), PRECISION)
        if OF != "columns":
            y_t = load_chunk(ty_ptr, first, last, head, i, H, D, CHUNKS, OTHER)
            total = weighted(total, weight, y_t, PRECISION)
        sums = sums + (total,)
    return sums


@triton.jit
def add_turns(turn, r, r_t, slope, slope_t, m, m_t):
    """``turn_j + Σ_k [(Ṙ C + R Ċ) n_k + R C ṅ_k]`` for slopes ``C`` by the cosine."""
    turn = add_weighted(turn, r_t * slope + r * slope_t, m)
    return add_weighted(turn, r * slope, m_t)


@triton.jit
def row_tangents(
    x, x_t, n, n_t, norm, k, tk, v, tv, log_envelope, tb, direction, tn, first_key, last_key, head, scale,
    H: tl.constexpr, D: tl.constexpr, LOGITS: tl.constexpr, VALUES: tl.constexpr, ANGLES: tl.constexpr,
    TURNED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """First walk: ``Σ_k p ((Ṡ − shift) v + v̇)``, ``μ − shift`` and ``shift``, any number near μ.

    ``Ȯ = Σ p (Ṡ v + v̇) − μ out`` loses digits where μ is large: Ṡ is counted from its mean over the first tile.
    """
    column = tl.arange(0, OTHER)
    shift, mean = tl.zeros([OWN], tl.float32), tl.zeros([OWN], tl.float32)
    sums = zero_rows(VALUES, OWN)
    for i in tl.range(first_key, last_key, OTHER, disable_licm=True):
        m, m_t = load_geometry(direction, tn, i, last_key, ANGLES, OTHER)
        logits, logits_t, _, _ = pair_tangents(
            x, x_t, k, tk, i, last_key, head, n, n_t, m, m_t, H, D, LOGITS, ANGLES, TURNED,
            "logits", PRECISION, OWN, OTHER,
        )  # fmt: skip
        bias, bias_t = load_bias(log_envelope, tb, i, last_key, BIAS, OTHER)
        p = tl.exp(logits * scale + bias[None, :] - norm[:, None])
        p = tl.where((column < last_key - i)[None, :], p, 0.0)
        logits_t = logits_t * scale + bias_t[None, :]
        tile_mean = tl.sum(p * logits_t, 1) / tl.maximum(tl.sum(p, 1), 1e-30)
        shift = tl.where(i == first_key, tile_mean, shift)
        p_t = p * (logits_t - shift[:, None])
        mean += tl.sum(p_t, 1)
        if TURNED:
            sums = add_tangent_rows(
                sums, p, p_t, v, tv, i, last_key, head, n, n_t, m, m_t, H, D, VALUES, ANGLES, TURNED, "rows", PRECISION,
                OTHER,
            )  # fmt: skip
        else:
            w = load_rows(v, i, last_key, head, H, D, VALUES, OTHER)
            w_t = load_rows(tv, i, last_key, head, H, D, VALUES, OTHER)
            sums = add_rows(sums, p_t, w, VALUES, PRECISION)
            sums = add_rows(sums, rounded(p, v.dtype.element_ty), w_t, VALUES, PRECISION)
    return sums, mean, shift


@triton.jit
def row_gradients(
    x, x_t, n, n_t, g, norm, d, mean, d_t, k, tk, v, tv, log_envelope, tb, direction, tn, first_key, last_key, head,
    scale, H: tl.constexpr, D: tl.constexpr, LOGITS: tl.constexpr, VALUES: tl.constexpr, ANGLES: tl.constexpr,
    TURNED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Second walk: ``gq`` and the row part of ``gn``, both without the factor ``scale``."""
    column = tl.arange(0, OTHER)
    sums, turn = zero_rows(LOGITS, OWN), zero_vectors(OWN)
    for i in tl.range(first_key, last_key, OTHER, disable_licm=True):
        m, m_t = load_geometry(direction, tn, i, last_key, ANGLES, OTHER)
        logits, logits_t, slope, slope_t = pair_tangents(
            x, x_t, k, tk, i, last_key, head, n, n_t, m, m_t, H, D, LOGITS, ANGLES, TURNED,
            "logits", PRECISION, OWN, OTHER,
        )  # fmt: skip
        bias, bias_t = load_bias(log_envelope, tb, i, last_key, BIAS, OTHER)
        p = tl.exp(logits * scale + bias[None, :] - norm[:, None])
        p = tl.where((column < last_key - i)[None, :], p, 0.0)
        logits_t = logits_t * scale + bias_t[None, :]
        settle(PRECISION)
        e, e_t, slope_v, slope_v_t = pair_tangents(
            g, (), v, tv, i, last_key, head, n, n_t, m, m_t, H, D, VALUES, TURNED, TURNED, "rows", PRECISION, OWN, OTHER
        )
        e, e_t = e - d[:, None], e_t - d_t[:, None]
        p_t = p * (logits_t - mean[:, None])
        r, r_t = p * e, p_t * e + p * e_t
        sums = add_tangent_rows(
            sums, r, r_t, k, tk, i, last_key, head, n, n_t, m, m_t, H, D, LOGITS, ANGLES, TURNED, "logits", PRECISION,
            OTHER,
        )  # fmt: skip
        if ANGLES:
            turn = add_turns(turn, r, r_t, slope, slope_t, m, m_t)
            if TURNED:
                turn = add_turns(turn, p / scale, p_t / scale, slope_v, slope_v_t, m, m_t)
    return sums, turn


@autotuned(2)
@triton.jit(do_not_specialize=["neighborhoods", "num_queries"], do_not_specialize_on_alignment=["gn"])
def double_backward_rows(
    tq, tk, tv, tb, tn, grad_out, q, k, v, log_envelope, direction, query_offsets, key_offsets, neighborhoods, out, lse,
    grad_grad_out, gq, gn, dots, means, dots_t, scale, num_queries,
    H: tl.constexpr, D: tl.constexpr, LOGITS: tl.constexpr, VALUES: tl.constexpr, ANGLES: tl.constexpr,
    TURNED: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
    OTHER: tl.constexpr, OWN_SIZE: tl.constexpr, OTHER_SIZE: tl.constexpr,
):  # fmt: skip
    """Writes Ȯ, ``gq``, the row part of ``gn`` as ``(H, Q, 3)``, and D, μ, Ḋ as ``(H, Q)`` for the columns."""
    head = tl.program_id(1)
    plane = head.to(tl.int64) * num_queries
    owner, first_query, last_query = owned_tokens(query_offsets, neighborhoods, SPLIT, OWN)
    first_key = tl.load(key_offsets + owner)
    last_key = tl.load(key_offsets + owner + 1)
    row = tl.arange(0, OWN)
    for j in tl.range(first_query, last_query, OWN, disable_licm=True):
        x = load_rows(q, j, last_query, head, H, D, LOGITS, OWN)
        x_t = load_rows(tq, j, last_query, head, H, D, LOGITS, OWN)
        n, n_t = load_geometry(direction, tn, j, last_query, ANGLES, OWN)
        norm = tl.load(lse + (j + row) * H + head, mask=row < last_query - j, other=0.0)
        sums, mean, shift = row_tangents(
            x, x_t, n, n_t, norm, k, tk, v, tv, log_envelope, tb, direction, tn, first_key, last_key, head, scale,
            H, D, LOGITS, VALUES, ANGLES, TURNED, BIAS, PRECISION, OWN, OTHER,
        )  # fmt: skip
        o = load_rows(out, j, last_query, head, H, D, VALUES, OWN)
        g = load_rows(grad_out, j, last_query, head, H, D, VALUES, OWN)
        out_t = ()
        for chunk in tl.static_range(count(VALUES)):
            out_t = out_t + (sums[chunk] - mean[:, None] * o[chunk].to(tl.float32),)
        mean += shift
        d, d_t = row_dot(g, o, VALUES, OWN), row_dot(g, out_t, VALUES, OWN)
        store_rows(grad_grad_out, out_t, 1.0, j, last_query, head, H, D, VALUES, OWN)
        store_tokens(dots + plane, d, j, last_query, OWN)
        store_tokens(means + plane, mean, j, last_query, OWN)
        store_tokens(dots_t + plane, d_t, j, last_query, OWN)
        sums, turn = row_gradients(
            x, x_t, n, n_t, g, norm, d, mean, d_t, k, tk, v, tv, log_envelope, tb, direction, tn, first_key, last_key,
            head, scale, H, D, LOGITS, VALUES, ANGLES, TURNED, BIAS, PRECISION, OWN, OTHER,
        )  # fmt: skip
        store_rows(gq, sums, scale, j, last_query, head, H, D, LOGITS, OWN)
        if ANGLES:
            store_vectors(gn + plane * 3, turn, scale, j, last_query, OWN)


@autotuned(2)
@triton.jit(do_not_specialize=["neighborhoods", "num_queries", "num_keys"], do_not_specialize_on_alignment=["gn"])
def double_backward_columns(
    tq, tk, tv, tb, tn, grad_out, q, k, v, log_envelope, direction, query_offsets, key_offsets, neighborhoods, lse,
    dots, means, dots_t, gk, gv, gb, gn, scale, num_queries, num_keys,
    H: tl.constexpr, D: tl.constexpr, LOGITS: tl.constexpr, VALUES: tl.constexpr, ANGLES: tl.constexpr,
    TURNED: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr,
    OTHER: tl.constexpr, OWN_SIZE: tl.constexpr, OTHER_SIZE: tl.constexpr,
):  # fmt: skip
    """Writes ``gk``, ``gv``, each head's share of ``gb``, ``(H, T)``, and the column part of ``gn``, ``(H, T, 3)``."""
    head = tl.program_id(1)
    queries, keys = head.to(tl.int64) * num_queries, head.to(tl.int64) * num_keys
    owner, first_key, last_key = owned_tokens(key_offsets, neighborhoods, SPLIT, OWN)
    first_query = tl.load(query_offsets + owner)
    last_query = tl.load(query_offsets + owner + 1)
    column = tl.arange(0, OTHER)
    for i in tl.range(first_key, last_key, OWN, disable_licm=True):
        y = load_rows(k, i, last_key, head, H, D, LOGITS, OWN)
        y_t = load_rows(tk, i, last_key, head, H, D, LOGITS, OWN)
        m, m_t = load_geometry(direction, tn, i, last_key, ANGLES, OWN)
        w = load_rows(v, i, last_key, head, H, D, VALUES, OWN)
        w_t = load_rows(tv, i, last_key, head, H, D, VALUES, OWN)
        bias, bias_t = load_bias(log_envelope, tb, i, last_key, BIAS, OWN)
        sums, sums_v = zero_rows(LOGITS, OWN), zero_rows(VALUES, OWN)
        sum_b, turn = tl.zeros([OWN], tl.float32), zero_vectors(OWN)
        for j in tl.range(first_query, last_query, OTHER, disable_licm=True):
            n, n_t = load_geometry(direction, tn, j, last_query, ANGLES, OTHER)
            logits, logits_t, slope, slope_t = pair_tangents(
                y, y_t, q, tq, j, last_query, head, m, m_t, n, n_t, H, D, LOGITS, ANGLES, TURNED,
                "logits", PRECISION, OWN, OTHER,
            )  # fmt: skip
            norm = tl.load(lse + (j + column) * H + head, mask=column < last_query - j, other=0.0)
            p = tl.exp(logits * scale + bias[:, None] - norm[None, :])
            p = tl.where((column < last_query - j)[None, :], p, 0.0)
            mean = load_tokens(means + queries, j, last_query, OTHER)
            p_t = p * (logits_t * scale + bias_t[:, None] - mean[None, :])
            sums_v = add_tangent_rows(
                sums_v, p, p_t, grad_out, grad_out, j, last_query, head, m, m_t, n, n_t, H, D, VALUES, TURNED, TURNED,
                "columns", PRECISION, OTHER,
            )  # fmt: skip
            e, e_t, slope_v, slope_v_t = pair_tangents(
                w, w_t, grad_out, grad_out, j, last_query, head, m, m_t, n, n_t, H, D, VALUES, TURNED, TURNED,
                "columns", PRECISION, OWN, OTHER,
            )  # fmt: skip
            e -= load_tokens(dots + queries, j, last_query, OTHER)[None, :]
            e_t -= load_tokens(dots_t + queries, j, last_query, OTHER)[None, :]
            r, r_t = p * e, p_t * e + p * e_t
            sum_b += tl.sum(r_t, 1)
            sums = add_tangent_rows(
                sums, r, r_t, q, tq, j, last_query, head, m, m_t, n, n_t, H, D, LOGITS, ANGLES, TURNED,
                "logits", PRECISION, OTHER,
            )  # fmt: skip
            if ANGLES:
                turn = add_turns(turn, r, r_t, slope, slope_t, n, n_t)
                if TURNED:
                    turn = add_turns(turn, p / scale, p_t / scale, slope_v, slope_v_t, n, n_t)
        store_rows(gk, sums, scale, i, last_key, head, H, D, LOGITS, OWN)
        store_rows(gv, sums_v, 1.0, i, last_key, head, H, D, VALUES, OWN)
        if BIAS:
            store_tokens(gb + keys, sum_b, i, last_key, OWN)
        if ANGLES:
            store_vectors(gn + keys * 3, turn, scale, i, last_key, OWN)
