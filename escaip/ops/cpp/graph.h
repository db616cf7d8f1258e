// The request for a graph, its result, and the check of its input.
//
// The C++ of the graph names no error: it refuses input that is not surely sound, and the plain operations that take over
// then say what is wrong.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "parallel.h"

namespace escaip {

enum Kind : int64_t { LIST = 0, RADIUS = 1, HARD = 2, SOFT = 3 };

struct GraphRequest {
    int64_t atoms, systems, threads, kind, num_neighbors, ranked, bump;
    int64_t edges;  // of a list that is given; −1 to search
    // In Å but for the scale of the envelope: reach of the lists, of a token, of a comparison, ...
    double cutoff, radius, support, rank_scale, envelope_scale, slack;
    const double *positions, *cell;
    const uint8_t* pbc;
    const int64_t *index, *ptr, *center, *neighbor, *shift;
};

// Arrays of a graph; a list of edges has center, neighbor and shift alone.
struct GraphArrays {
    int64_t *offsets, *center, *neighbor, *shift, *reverse, *self_token, *rank_token, *rank_other;
    double* rank_base;
};
struct GraphSizes {
    int64_t rows, tokens, compared, longest;  // longest: run of tokens
};

// Builds a graph, calls allocate with its sizes and fills the arrays; false where the plain operations must take over.
bool build_graph(const GraphRequest& p, const std::function<GraphArrays(const GraphSizes&)>& allocate);

// A translation in one number that orders like its three, each below 2²⁰ in size; the reverse of S is 2 · NO_SHIFT − S.
constexpr int64_t MOST_SHIFT = (int64_t(1) << 20) - 1;
constexpr int64_t pack(int64_t a, int64_t b, int64_t c) {
    return ((a + MOST_SHIFT) << 42) + ((b + MOST_SHIFT) << 21) + (c + MOST_SHIFT);
}
constexpr int64_t NO_SHIFT = pack(0, 0, 0);
constexpr int64_t component(int64_t shift, int axis) {
    return ((shift >> (42 - 21 * axis)) & ((int64_t(1) << 21) - 1)) - MOST_SHIFT;
}

// The list of an atom is itself, then its neighbors by key, neighbor, shift.
struct Entry {
    double distance;
    int64_t shift;
    int32_t neighbor, row;
};

// Whether a cell surely has volume along its periodic axes and few images within the cutoff. The plain check divides at
// 1e-12 and 1e7; these are so far on the safe side that rounding matters neither here nor in the search.
inline bool is_sound(const double* cell, const uint8_t* pbc, double cutoff) {
    double gram[3][3];
    for (int a = 0; a < 3; ++a) {
        for (int b = 0; b < 3; ++b) {
            gram[a][b] = a == b ? 1.0 - pbc[a] : 0.0;
            for (int c = 0; c < 3; ++c) gram[a][b] += cell[3 * a + c] * pbc[a] * (cell[3 * b + c] * pbc[b]);
        }
    }
    double minors[3], images = 1.0;
    for (int a = 0; a < 3; ++a) {
        const int b = (a + 1) % 3, c = (a + 2) % 3;
        minors[a] = gram[b][b] * gram[c][c] - gram[b][c] * gram[c][b];
    }
    const double determinant = gram[0][0] * minors[0] + gram[0][1] * (gram[1][2] * gram[2][0] - gram[1][0] * gram[2][2]) +
                               gram[0][2] * (gram[1][0] * gram[2][1] - gram[1][1] * gram[2][0]);
    if (!(determinant > 1e-6 * (gram[0][0] * gram[1][1] * gram[2][2]))) return false;
    for (int a = 0; a < 3; ++a) {
        if (pbc[a]) images *= 1.0 + 2.0 * cutoff * std::sqrt(std::max(0.0, minors[a] / determinant));
    }
    return images < 1e6;
}

inline bool is_sound(const GraphRequest& p) {
    if (p.atoms > std::numeric_limits<int32_t>::max() || p.ptr[0] != 0 || p.ptr[p.systems] != p.atoms) return false;
    bool periodic = false;
    for (int64_t s = 0; s < p.systems; ++s) {
        if (p.ptr[s] > p.ptr[s + 1] || p.ptr[s + 1] > p.atoms) return false;
        for (int64_t i = p.ptr[s]; i < p.ptr[s + 1]; ++i)
            if (p.index[i] != s) return false;
        for (int a = 0; a < 3; ++a) periodic |= p.pbc[3 * s + a] != 0;
    }
    for (int64_t i = 0; i < 3 * p.atoms; ++i)
        if (!std::isfinite(p.positions[i])) return false;
    for (int64_t s = 0; periodic && s < p.systems; ++s)
        if (!is_sound(p.cell + 9 * s, p.pbc + 3 * s, p.cutoff)) return false;
    return true;
}

// The same bits for a pair and its reverse, and for neighbors.py: no fused multiply-adds (flags in __init__.py), and the
// translation summed in its order.
inline double measure(const GraphRequest& p, int64_t i, int64_t j, const int64_t* shift) {
    const double *from = p.positions + 3 * i, *to = p.positions + 3 * j;
    double v[3] = {to[0] - from[0], to[1] - from[1], to[2] - from[2]};
    if (shift[0] | shift[1] | shift[2]) {
        const double *h = p.cell + 9 * p.index[i], a = double(shift[0]), b = double(shift[1]), c = double(shift[2]);
        for (int x = 0; x < 3; ++x) v[x] += a * h[x] + b * h[3 + x] + c * h[6 + x];
    }
    return std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
}

}  // namespace escaip
