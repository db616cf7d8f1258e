// The one matrix product of all the kernels, blocked in registers.
#pragma once

#include "simd.h"

namespace escaip {

constexpr long ROWS = 6, PANEL = ESCAIP_PANEL;

// out[r][v] = (add ? out[r][v] : 0) + Σ_t a[r · a_row + t · a_step] · b[t · b_step + v], for R rows and V vectors.
template <class T, int R, int V>
void block_product(
    const T* __restrict a, long a_row, long a_step, const T* __restrict b, long b_step, long terms, T* __restrict out,
    long out_row, bool add) {
    constexpr long L = lanes<T>;
    Vec<T> total[R][V];
    ESCAIP_UNROLL
    for (int r = 0; r < R; ++r) {
        ESCAIP_UNROLL
        for (int v = 0; v < V; ++v) total[r][v] = add ? load(out + r * out_row + v * L) : zeros<T>();
    }
    for (long t = 0; t < terms; ++t) {
        Vec<T> of_b[V];
        ESCAIP_UNROLL
        for (int v = 0; v < V; ++v) of_b[v] = load(b + t * b_step + v * L);
        ESCAIP_UNROLL
        for (int r = 0; r < R; ++r) {
            const T of_a = a[r * a_row + t * a_step];
            ESCAIP_UNROLL
            for (int v = 0; v < V; ++v) total[r][v] += of_a * of_b[v];
        }
    }
    ESCAIP_UNROLL
    for (int r = 0; r < R; ++r) {
        ESCAIP_UNROLL
        for (int v = 0; v < V; ++v) store<T>(out + r * out_row + v * L, total[r][v]);
    }
}

template <class T>
using BlockProduct = void (*)(const T*, long, long, const T*, long, long, T*, long, bool);

template <class T, std::size_t... i>
BlockProduct<T> pick_block(long index, std::index_sequence<i...>) {
    static constexpr BlockProduct<T> all[] = {block_product<T, int(i / PANEL) + 1, int(i % PANEL) + 1>...};
    return all[index];
}

template <class T>
BlockProduct<T> block_product_of(long rows, long panel) {
    return pick_block<T>((rows - 1) * PANEL + panel - 1, std::make_index_sequence<ROWS * PANEL>());
}

// Cuts `total` into the fewest pieces of at most `most`, as even as can be: 10 rows are 5 + 5 rather than 6 + 4.
struct Pieces {
    long count, size, larger;  // the first `larger` pieces hold one more
    Pieces(long total, long most) {
        count = (total + most - 1) / most;
        size = count ? total / count : 0;
        larger = count ? total % count : 0;
    }
    long operator[](long i) const { return size + (i < larger); }
};

// out (rows × vectors) from a (rows × terms, any strides) and b (terms × vectors).
template <class T>
void product(
    long rows, long vectors, long terms, const T* a, long a_row, long a_step, const T* b, long b_step, T* out,
    long out_row, bool add) {
    const Pieces panels(vectors, PANEL), blocks(rows, ROWS);
    for (long i = 0, v = 0; i < panels.count; v += panels[i], ++i) {
        for (long j = 0, r = 0; j < blocks.count; r += blocks[j], ++j) {
            block_product_of<T>(blocks[j], panels[i])(
                a + r * a_row, a_row, a_step, b + v * lanes<T>, b_step, terms, out + r * out_row + v * lanes<T>,
                out_row, add);
        }
    }
}

}  // namespace escaip
