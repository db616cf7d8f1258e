// What enters a graph: the problem as Python lays it out, checks of it, and every pair of atoms once with its distance.
//
// Nothing here names an error. What is not surely sound is REFUSED, and the plain operations that then take over decide
// and say what is wrong.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace escaip {

enum Status : int64_t { DONE = 0, WANTS_PAIRS = 1, REFUSED = 2 };
enum Source : int64_t { SEARCH = 0, HALF = 1, FULL = 2 };
enum Kind : int64_t { LIST = 0, RADIUS = 1, HARD = 2, SOFT = 3 };

struct Problem {
    int64_t atoms, systems, pairs, threads;
    int64_t source, wide_shift, first_stride, second_stride;
    int64_t kind, num_neighbors, ranked, bump;
    // Å, but for the scale of the envelope: of the list, of a token, reach of a rank, ...
    double cutoff, radius, support, rank_scale, envelope_scale, slack;
    const double *positions, *cell;
    const uint8_t* pbc;
    const int64_t *index, *ptr, *first, *second;
    const void* shift;
};

struct Pair {
    double distance;
    int32_t first, second, shift[3];
};

template <class T>
std::unique_ptr<T[]> uninitialized(int64_t size) {
    return std::unique_ptr<T[]>(new T[size]);
}

// Calls task(i) for each i below count, in runs that threads take as they come.
template <class Task>
void in_parallel(int64_t count, int64_t threads, const Task& task) {
#ifdef _OPENMP
    constexpr int64_t RUN = 64;
    threads = std::min(threads, count / RUN);
    if (threads > 1) {
#pragma omp parallel for schedule(dynamic, RUN) num_threads(int(threads))
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) task(i);
}

// Whether a cell surely has volume along its periodic axes and few images within the cutoff. The plain check divides at
// 1e-12 and 1e7; these are so far on the safe side that rounding does not matter.
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
    if (!(determinant > 1e-11 * (gram[0][0] * gram[1][1] * gram[2][2]))) return false;
    for (int a = 0; a < 3; ++a) {
        if (pbc[a]) images *= 1.0 + 2.0 * cutoff * std::sqrt(std::max(0.0, minors[a] / determinant));
    }
    return images < 1e6;
}

inline bool is_sound(const Problem& p) {
    if (p.ptr[0] != 0 || p.ptr[p.systems] != p.atoms || p.atoms > std::numeric_limits<int32_t>::max()) return false;
    bool sound = true, periodic = false;
    for (int64_t s = 0; s < p.systems; ++s) {
        sound &= p.ptr[s] <= p.ptr[s + 1];
        for (int a = 0; a < 3; ++a) periodic |= p.pbc[3 * s + a] != 0;
    }
    for (int64_t i = 0; i < p.atoms; ++i) sound &= p.index[i] >= 0 && p.index[i] < p.systems;
    for (int64_t i = 0; i < 3 * p.atoms; ++i) sound &= std::isfinite(p.positions[i]);
    for (int64_t s = 0; sound && periodic && s < p.systems; ++s) {
        sound &= is_sound(p.cell + 9 * s, p.pbc + 3 * s, p.cutoff);
    }
    return sound;
}

// The same bits for a pair and its reverse: no fused multiply-adds (flags in build.py), and the translation as written
// in neighbors.py.
inline double measure(const Problem& p, const Pair& pair) {
    const double *from = p.positions + 3 * int64_t(pair.first), *to = p.positions + 3 * int64_t(pair.second);
    double v[3] = {to[0] - from[0], to[1] - from[1], to[2] - from[2]};
    const int32_t* s = pair.shift;
    if (s[0] | s[1] | s[2]) {
        const double* h = p.cell + 9 * p.index[pair.first];
        for (int c = 0; c < 3; ++c) v[c] += s[0] * h[c] + s[1] * h[3 + c] + s[2] * h[6 + c];
    }
    return std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
}

// Whether every system is open and small enough to look at all pairs.
inline bool is_direct(const Problem& p) {
    constexpr int64_t MOST = 400;
    bool direct = true;
    for (int64_t s = 0; s < p.systems; ++s) {
        direct &= p.ptr[s + 1] - p.ptr[s] <= MOST && !(p.pbc[3 * s] | p.pbc[3 * s + 1] | p.pbc[3 * s + 2]);
    }
    return direct;
}

inline void search(const Problem& p, std::vector<Pair>& pairs) {
    for (int64_t s = 0; s < p.systems; ++s) {
        for (int64_t i = p.ptr[s]; i < p.ptr[s + 1]; ++i) {
            for (int64_t j = i + 1; j < p.ptr[s + 1]; ++j) {
                Pair pair{0.0, int32_t(i), int32_t(j), {0, 0, 0}};
                pair.distance = measure(p, pair);
                if (pair.distance < p.cutoff) pairs.push_back(pair);
            }
        }
    }
}

// Of a list with both directions, the place of one of (i, j, S) and (j, i, −S); false unless that is half of them.
inline bool halve(const Problem& p, std::vector<int64_t>& half) {
    const auto* shift = static_cast<const int64_t*>(p.shift);
    half.reserve(p.pairs / 2);
    for (int64_t m = 0; m < p.pairs; ++m) {
        const int64_t i = p.first[m * p.first_stride], j = p.second[m * p.second_stride], *s = shift + 3 * m;
        if (i < j || (i == j && (s[0] ? s[0] : s[1] ? s[1] : s[2]) > 0)) half.push_back(m);
    }
    return 2 * int64_t(half.size()) == p.pairs;
}

// Reads and measures the pairs of a search or a list; those beyond the cutoff stay, and are not looked at again.
inline bool read(const Problem& p, std::vector<Pair>& pairs) {
    std::vector<int64_t> half;
    if (p.source == FULL && !halve(p, half)) return false;
    const int64_t count = p.source == FULL ? int64_t(half.size()) : p.pairs;
    pairs.resize(count);
    int64_t faults = 0;
    in_parallel(count, p.threads, [&](int64_t number) {
        const int64_t m = p.source == FULL ? half[number] : number;
        const int64_t i = p.first[m * p.first_stride], j = p.second[m * p.second_stride];
        Pair& pair = pairs[number];
        bool sound = i >= 0 && i < p.atoms && j >= 0 && j < p.atoms;
        for (int c = 0; c < 3; ++c) {
            const int64_t s = p.wide_shift ? static_cast<const int64_t*>(p.shift)[3 * m + c]
                                           : static_cast<const int32_t*>(p.shift)[3 * m + c];
            pair.shift[c] = int32_t(s);
            sound &= s == pair.shift[c] && s != std::numeric_limits<int32_t>::min();
        }
        pair.first = int32_t(i), pair.second = int32_t(j);
        if (sound) {
            pair.distance = measure(p, pair);
        } else {
#ifdef _OPENMP
#pragma omp atomic
#endif
            faults += 1;
        }
    });
    return faults == 0;
}

}  // namespace escaip
