// Value, first and second derivative for one neighborhood with any number of queries.
#pragma once

#include "worker.h"

namespace escaip {

// Turns logits in P into exp(S − largest of the row); of_row gets the sum, the log normaliser is stored.
template <class T>
void softmax_rows(const Worker<T>& w, long head) {
    constexpr long L = lanes<T>;
    for (long j = 0; j < w.Jn; ++j) {
        T* row = w.P + j * w.Mp;
        Vec<T> most = load(row);
        for (long c = L; c < w.Mp; c += L) {
            const Vec<T> s = load(row + c);
            most = s > most ? s : most;
        }
        const T top = largest<T>(most);
        Vec<T> total = zeros<T>();
        for (long c = 0; c < w.Mp; c += L) {
            const Vec<T> e = exponential<T>(load(row + c) - top);
            store<T>(row + c, e);
            total += e;
        }
        w.of_row[j] = sum<T>(total);
        w.p.to_lse[(w.q0 + w.j0 + j) * w.heads + head] = top + std::log(w.of_row[j]);
    }
}

// X_l = R P_l, or (second derivative) X_l = dR P_l + R dc P_l' with Y_l = R P_l, over n rows of `columns`.
template <class T, bool tangent>
void weigh(
    long l, long n, const T* R, const T* dR, const T* cosine, const T* dcosine, T* X, T* Y) {
    for (long i = 0; i < n; i += lanes<T>) {
        const Legendre<T> legendre(load(cosine + i));
        const Vec<T> r = load(R + i), value = legendre.value(l);
        if constexpr (tangent) {
            store<T>(X + i, load(dR + i) * value + r * load(dcosine + i) * legendre.slope(l));
            store<T>(Y + i, r * value);
        } else {
            store<T>(X + i, r * value);
        }
    }
}

// For each group, Σ_j X_l q (+ Y_l tq) to the rows of `to_k` and Σ_k X_l k (+ Y_l tk) to those of `to_q`, a row for each channel;
// without angles one group. A null pointer stands for a side, or a tangent, that there is not.
template <class T, bool angular, bool tangent>
void group_sums(
    Worker<T>& w, T* R, T* dR, const T* q, const T* tq, const T* k, const T* tk, T* to_q, T* to_k) {
    constexpr long L = lanes<T>;
    const long last = w.start[MOST_GROUPS];
    if (to_q) {
        std::fill(R + w.Jn * w.Mp, R + w.Jp * w.Mp, T(0));  // what memory holds there could be denormal, which is slow
        transpose<T>(R, w.Mp, w.Jp, w.Mp, w.RT, w.Jp);
        if (tangent) std::fill(dR + w.Jn * w.Mp, dR + w.Jp * w.Mp, T(0));
        if (tangent) transpose<T>(dR, w.Mp, w.Jp, w.Mp, w.dRT, w.Jp);
        std::fill(to_q + last * w.Jp, to_q + w.dp * w.Jp, T(0));  // channels beyond the groups
    }
    if (to_k) std::fill(to_k + last * w.Mp, to_k + w.dp * w.Mp, T(0));
    for (long l = 0; l < (angular ? MOST_GROUPS : 1); ++l) {
        const long width = w.width(l), c = w.start[l];
        const bool weighted = angular && l > 0;
        if (width == 0) continue;
        if (to_k) {
            if (weighted) weigh<T, tangent>(l, w.Jn * w.Mp, R, dR, w.cosine, w.dcosine, w.X, w.Y);
            const T *X = weighted ? w.X : tangent ? dR : R, *Y = weighted ? w.Y : R;
            product<T>(width, w.Mp / L, w.Jn, q + c, 1, w.dp, X, w.Mp, to_k + c * w.Mp, w.Mp, false);
            if (tq) product<T>(width, w.Mp / L, w.Jn, tq + c, 1, w.dp, Y, w.Mp, to_k + c * w.Mp, w.Mp, true);
        }
        if (to_q) {
            if (weighted) weigh<T, tangent>(l, w.M * w.Jp, w.RT, w.dRT, w.cosineT, w.dcosineT, w.XT, w.YT);
            const T *X = weighted ? w.XT : tangent ? w.dRT : w.RT, *Y = weighted ? w.YT : w.RT;
            product<T>(width, w.Jp / L, w.M, k + c, 1, w.dp, X, w.Jp, to_q + c * w.Jp, w.Jp, false);
            if (tk) product<T>(width, w.Jp / L, w.M, tk + c, 1, w.dp, Y, w.Jp, to_q + c * w.Jp, w.Jp, true);
        }
    }
}

// Gradients of q and k of a head through the logits.
template <class T, bool angular, bool tangent>
void add_products(Worker<T>& w, long head) {
    T *to_k = w.kT, *to_q = w.vT;  // their contents are no longer needed
    const T *tq = tangent ? w.tq : nullptr, *tk = tangent ? w.tk : nullptr;
    group_sums<T, angular, tangent>(w, w.R, w.dR, w.q, tq, w.k, tk, to_q, to_k);
    transpose<T>(to_k, w.Mp, w.dp, w.Mp, w.rows, w.dp);
    w.unpack(w.p.to_k, w.rows, w.k0, w.M, head, T(1), w.mask(), w.j0 > 0);
    transpose<T>(to_q, w.Jp, w.dp, w.Jp, w.rows, w.dp);
    w.unpack(w.p.to_q, w.rows, w.q0 + w.j0, w.Jn, head, T(w.p.scale), w.mask_of_rows(), false);
}

// Gradients of v of a head: Σ_j p G_j, or Σ_j ṗ G_j, times P_l where values turn.
template <class T, bool turned, bool tangent>
void add_value_gradient(Worker<T>& w, long head) {
    if constexpr (turned) {
        group_sums<T, true, tangent>(w, w.P, w.dP, w.g, nullptr, nullptr, nullptr, nullptr, w.kT);
        transpose<T>(w.kT, w.Mp, w.dp, w.Mp, w.rows, w.dp);
    } else {
        const T* tile = tangent ? w.dP : w.P;
        product<T>(w.M, w.dp / lanes<T>, w.Jn, tile, 1, w.Mp, w.g, w.dp, w.rows, w.dp, false);
    }
    w.unpack(w.p.to_v, w.rows, w.k0, w.M, head, T(1), nullptr, w.j0 > 0);
}

template <class T, bool angular, bool turned>
void forward_head(Worker<T>& w, long head) {
    w.pack(w.q, w.p.q, w.q0 + w.j0, w.Jn, w.Jn, head, T(w.p.scale), w.mask_of_rows());
    w.pack_keys(w.k, w.kT, w.p.k, head, w.mask());
    w.pack_keys(w.v, nullptr, w.p.v, head, nullptr);
    w.template each_product<angular, false>(
        w.q, nullptr, w.kT, nullptr, w.width(0), [&](long row, long column, const Vec<T>* a, const Vec<T>*) ESCAIP_LAMBDA {
            Vec<T> logit = a[0];
            if constexpr (angular) logit = Legendre<T>(load(w.cosine + row * w.Mp + column)).values(a);
            store<T>(w.P + row * w.Mp + column, logit + load(w.bias + column));
        });
    softmax_rows(w, head);
    if constexpr (turned) {
        group_sums<T, true, false>(w, w.P, nullptr, nullptr, nullptr, w.v, nullptr, w.sums, nullptr);
        transpose<T>(w.sums, w.Jp, w.dp, w.Jp, w.rows, w.dp);
    } else {
        product<T>(w.Jn, w.dp / lanes<T>, w.M, w.P, w.Mp, 1, w.v, w.dp, w.rows, w.dp, false);
    }
    for (long j = 0; j < w.Jn; ++j) {
        w.unpack(w.p.to_out, w.rows + j * w.dp, w.q0 + w.j0 + j, 1, head, T(1) / w.of_row[j], nullptr, false);
    }
}

// Cosines of the block and, for sums over its rows and columns, their transposes: the block itself where it holds all
// queries.
template <class T>
void block_cosines(Worker<T>& w, bool transposed, bool tangent, T* own_transpose, T* own_tangent_transpose) {
    w.cosines(w.cosine, w.Jn, w.Mp, w.j0, 0);
    if (tangent) w.tangents_of_cosines(w.dcosine, w.Jn, w.Mp, w.j0, 0);
    if (!transposed) return;
    const bool whole = w.Jn == w.J;
    w.cosineT = whole ? w.cosine : own_transpose;
    if (!whole) w.cosines(w.cosineT, w.M, w.Jp, 0, w.j0);
    if (!tangent) return;
    w.dcosineT = whole ? w.dcosine : own_tangent_transpose;
    if (!whole) w.tangents_of_cosines(w.dcosineT, w.M, w.Jp, 0, w.j0);
}

template <class T, bool angular, bool turned>
void forward(Worker<T>& w) {
    const long rows = block_rows<T>(w.J, w.Mp);
    T* own_transpose = w.cosineT;
    while (w.next_block(rows)) {
        if (angular) block_cosines(w, turned, false, own_transpose, own_transpose);
        for (long head = 0; head < w.heads; ++head) forward_head<T, angular, turned>(w, head);
    }
    w.cosineT = own_transpose;
}

template <class T>
void dots_with_output(Worker<T>& w, long head) {  // D_j = G_j · out_j
    for (long j = 0; j < w.Jn; ++j) {
        const long at = ((w.q0 + w.j0 + j) * w.heads + head) * w.d;
        w.of_row[j] = dot(w.p.grad_out + at, w.p.out + at, w.d);
    }
}

template <class T, bool angular, bool turned>
void backward_head(Worker<T>& w, long head) {
    const long Mp = w.Mp;
    const T* lse = w.p.lse + (w.q0 + w.j0) * w.heads + head;
    w.pack(w.q, w.p.q, w.q0 + w.j0, w.Jn, w.Jn, head, T(w.p.scale), w.mask_of_rows());
    w.pack(w.g, w.p.grad_out, w.q0 + w.j0, w.Jn, w.Jn, head, T(1), nullptr);
    w.pack_keys(w.k, w.kT, w.p.k, head, w.mask());
    w.pack_keys(w.v, w.vT, w.p.v, head, nullptr);
    dots_with_output(w, head);
    w.template each_product<angular, false>(
        w.q, nullptr, w.kT, nullptr, w.width(0), [&](long row, long column, const Vec<T>* a, const Vec<T>*) ESCAIP_LAMBDA {
            const long at = row * Mp + column;
            Vec<T> logit = a[0];
            if constexpr (angular) {
                const Legendre<T> legendre(load(w.cosine + at));
                logit = legendre.values(a);
                store<T>(w.X + at, legendre.slopes(a));
            }
            store<T>(w.P + at, exponential<T>(logit + load(w.bias + column) - lse[row * w.heads]));
        });
    w.template each_product<turned, false>(
        w.g, nullptr, w.vT, nullptr, w.d, [&](long row, long column, const Vec<T>* b, const Vec<T>*) ESCAIP_LAMBDA {
            const long at = row * Mp + column;
            const Vec<T> probability = load(w.P + at);
            Vec<T> e = b[0], of_cosine;
            if constexpr (turned) {
                const Legendre<T> legendre(load(w.cosine + at));
                e = legendre.values(b);
                of_cosine = probability * legendre.slopes(b);
            }
            const Vec<T> r = probability * (e - w.of_row[row]);
            store<T>(w.R + at, r);
            store<T>(w.db + column, load(w.db + column) + r);
            if constexpr (angular) {
                Vec<T> c = load(w.C + at) + r * load(w.X + at);
                if constexpr (turned) c += of_cosine;
                store<T>(w.C + at, c);
            }
        });
    add_value_gradient<T, turned, false>(w, head);
    add_products<T, angular, false>(w, head);
}

template <class T, bool angular, bool turned>
void backward(Worker<T>& w) {
    const long rows = block_rows<T>(w.J, w.Mp);
    T* own_transpose = w.cosineT;
    while (w.next_block(rows)) {
        if (angular) {
            block_cosines(w, true, false, own_transpose, own_transpose);
            std::fill_n(w.C, w.Jn * w.Mp, T(0));
        }
        for (long head = 0; head < w.heads; ++head) backward_head<T, angular, turned>(w, head);
        if (angular) w.add_to_directions(w.C, w.nT);
    }
    w.cosineT = own_transpose;
}

// p Ṡ in dP to ṗ = p (Ṡ − μ); P and dP as they come from the logits.
template <class T>
void tangent_of_softmax(Worker<T>& w) {
    constexpr long L = lanes<T>;
    for (long j = 0; j < w.Jn; ++j) {
        const T *probability = w.P + j * w.Mp;
        T* tangent = w.dP + j * w.Mp;
        Vec<T> total = zeros<T>();
        for (long c = 0; c < w.Mp; c += L) total += load(probability + c) * load(tangent + c);
        const T mu = sum<T>(total);
        for (long c = 0; c < w.Mp; c += L) {
            store<T>(tangent + c, load(probability + c) * (load(tangent + c) - mu));
        }
    }
}

template <class T, bool angular>
void tangent_logits(Worker<T>& w, long head) {  // P, dP = Ṡ; X = Σ P' A, Y = its tangent
    const long Mp = w.Mp;
    const T* lse = w.p.lse + (w.q0 + w.j0) * w.heads + head;
    w.template each_product<angular, true>(
        w.q, w.tq, w.kT, w.tkT, w.width(0), [&](long row, long column, const Vec<T>* a, const Vec<T>* t) ESCAIP_LAMBDA {
            const long at = row * Mp + column;
            Vec<T> logit = a[0], tangent = t[0];
            if constexpr (angular) {
                const Legendre<T> legendre(load(w.cosine + at));
                const Vec<T> dcosine = load(w.dcosine + at), slopes = legendre.slopes(a);
                logit = legendre.values(a);
                tangent = legendre.values(t) + dcosine * slopes;
                store<T>(w.X + at, slopes);
                store<T>(w.Y + at, legendre.slopes(t) + dcosine * legendre.curvatures(a));
            }
            store<T>(w.P + at, exponential<T>(logit + load(w.bias + column) - lse[row * w.heads]));
            store<T>(w.dP + at, tangent + load(w.tbias + column));
        });
}

template <class T, bool angular, bool turned>
void double_backward_head(Worker<T>& w, long head) {
    const long Mp = w.Mp, first = w.q0 + w.j0;
    w.pack(w.q, w.p.q, first, w.Jn, w.Jn, head, T(w.p.scale), w.mask_of_rows());
    w.pack(w.tq, w.p.tq, first, w.Jn, w.Jn, head, T(w.p.scale), w.mask_of_rows());
    w.pack(w.g, w.p.grad_out, first, w.Jn, w.Jn, head, T(1), nullptr);
    w.pack_keys(w.k, w.kT, w.p.k, head, w.mask());
    w.pack_keys(w.tk, w.tkT, w.p.tk, head, w.mask());
    w.pack_keys(w.v, w.vT, w.p.v, head, nullptr);
    w.pack_keys(w.tv, w.tvT, w.p.tv, head, nullptr);
    dots_with_output(w, head);
    tangent_logits<T, angular>(w, head);
    tangent_of_softmax(w);
    if constexpr (turned) {
        group_sums<T, true, true>(w, w.P, w.dP, nullptr, nullptr, w.v, w.tv, w.kT, nullptr);
        transpose<T>(w.kT, w.Jp, w.dp, w.Jp, w.rows, w.dp);
    } else {
        product<T>(w.Jn, w.dp / lanes<T>, w.M, w.dP, Mp, 1, w.v, w.dp, w.rows, w.dp, false);
        product<T>(w.Jn, w.dp / lanes<T>, w.M, w.P, Mp, 1, w.tv, w.dp, w.rows, w.dp, true);
    }
    w.unpack(w.p.to_out, w.rows, first, w.Jn, head, T(1), nullptr, false);
    T* dD = w.sums;  // of_row is D
    for (long j = 0; j < w.Jn; ++j) dD[j] = dot(w.g + j * w.dp, w.rows + j * w.dp, w.dp);
    w.template each_product<turned, true>(
        w.g, nullptr, w.vT, w.tvT, w.d, [&](long row, long column, const Vec<T>* b, const Vec<T>* t) ESCAIP_LAMBDA {
            const long at = row * Mp + column;
            const Vec<T> probability = load(w.P + at), tangent = load(w.dP + at);
            Vec<T> e = b[0], de = t[0], of_cosine, tangent_of_cosine;
            if constexpr (turned) {
                const Legendre<T> legendre(load(w.cosine + at));
                const Vec<T> dcosine = load(w.dcosine + at), slopes = legendre.slopes(b);
                e = legendre.values(b);
                de = legendre.values(t) + dcosine * slopes;
                of_cosine = probability * slopes;
                tangent_of_cosine =
                    tangent * slopes + probability * (legendre.slopes(t) + dcosine * legendre.curvatures(b));
            }
            const Vec<T> centred = e - w.of_row[row];
            const Vec<T> r = probability * centred;
            const Vec<T> dr = tangent * centred + probability * (de - dD[row]);
            store<T>(w.R + at, r);
            store<T>(w.dR + at, dr);
            store<T>(w.db + column, load(w.db + column) + dr);
            if constexpr (angular) {
                const Vec<T> slopes = load(w.X + at);
                Vec<T> c = load(w.C + at) + r * slopes, dc = load(w.dC + at) + dr * slopes + r * load(w.Y + at);
                if constexpr (turned) c += of_cosine, dc += tangent_of_cosine;
                store<T>(w.C + at, c);
                store<T>(w.dC + at, dc);
            }
        });
    add_value_gradient<T, turned, true>(w, head);
    add_products<T, angular, true>(w, head);
}

template <class T, bool angular, bool turned>
void double_backward(Worker<T>& w) {
    const long rows = block_rows<T>(w.J, w.Mp);
    T *own_transpose = w.cosineT, *own_tangent_transpose = w.dcosineT;
    while (w.next_block(rows)) {
        if (angular) {
            block_cosines(w, true, true, own_transpose, own_tangent_transpose);
            std::fill_n(w.C, w.Jn * w.Mp, T(0));
            std::fill_n(w.dC, w.Jn * w.Mp, T(0));
        }
        for (long head = 0; head < w.heads; ++head) double_backward_head<T, angular, turned>(w, head);
        if (angular) {
            w.add_to_directions(w.dC, w.nT);
            w.add_to_directions(w.C, w.tnT);
        }
    }
    w.cosineT = own_transpose, w.dcosineT = own_tangent_transpose;
}

}  // namespace escaip
