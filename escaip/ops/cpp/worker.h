// What the kernels share: the problem, a thread's scratch memory, packing, and logits block by block.
//
// Symbols are those of docs/concepts/attention.md. One neighborhood at a time, its queries in blocks of rows, head by head: tiles
// are (rows of the block × keys), keys padded to whole vectors. Rows of self tokens, which have no direction, are packed
// with zeros in the channels of l ≥ 1, and their gradients there are cleared when stored: no mask in between. The factor
// `scale` is in the packed q.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention.h"
#include "gemm.h"

namespace escaip {

constexpr long TILE_ELEMENTS = 16384;  // a tile of more rows than this allows is cut, so that the tiles fit the cache
constexpr long LEAST_ROWS = 32;

// Rows that are worked on together.
template <class T>
long block_rows(long queries, long padded_keys) {
    if (queries * padded_keys <= TILE_ELEMENTS) return queries;
    return std::max(LEAST_ROWS, TILE_ELEMENTS / padded_keys / lanes<T> * lanes<T>);
}

// Hands out pieces of one allocation; counts only while it has no memory.
template <class T>
struct Arena {
    T* memory = nullptr;
    size_t used = 0;
    T* take(size_t count) {
        T* piece = memory ? memory + used : nullptr;
        used += (count + 15) / 16 * 16;
        return piece;
    }
};

template <class T>
struct Legendre {  // P_l, P_l' and P_l'' weights for l = 0 .. 4 at cosine c
    Vec<T> c, c2;
    ESCAIP_INLINE explicit Legendre(Vec<T> cosine) : c(cosine), c2(cosine * cosine) {}
    ESCAIP_INLINE Vec<T> value(long l) const {
        switch (l) {
            case 1: return c;
            case 2: return T(1.5) * c2 - T(0.5);
            case 3: return c * (T(2.5) * c2 - T(1.5));
            case 4: return (T(4.375) * c2 - T(3.75)) * c2 + T(0.375);
            default: return zeros<T>() + T(1);
        }
    }
    ESCAIP_INLINE Vec<T> slope(long l) const {
        switch (l) {
            case 1: return zeros<T>() + T(1);
            case 2: return T(3) * c;
            case 3: return T(7.5) * c2 - T(1.5);
            case 4: return c * (T(17.5) * c2 - T(7.5));
            default: return zeros<T>();
        }
    }
    // Σ_l P_l a_l and so on
    ESCAIP_INLINE Vec<T> values(const Vec<T>* a) const {
        return a[0] + c * a[1] + value(2) * a[2] + value(3) * a[3] + value(4) * a[4];
    }
    ESCAIP_INLINE Vec<T> slopes(const Vec<T>* a) const {
        return a[1] + slope(2) * a[2] + slope(3) * a[3] + slope(4) * a[4];
    }
    ESCAIP_INLINE Vec<T> curvatures(const Vec<T>* a) const {
        return T(3) * a[2] + T(15) * c * a[3] + (T(52.5) * c2 - T(7.5)) * a[4];
    }
};

template <class T>
struct Worker {
    static constexpr long L = lanes<T>, BLOCK = ROWS * PANEL * lanes<T>;

    const Problem<T>& p;
    const long heads, d, dp;  // dp: d padded to whole vectors
    long start[MOST_GROUPS + 1];
    // The neighborhood: first query, first key, queries, keys, padded keys. The block: first row, rows, padded rows.
    long q0 = 0, k0 = 0, J = 0, M = 0, Mp = 0, j0 = 0, Jn = 0, Jp = 0;
    T *bias, *tbias, *has_direction, *nT, *tnT;                          // of the neighborhood
    T *cosine, *dcosine, *cosineT, *dcosineT, *C, *dC;                   // tiles shared by the heads
    T *q, *tq, *g, *k, *tk, *v, *tv, *kT, *tkT, *vT, *tvT, *rows, *sums;  // of a head
    T *group_products, *tangent_products;                                // of a register block, for each l
    T *P, *dP, *R, *dR, *X, *Y, *XT, *YT, *RT, *dRT;                     // tiles of a head
    T *of_row, *db, *dn;

    Worker(const Problem<T>& problem, long most_tile, long most_keys, long order, Arena<T>& arena)
        : p(problem), heads(problem.heads), d(problem.head_size), dp(padded<T>(problem.head_size)) {
        start[0] = 0;
        for (long l = 0; l < MOST_GROUPS; ++l) start[l + 1] = start[l] + (l < p.groups ? p.widths[l] : 0);
        const long keys = padded<T>(most_keys);
        for (T** x : {&bias, &tbias, &has_direction, &of_row, &db}) *x = arena.take(keys);
        for (T** x : {&nT, &tnT, &dn}) *x = arena.take(3 * keys);
        for (T** x : {&q, &k, &v, &kT, &rows, &sums}) *x = arena.take(keys * dp);
        for (T** x : {&cosine, &P}) *x = arena.take(most_tile);
        for (T** x : {&group_products, &tangent_products}) *x = arena.take(MOST_GROUPS * BLOCK);
        if (order > 0 || p.angular_values) {
            for (T** x : {&cosineT, &XT, &RT}) *x = arena.take(most_tile);
        }
        if (order > 0) {
            for (T** x : {&g, &vT}) *x = arena.take(keys * dp);
            for (T** x : {&C, &R, &X, &dR}) *x = arena.take(most_tile);
        }
        if (order > 1) {
            for (T** x : {&tq, &tk, &tv, &tkT, &tvT}) *x = arena.take(keys * dp);
            for (T** x : {&dcosine, &dcosineT, &dC, &dP, &Y, &YT, &dRT}) *x = arena.take(most_tile);
        }
        if (arena.memory) {
            std::fill_n(group_products, MOST_GROUPS * BLOCK, T(0));
            std::fill_n(tangent_products, MOST_GROUPS * BLOCK, T(0));
        }
    }

    bool angles() const { return p.groups > 1; }
    long width(long l) const { return start[l + 1] - start[l]; }

    // ---- a neighborhood and a block of its rows -----------------------------------------------------------------

    void open(long i) {
        q0 = p.query_offsets[i], k0 = p.key_offsets[i];
        J = p.query_offsets[i + 1] - q0, M = p.key_offsets[i + 1] - k0, Mp = padded<T>(M);
        for (long key = 0; key < Mp; ++key) {
            const bool there = key < M;
            bias[key] = there ? (p.log_envelope ? p.log_envelope[k0 + key] : T(0)) : -std::numeric_limits<T>::infinity();
            tbias[key] = there && p.tb ? p.tb[k0 + key] : T(0);
            db[key] = 0;
        }
        j0 = Jn = 0;
        if (!angles()) return;
        for (long key = 0; key < Mp; ++key) {
            bool any = false;
            for (long x = 0; x < 3; ++x) {
                nT[x * Mp + key] = key < M ? p.direction[3 * (k0 + key) + x] : T(0);
                tnT[x * Mp + key] = key < M && p.tn ? p.tn[3 * (k0 + key) + x] : T(0);
                any = any || nT[x * Mp + key] != 0;
            }
            has_direction[key] = any;
            if (!any) tnT[key] = tnT[Mp + key] = tnT[2 * Mp + key] = 0;
        }
        std::fill_n(dn, 3 * Mp, T(0));
    }

    // Goes to the next block of rows; false after the last.
    bool next_block(long rows_of_block) {
        j0 = Jn == 0 ? 0 : j0 + Jn;
        Jn = std::min(rows_of_block, J - j0);
        Jp = padded<T>(Jn);
        if (Jn <= 0) Jn = 0;
        return Jn > 0;
    }

    // Cosines of rows and columns that begin at the tokens `first` and `other`. For angular values those of self tokens
    // are 1, where every P_l is: in the logits they meet channels that are zero.
    void cosines(T* out, long n, long columns, long first, long other) const {
        dots(out, n, columns, nT + first, nT + other, nullptr, nullptr);
        if (!p.angular_values) return;
        for (long r = 0; r < n; ++r) {
            const T directed = has_direction[first + r];
            for (long c = 0; c < columns; c += L) {
                T* at = out + r * columns + c;
                store<T>(at, load(at) + (T(1) - directed * load(has_direction + other + c)));
            }
        }
    }

    void tangents_of_cosines(T* out, long n, long columns, long first, long other) const {
        dots(out, n, columns, tnT + first, nT + other, nT + first, tnT + other);
    }

    // out[r][c] = a_r · b_c (+ ta_r · tb_c) for 3-vectors; a and b have stride Mp.
    void dots(T* out, long n, long columns, const T* a, const T* b, const T* ta, const T* tb_) const {
        for (long r = 0; r < n; ++r) {
            for (long c = 0; c < columns; c += L) {
                Vec<T> total = zeros<T>();
                for (long x = 0; x < 3; ++x) {
                    total += a[x * Mp + r] * load(b + x * Mp + c);
                    if (ta) total += ta[x * Mp + r] * load(tb_ + x * Mp + c);
                }
                store<T>(out + r * columns + c, total);
            }
        }
    }

    // Adds Σ_k t_jk x_k to dn_j and Σ_j t_jk x_j to dn_k.
    void add_to_directions(const T* tile, const T* xT) const {
        for (long x = 0; x < 3; ++x) {
            for (long j = 0; j < Jn; ++j) {
                const T of_j = xT[x * Mp + j0 + j];
                Vec<T> total = zeros<T>();
                for (long c = 0; c < Mp; c += L) {
                    const Vec<T> t = load(tile + j * Mp + c);
                    total += t * load(xT + x * Mp + c);
                    store<T>(dn + x * Mp + c, load(dn + x * Mp + c) + t * of_j);
                }
                dn[x * Mp + j0 + j] += sum<T>(total);
            }
        }
    }

    void close() const {
        if (p.to_b) std::copy_n(db, M, p.to_b + k0);
        if (!p.to_n) return;
        for (long key = 0; key < M; ++key) {
            const bool directed = has_direction[key] != 0;
            for (long x = 0; x < 3; ++x) p.to_n[3 * (k0 + key) + x] = directed ? dn[x * Mp + key] : T(0);
        }
    }

    // ---- rows of a head to and from the packed form ---------------------------------------------------------------

    // to (n × dp) = factor · rows; zero beyond d, in the rows up to `n_padded`, and for l ≥ 1 where `has` is 0.
    // Asks for the next head's part of each row, or of the next rows, so that it is there when its turn comes.
    void pack(T* to, const T* from, long first, long n, long n_padded, long head, T factor, const T* has) const {
        const long stride = heads * d, ahead = head + 1 < heads ? d : n * stride - head * d;
        from += first * stride + head * d;
        for (long r = 0; r < n; ++r) {
            T* row = to + r * dp;
            const T* source = from + r * stride;
            long c = 0;
            for (; c + L <= d; c += L) {
                store<T>(row + c, factor * load(source + c));
                __builtin_prefetch(source + ahead + c);
            }
            for (; c < d; ++c) row[c] = factor * source[c];
            for (; c < dp; ++c) row[c] = 0;
            if (has && has[r] == 0) std::fill(row + start[1], row + dp, T(0));
        }
        std::fill_n(to + n * dp, (n_padded - n) * dp, T(0));
    }

    void unpack(T* to, const T* from, long first, long n, long head, T factor, const T* has, bool add) const {
        to += (first * heads + head) * d;
        for (long r = 0; r < n; ++r) {
            const long take = has && has[r] == 0 ? start[1] : d;
            const T* row = from + r * dp;
            T* target = to + r * heads * d;
            long c = 0;
            if (add) {
                for (; c + L <= take; c += L) store<T>(target + c, load(target + c) + factor * load(row + c));
                for (; c < take; ++c) target[c] += factor * row[c];
            } else {
                for (; c + L <= take; c += L) store<T>(target + c, factor * load(row + c));
                for (; c < take; ++c) target[c] = factor * row[c];
                for (; c < d; ++c) target[c] = 0;
            }
        }
    }

    const T* mask() const { return angles() ? has_direction : nullptr; }
    const T* mask_of_rows() const { return angles() ? has_direction + j0 : nullptr; }

    void pack_keys(T* to, T* toT, const T* from, long head, const T* has) const {
        pack(to, from, k0, M, Mp, head, T(1), has);
        if (toT) transpose<T>(to, dp, Mp, dp, toT, Mp);
    }

    // ---- products block by block ----------------------------------------------------------------------------------

    // Calls fill(block product, row, column, vectors of the block) then each(row, column, place in the block).
    template <class Fill, class Each>
    ESCAIP_INLINE void each_block(const Fill& fill, const Each& each) const {
        const Pieces panels(Mp / L, PANEL), blocks(Jn, ROWS);
        for (long i = 0, v = 0; i < panels.count; v += panels[i], ++i) {
            for (long b = 0, row = 0; b < blocks.count; row += blocks[b], ++b) {
                fill(block_product_of<T>(blocks[b], panels[i]), row, v * L, panels[i] * L);
                for (long r = 0; r < blocks[b]; ++r) {
                    for (long c = 0; c < panels[i]; ++c) {
                        each(row + r, (v + c) * L, (r * panels[i] + c) * L);
                    }
                }
            }
        }
    }

    // each(row, column, products of a and b by group, their tangents); those of a group without channels are zero. One
    // group of `plain` channels without angles, whose place has channels always; no `ta` is a tangent of zero.
    template <bool angular, bool tangent, class Each>
    ESCAIP_INLINE void each_product(
        const T* a, const T* ta, const T* bT, const T* tbT, long plain, const Each& each) const {
        constexpr long groups = angular ? MOST_GROUPS : 1;
        each_block(
            [&](BlockProduct<T> product, long row, long column, long stride) {
                for (long l = 0; l < groups; ++l) {
                    const long terms = angular ? width(l) : plain, from = row * dp + start[l];
                    if (terms == 0) continue;
                    const T* b = bT + start[l] * Mp + column;
                    product(a + from, dp, 1, b, Mp, terms, group_products + l * BLOCK, stride, false);
                    if constexpr (tangent) {
                        T* to = tangent_products + l * BLOCK;
                        if (ta) product(ta + from, dp, 1, b, Mp, terms, to, stride, false);
                        product(a + from, dp, 1, tbT + start[l] * Mp + column, Mp, terms, to, stride, ta != nullptr);
                    }
                }
            },
            [&](long row, long column, long place) ESCAIP_LAMBDA {
                Vec<T> of_groups[groups], t[groups];
                ESCAIP_UNROLL
                for (long l = 0; l < groups; ++l) {
                    of_groups[l] = load(group_products + l * BLOCK + place);
                    if constexpr (tangent) t[l] = load(tangent_products + l * BLOCK + place);
                }
                each(row, column, of_groups, t);
            });
    }
};

}  // namespace escaip
