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

template <class T, bool angular>
void forward_head(Worker<T>& w, long head) {
    w.pack(w.q, w.p.q, w.q0 + w.j0, w.Jn, w.Jn, head, T(w.p.scale), w.mask_of_rows());
    w.pack_keys(w.k, w.kT, w.p.k, head, w.mask());
    w.pack_keys(w.v, nullptr, w.p.v, head, nullptr);
    w.template each_logit<angular, false>(
        [&](long row, long column, const Vec<T>* a, const Vec<T>*) ESCAIP_LAMBDA {
            Vec<T> logit = a[0];
            if constexpr (angular) logit = Legendre<T>(load(w.cosine + row * w.Mp + column)).values(a);
            store<T>(w.P + row * w.Mp + column, logit + load(w.bias + column));
        });
    softmax_rows(w, head);
    product<T>(w.Jn, w.dp / lanes<T>, w.M, w.P, w.Mp, 1, w.v, w.dp, w.rows, w.dp, false);
    for (long j = 0; j < w.Jn; ++j) {
        w.unpack(w.p.to_out, w.rows + j * w.dp, w.q0 + w.j0 + j, 1, head, T(1) / w.of_row[j], nullptr, false);
    }
}

template <class T, bool angular>
void forward(Worker<T>& w) {
    const long rows = block_rows<T>(w.J, w.Mp);
    while (w.next_block(rows)) {
        if (angular) w.cosines(w.cosine, w.Jn, w.Mp, w.nT + w.j0, w.nT, nullptr, nullptr);
        for (long head = 0; head < w.heads; ++head) forward_head<T, angular>(w, head);
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

// Gradients of q and k of a head through the logits: Σ_k X_l k (+ Y_l tk) and Σ_j X_l q (+ Y_l tq) for each group.
template <class T, bool angular, bool tangent>
void add_products(Worker<T>& w, long head) {
    constexpr long L = lanes<T>;
    const long last = w.start[MOST_GROUPS];
    std::fill(w.R + w.Jn * w.Mp, w.R + w.Jp * w.Mp, T(0));  // what memory holds there could be denormal, which is slow
    transpose<T>(w.R, w.Mp, w.Jp, w.Mp, w.RT, w.Jp);
    if (tangent) std::fill(w.dR + w.Jn * w.Mp, w.dR + w.Jp * w.Mp, T(0));
    if (tangent) transpose<T>(w.dR, w.Mp, w.Jp, w.Mp, w.dRT, w.Jp);
    T *to_k = w.kT, *to_q = w.vT;  // their contents are no longer needed; channels beyond the groups are cleared
    std::fill(to_k + last * w.Mp, to_k + w.dp * w.Mp, T(0));
    std::fill(to_q + last * w.Jp, to_q + w.dp * w.Jp, T(0));
    for (long l = 0; l < (angular ? MOST_GROUPS : 1); ++l) {
        const long width = w.width(l), c = w.start[l];
        if (width == 0) continue;
        const T *X = tangent ? w.dR : w.R, *XT = tangent ? w.dRT : w.RT, *Y = w.R, *YT = w.RT;
        if (angular && l > 0) {
            weigh<T, tangent>(l, w.Jn * w.Mp, w.R, w.dR, w.cosine, w.dcosine, w.X, w.Y);
            weigh<T, tangent>(l, w.M * w.Jp, w.RT, w.dRT, w.cosineT, w.dcosineT, w.XT, w.YT);
            X = w.X, XT = w.XT, Y = w.Y, YT = w.YT;
        }
        product<T>(width, w.Mp / L, w.Jn, w.q + c, 1, w.dp, X, w.Mp, to_k + c * w.Mp, w.Mp, false);
        product<T>(width, w.Jp / L, w.M, w.k + c, 1, w.dp, XT, w.Jp, to_q + c * w.Jp, w.Jp, false);
        if (tangent) {
            product<T>(width, w.Mp / L, w.Jn, w.tq + c, 1, w.dp, Y, w.Mp, to_k + c * w.Mp, w.Mp, true);
            product<T>(width, w.Jp / L, w.M, w.tk + c, 1, w.dp, YT, w.Jp, to_q + c * w.Jp, w.Jp, true);
        }
    }
    transpose<T>(to_k, w.Mp, w.dp, w.Mp, w.rows, w.dp);
    w.unpack(w.p.to_k, w.rows, w.k0, w.M, head, T(1), w.mask(), w.j0 > 0);
    transpose<T>(to_q, w.Jp, w.dp, w.Jp, w.rows, w.dp);
    w.unpack(w.p.to_q, w.rows, w.q0 + w.j0, w.Jn, head, T(w.p.scale), w.mask_of_rows(), false);
}

// Σ_j t_jk G_j to the rows of `to`.
template <class T>
void add_value_gradient(Worker<T>& w, T* to, const T* tile, long head) {
    product<T>(w.M, w.dp / lanes<T>, w.Jn, tile, 1, w.Mp, w.g, w.dp, w.rows, w.dp, false);
    w.unpack(to, w.rows, w.k0, w.M, head, T(1), nullptr, w.j0 > 0);
}

template <class T>
void dots_with_output(Worker<T>& w, long head) {  // D_j = G_j · out_j
    for (long j = 0; j < w.Jn; ++j) {
        const long at = ((w.q0 + w.j0 + j) * w.heads + head) * w.d;
        w.of_row[j] = dot(w.p.grad_out + at, w.p.out + at, w.d);
    }
}

template <class T, bool angular>
void backward_head(Worker<T>& w, long head) {
    const long Mp = w.Mp;
    const T* lse = w.p.lse + (w.q0 + w.j0) * w.heads + head;
    w.pack(w.q, w.p.q, w.q0 + w.j0, w.Jn, w.Jn, head, T(w.p.scale), w.mask_of_rows());
    w.pack(w.g, w.p.grad_out, w.q0 + w.j0, w.Jn, w.Jn, head, T(1), nullptr);
    w.pack_keys(w.k, w.kT, w.p.k, head, w.mask());
    w.pack_keys(w.v, w.vT, w.p.v, head, nullptr);
    dots_with_output(w, head);
    w.template each_logit<angular, false>(
        [&](long row, long column, const Vec<T>* a, const Vec<T>*) ESCAIP_LAMBDA {
            const long at = row * Mp + column;
            Vec<T> logit = a[0];
            if constexpr (angular) {
                const Legendre<T> legendre(load(w.cosine + at));
                logit = legendre.values(a);
                store<T>(w.X + at, legendre.slopes(a));
            }
            store<T>(w.P + at, exponential<T>(logit + load(w.bias + column) - lse[row * w.heads]));
        });
    w.template each_value_product<false>([&](long row, long column, Vec<T> e, Vec<T>) ESCAIP_LAMBDA {
        const long at = row * Mp + column;
        const Vec<T> r = load(w.P + at) * (e - w.of_row[row]);
        store<T>(w.R + at, r);
        store<T>(w.db + column, load(w.db + column) + r);
        if constexpr (angular) store<T>(w.C + at, load(w.C + at) + r * load(w.X + at));
    });
    add_value_gradient(w, w.p.to_v, w.P, head);
    add_products<T, angular, false>(w, head);
}

// Cosines of the block and, for gradients, their transposes: the block itself where it holds all queries.
template <class T>
void block_cosines(Worker<T>& w, bool tangent, T* own_transpose, T* own_tangent_transpose) {
    w.cosines(w.cosine, w.Jn, w.Mp, w.nT + w.j0, w.nT, nullptr, nullptr);
    if (tangent) w.cosines(w.dcosine, w.Jn, w.Mp, w.tnT + w.j0, w.nT, w.nT + w.j0, w.tnT);
    const bool whole = w.Jn == w.J;
    w.cosineT = whole ? w.cosine : own_transpose;
    if (!whole) w.cosines(w.cosineT, w.M, w.Jp, w.nT, w.nT + w.j0, nullptr, nullptr);
    if (!tangent) return;
    w.dcosineT = whole ? w.dcosine : own_tangent_transpose;
    if (!whole) w.cosines(w.dcosineT, w.M, w.Jp, w.tnT, w.nT + w.j0, w.nT, w.tnT + w.j0);
}

template <class T, bool angular>
void backward(Worker<T>& w) {
    const long rows = block_rows<T>(w.J, w.Mp);
    T* own_transpose = w.cosineT;
    while (w.next_block(rows)) {
        if (angular) {
            block_cosines(w, false, own_transpose, w.dcosineT);
            std::fill_n(w.C, w.Jn * w.Mp, T(0));
        }
        for (long head = 0; head < w.heads; ++head) backward_head<T, angular>(w, head);
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
    w.template each_logit<angular, true>(
        [&](long row, long column, const Vec<T>* a, const Vec<T>* t) ESCAIP_LAMBDA {
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

template <class T, bool angular>
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
    product<T>(w.Jn, w.dp / lanes<T>, w.M, w.dP, Mp, 1, w.v, w.dp, w.rows, w.dp, false);
    product<T>(w.Jn, w.dp / lanes<T>, w.M, w.P, Mp, 1, w.tv, w.dp, w.rows, w.dp, true);
    w.unpack(w.p.to_out, w.rows, first, w.Jn, head, T(1), nullptr, false);
    T* dD = w.sums;  // of_row is D
    for (long j = 0; j < w.Jn; ++j) dD[j] = dot(w.g + j * w.dp, w.rows + j * w.dp, w.dp);
    w.template each_value_product<true>([&](long row, long column, Vec<T> e, Vec<T> de) ESCAIP_LAMBDA {
        const long at = row * Mp + column;
        const Vec<T> centred = e - w.of_row[row], probability = load(w.P + at);
        const Vec<T> r = probability * centred;
        const Vec<T> dr = load(w.dP + at) * centred + probability * (de - dD[row]);
        store<T>(w.R + at, r);
        store<T>(w.dR + at, dr);
        store<T>(w.db + column, load(w.db + column) + dr);
        if constexpr (angular) {
            const Vec<T> slopes = load(w.X + at);
            store<T>(w.C + at, load(w.C + at) + r * slopes);
            store<T>(w.dC + at, load(w.dC + at) + dr * slopes + r * load(w.Y + at));
        }
    });
    add_value_gradient(w, w.p.to_v, w.dP, head);
    add_products<T, angular, true>(w, head);
}

template <class T, bool angular>
void double_backward(Worker<T>& w) {
    const long rows = block_rows<T>(w.J, w.Mp);
    T *own_transpose = w.cosineT, *own_tangent_transpose = w.dcosineT;
    while (w.next_block(rows)) {
        if (angular) {
            block_cosines(w, true, own_transpose, own_tangent_transpose);
            std::fill_n(w.C, w.Jn * w.Mp, T(0));
            std::fill_n(w.dC, w.Jn * w.Mp, T(0));
        }
        for (long head = 0; head < w.heads; ++head) double_backward_head<T, angular>(w, head);
        if (angular) {
            w.add_to_directions(w.dC, w.nT);
            w.add_to_directions(w.C, w.tnT);
        }
    }
    w.cosineT = own_transpose, w.dcosineT = own_tangent_transpose;
}

}  // namespace escaip
