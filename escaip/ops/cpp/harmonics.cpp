// Densities of neighbors in solid harmonics and products of two of them, for the CPU: value, first and second derivative
// (../harmonics.py has the formulas).
//
// A thread takes whole atoms, in double precision throughout: the same bits however many threads there are.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace escaip {
namespace {

constexpr int MOST = 16;      // highest degree
constexpr int64_t LANES = 8;  // bonds are padded to a multiple of it

// Places of the harmonics of a degree: cosines of m = 0 .. l, then sines of m = 1 .. l.
inline int cosine(int l, int m) { return l * l + m; }
inline int sine(int l, int m) { return l * l + l + m; }

// ∂Y_of/∂axis is the sum of factor · Y_to: derivatives of solid harmonics are such of one degree less.
struct Slope {
    int axis, of, to;
    double factor;
};

struct Tables {
    double rise[MOST + 1][MOST + 1] = {}, fall[MOST + 1][MOST + 1] = {}, top[MOST + 1] = {};
    std::vector<Slope> slopes;     // by degree
    size_t slopes_to[MOST + 1] = {};  // number of those up to a degree

    static double norm(int l, int m) {
        double ratio = m ? 2.0 : 1.0;
        for (int i = l - m + 1; i <= l + m; ++i) ratio /= i;
        return std::sqrt(ratio);
    }
    void add(int axis, int of, int to, double factor) { slopes.push_back({axis, of, to, factor}); }

    Tables() {
        for (int l = 1; l <= MOST; ++l) {
            top[l] = (2 * l - 1) * norm(l, l) / norm(l - 1, l - 1);
            for (int m = 0; m < l; ++m) {
                rise[l][m] = (2 * l - 1) * norm(l, m) / (norm(l - 1, m) * (l - m));
                if (l >= m + 2) fall[l][m] = (l + m - 1) * norm(l, m) / (norm(l - 2, m) * (l - m));
            }
            for (int m = 0; m <= l; ++m) {
                const double half = 0.5 * norm(l, m), more = (l + m) * (l + m - 1);
                if (m < l) {
                    const double along = (l + m) * norm(l, m) / norm(l - 1, m);
                    add(2, cosine(l, m), cosine(l - 1, m), along);
                    if (m) add(2, sine(l, m), sine(l - 1, m), along);
                }
                if (m + 1 < l) {
                    const double up = (m ? half : 2.0 * half) / norm(l - 1, m + 1);
                    add(0, cosine(l, m), cosine(l - 1, m + 1), -up);
                    add(1, cosine(l, m), sine(l - 1, m + 1), -up);
                    if (m) add(0, sine(l, m), sine(l - 1, m + 1), -up), add(1, sine(l, m), cosine(l - 1, m + 1), up);
                }
                if (m) {
                    const double down = more * half / norm(l - 1, m - 1);
                    add(0, cosine(l, m), cosine(l - 1, m - 1), down);
                    add(1, sine(l, m), cosine(l - 1, m - 1), down);
                    if (m > 1) add(0, sine(l, m), sine(l - 1, m - 1), down), add(1, cosine(l, m), sine(l - 1, m - 1), -down);
                }
            }
            slopes_to[l] = slopes.size();
        }
    }
};
const Tables tables;

using Buffer = std::vector<double>;

// Products over the bonds of an atom, whose number is a multiple of LANES.
inline double dot(const double* a, const double* b, int64_t size) {
    double sums[LANES] = {};
    for (int64_t i = 0; i < size; i += LANES)
        for (int64_t j = 0; j < LANES; ++j) sums[j] += a[i + j] * b[i + j];
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}
inline void add_scaled(double* __restrict out, double factor, const double* __restrict x, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES)
        for (int64_t j = 0; j < LANES; ++j) out[i + j] += factor * x[i + j];
}

// The bonds of one atom by component, their weights (channels, bonds) and harmonics (harmonics, bonds).
struct Bonds {
    const DensityShape& s;
    int64_t begin = 0, count = 0, size = 0, harmonics;
    Buffer n, w, y;                // of the bonds
    Buffer tn, tw, ty;             // cotangents of to_n and to_w, and the derivative of the harmonics along tn
    Buffer sums, moved, mix, mixed;  // (channels, harmonics): densities, their derivative, factors of both
    Buffer to_n, to_w, to_y, to_ty;

    explicit Bonds(const DensityShape& shape) : s(shape), harmonics((shape.degree + 1) * (shape.degree + 1)) {}

    // rows (tokens, width) of the atom, as (width, bonds)
    template <class T>
    void take(const T* rows, int64_t width, Buffer& out) const {
        out.assign(width * size, 0.0);
        for (int64_t k = 0; k < count; ++k)
            for (int64_t c = 0; c < width; ++c) out[c * size + k] = double(rows[(begin + k) * width + c]);
    }
    template <class T>
    void give(const Buffer& from, int64_t width, T* rows) const {
        for (int64_t k = 0; k < count; ++k)
            for (int64_t c = 0; c < width; ++c) rows[(begin + k) * width + c] = T(from[c * size + k]);
    }

    template <class T>
    void open(int64_t atom, const T* direction, const T* weight) {
        begin = s.offsets[atom], count = s.offsets[atom + 1] - begin, size = (count + LANES - 1) / LANES * LANES;
        take(direction, 3, n), take(weight, s.channels, w);
        double *x = n.data(), *y_ = x + size, *z = y_ + size;
        if (sizeof(T) == 4) {  // lengths that are 1 up to rounding would show where symmetry makes the sums cancel
            for (int64_t k = 0; k < count; ++k) {
                const double squared = x[k] * x[k] + y_[k] * y_[k] + z[k] * z[k];
                const double scale = squared > 0 ? 1.0 / std::sqrt(squared) : 0.0;
                x[k] *= scale, y_[k] *= scale, z[k] *= scale;
            }
        }
        y.assign(harmonics * size, 0.0);
        for (int64_t k = 0; k < count; ++k) y[k] = 1.0;
        for (int l = 1; l <= s.degree; ++l) {
            for (int m = 0; m < l; ++m) {
                polar(l, m, cosine(l, m), cosine(l - 1, m), cosine(l - 2, m));
                if (m) polar(l, m, sine(l, m), sine(l - 1, m), sine(l - 2, m));
            }
            const double *c = row(y, cosine(l - 1, l - 1)), *s_ = l > 1 ? row(y, sine(l - 1, l - 1)) : nullptr;
            double *to_c = row(y, cosine(l, l)), *to_s = row(y, sine(l, l));
            for (int64_t k = 0; k < size; ++k) {
                const double before = s_ ? s_[k] : 0.0;
                to_c[k] = tables.top[l] * (x[k] * c[k] - y_[k] * before);
                to_s[k] = tables.top[l] * (x[k] * before + y_[k] * c[k]);
            }
        }
        project(w, y, sums, true);
    }
    double* row(Buffer& x, int64_t index) const { return x.data() + index * size; }
    const double* row(const Buffer& x, int64_t index) const { return x.data() + index * size; }

    void polar(int l, int m, int to, int one, int two) {
        const double rise = tables.rise[l][m], fall = tables.fall[l][m], *x = row(n, 0), *y_ = row(n, 1), *z = row(n, 2);
        const double *first = row(y, one), *second = fall ? row(y, two) : first;
        double* out = row(y, to);
        for (int64_t k = 0; k < size; ++k)
            out[k] = rise * z[k] * first[k] - fall * (x[k] * x[k] + y_[k] * y_[k] + z[k] * z[k]) * second[k];
    }

    // out (channels, harmonics), plus the products of rows (channels, bonds) and (harmonics, bonds)
    void project(const Buffer& a, const Buffer& b, Buffer& out, bool fresh) const {
        if (fresh) out.assign(s.channels * harmonics, 0.0);
        for (int64_t c = 0; c < s.channels; ++c)
            for (int64_t m = 0; m < harmonics; ++m) out[c * harmonics + m] += dot(row(a, c), row(b, m), size);
    }
    // to (channels, bonds), plus factors (channels, harmonics) times x (harmonics, bonds)
    void of_harmonics(const Buffer& factors, const Buffer& x, Buffer& to) const {
        for (int64_t c = 0; c < s.channels; ++c)
            for (int64_t m = 0; m < harmonics; ++m) add_scaled(to.data() + c * size, factors[c * harmonics + m], row(x, m), size);
    }
    // to (harmonics, bonds), plus the transpose of factors (channels, harmonics) times x (channels, bonds)
    void of_channels(const Buffer& factors, const Buffer& x, Buffer& to) const {
        for (int64_t m = 0; m < harmonics; ++m)
            for (int64_t c = 0; c < s.channels; ++c) add_scaled(to.data() + m * size, factors[c * harmonics + m], row(x, c), size);
    }
    // to_n (3, bonds), plus what changes of the harmonics make of a change of the direction
    void along(const Buffer& to_harmonics, const Buffer& x) {
        for (size_t i = 0; i < tables.slopes_to[s.degree]; ++i) {
            const Slope& one = tables.slopes[i];
            const double *a = row(to_harmonics, one.of), *b = row(x, one.to);
            double* out = row(to_n, one.axis);
            for (int64_t k = 0; k < size; ++k) out[k] += one.factor * a[k] * b[k];
        }
    }

    // Calls f(first, second, length, pair, degree) with the densities of each pair and degree.
    template <class F>
    void over_pairs(const F& f) const {
        for (int64_t p = 0; p < s.pairs; ++p) {
            const int64_t first = s.first ? s.first[p] : p, second = s.second ? s.second[p] : p;
            for (int l = 0; l <= s.degree; ++l)
                f(first * harmonics + l * l, second * harmonics + l * l, 2 * l + 1, p * (s.degree + 1) + l);
        }
    }
    // out (channels, harmonics): the derivative of the products, each times its grad, by the densities
    template <class T>
    void slopes(const T* grad, const Buffer& x, Buffer& out) const {
        out.assign(s.channels * harmonics, 0.0);
        over_pairs([&](int64_t first, int64_t second, int64_t length, int64_t pair) {
            const double g = double(grad[pair]);
            for (int64_t i = 0; i < length; ++i) out[first + i] += g * x[second + i];
            for (int64_t i = 0; i < length; ++i) out[second + i] += g * x[first + i];
        });
    }
};

template <class Task>
void over_atoms(const DensityShape& s, const Task& task) {
    // Every thread gets some atoms of a small structure, and of a large one as many as one thread's cache likes.
    const int64_t length = std::clamp<int64_t>(s.atoms / (4 * std::max<int64_t>(1, s.threads)), 4, 32);
    in_parallel((s.atoms + length - 1) / length, s.threads, [&](int64_t run) {
        Bonds bonds(s);
        for (int64_t i = run * length; i < std::min(s.atoms, (run + 1) * length); ++i) task(bonds, i, i * s.pairs * (s.degree + 1));
    });
}

}  // namespace

template <class T>
void power_spectrum(const DensityShape& s, const T* n, const T* w, T* out) {
    over_atoms(s, [&](Bonds& b, int64_t atom, int64_t place) {
        b.open(atom, n, w);
        b.over_pairs([&](int64_t first, int64_t second, int64_t length, int64_t pair) {
            double sum = 0;
            for (int64_t i = 0; i < length; ++i) sum += b.sums[first + i] * b.sums[second + i];
            out[place + pair] = T(sum);
        });
    });
}

template <class T>
void power_spectrum_backward(const DensityShape& s, const T* grad, const T* n, const T* w, T* to_n, T* to_w) {
    over_atoms(s, [&](Bonds& b, int64_t atom, int64_t place) {
        b.open(atom, n, w);
        b.slopes(grad + place, b.sums, b.mix);
        b.to_n.assign(3 * b.size, 0.0), b.to_w.assign(s.channels * b.size, 0.0), b.to_y.assign(b.harmonics * b.size, 0.0);
        b.of_harmonics(b.mix, b.y, b.to_w);
        b.of_channels(b.mix, b.w, b.to_y);
        b.along(b.to_y, b.y);
        b.give(b.to_n, 3, to_n), b.give(b.to_w, s.channels, to_w);
    });
}

template <class T>
void power_spectrum_double_backward(const DensityShape& s, const T* tn, const T* tw, const T* grad, const T* n, const T* w,
                                    T* to_grad, T* to_n, T* to_w) {
    over_atoms(s, [&](Bonds& b, int64_t atom, int64_t place) {
        b.open(atom, n, w);
        b.take(tn, 3, b.tn), b.take(tw, s.channels, b.tw);
        b.ty.assign(b.harmonics * b.size, 0.0);
        for (size_t i = 0; i < tables.slopes_to[s.degree]; ++i) {
            const Slope& one = tables.slopes[i];
            const double *a = b.row(b.tn, one.axis), *x = b.row(b.y, one.to);
            double* out = b.row(b.ty, one.of);
            for (int64_t k = 0; k < b.size; ++k) out[k] += one.factor * a[k] * x[k];
        }
        b.project(b.tw, b.y, b.moved, true);
        b.project(b.w, b.ty, b.moved, false);
        b.over_pairs([&](int64_t first, int64_t second, int64_t length, int64_t pair) {
            double sum = 0;
            for (int64_t i = 0; i < length; ++i)
                sum += b.sums[first + i] * b.moved[second + i] + b.moved[first + i] * b.sums[second + i];
            to_grad[place + pair] = T(sum);
        });
        b.slopes(grad + place, b.sums, b.mix), b.slopes(grad + place, b.moved, b.mixed);
        b.to_n.assign(3 * b.size, 0.0), b.to_w.assign(s.channels * b.size, 0.0);
        b.to_y.assign(b.harmonics * b.size, 0.0), b.to_ty.assign(b.harmonics * b.size, 0.0);
        b.of_harmonics(b.mixed, b.y, b.to_w), b.of_harmonics(b.mix, b.ty, b.to_w);
        b.of_channels(b.mixed, b.w, b.to_y), b.of_channels(b.mix, b.tw, b.to_y), b.of_channels(b.mix, b.w, b.to_ty);
        b.along(b.to_y, b.y), b.along(b.to_ty, b.ty);
        b.give(b.to_n, 3, to_n), b.give(b.to_w, s.channels, to_w);
    });
}

#define ESCAIP_INSTANTIATE(T)                                                                               \
    template void power_spectrum(const DensityShape&, const T*, const T*, T*);                              \
    template void power_spectrum_backward(const DensityShape&, const T*, const T*, const T*, T*, T*);       \
    template void power_spectrum_double_backward(const DensityShape&, const T*, const T*, const T*, const T*, \
                                                 const T*, T*, T*, T*);
ESCAIP_INSTANTIATE(float)
ESCAIP_INSTANTIATE(double)

}  // namespace escaip
