// Activation and norm for the CPU, with two derivatives (../layers.py has the formulas).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace escaip {
namespace {

constexpr int64_t ELEMENTS = 8192, ROWS = 64;  // of a task

template <class T>
ESCAIP_INLINE Vec<T> load_some(const T* p, int64_t count) {
    if (count >= lanes<T>) return load(p);
    Vec<T> v = zeros<T>();
    std::memcpy(&v, p, count * sizeof(T));
    return v;
}
template <class T>
ESCAIP_INLINE void store_some(T* p, Vec<T> v, int64_t count) {
    std::memcpy(p, &v, std::min<int64_t>(count, lanes<T>) * sizeof(T));
}

// Calls f(i, count) for vectors of `count` elements from i on.
template <class T, class F>
ESCAIP_INLINE void over_vectors(int64_t begin, int64_t end, const F& f) {
    int64_t i = begin;
    for (; i + lanes<T> <= end; i += lanes<T>) f(i, int64_t(lanes<T>));
    if (i < end) f(i, end - i);
}
// Calls f(row, begin, size) for all rows: begin is where the row starts, size how long it is.
template <class F>
void over_sums(const SumShape& s, const F& f) {
    const int64_t rows = std::max<int64_t>(1, ELEMENTS / std::max<int64_t>(1, s.size));  // of a task
    in_parallel((s.rows + rows - 1) / rows, s.threads, [&](int64_t task) {
        for (int64_t row = task * rows; row < std::min(s.rows, (task + 1) * rows); ++row)
            f(row, row * s.size, std::min(s.size, s.elements - row * s.size));
    });
}

// One row of a sum.
template <class T>
struct SumRow {
    const T *base, *first, *second;
    SumRow(const Sum<T>& x, const SumShape& s, int64_t row)
        : base(x.base ? x.base + row * s.size : nullptr),
          first(x.first ? x.first + s.i[row] * s.size : nullptr),
          second(x.second ? x.second + s.j[row] * s.size : nullptr) {}
    ESCAIP_INLINE Vec<T> operator()(int64_t at, int64_t count) const {
        Vec<T> v = base ? load_some(base + at, count) : zeros<T>();
        if (first) v += load_some(first + at, count);
        if (second) v += load_some(second + at, count);
        return v;
    }
};

// (5/2 + z) e^{z²} erfc(z) for z ≥ 0 as a polynomial in (z − 5/2)/(z + 5/2), as Shepherd and Laframboise do (Math. Comp. 36,
// 249, 1981) with another factor: here one division serves both. Fitted at Chebyshev points, to 2e-7 in single precision
// and 2e-16 in double.
template <class T>
struct Erfcx;
template <>
struct Erfcx<float> {
    static constexpr float c[] = {1.05403182f,   -0.804652927f, 0.453916894f,    -0.171236453f,  0.0283240492f,
                                  0.00833682038f, -0.00467913853f, -0.000352742876f, 0.000501430519f};
};
template <>
struct Erfcx<double> {
    static constexpr double c[] = {
        1.054031820305718, -0.80465184943914836, 0.45391411664809, -0.17125114524609714, 0.028361550132568324,
        0.0083930443040444707, -0.0048187855384293644, -0.00043920829036041801, 0.00070269390710797142,
        5.8307989837124798e-05, -0.0001126060486982668, -1.9533054407664833e-05, 1.8249271699850533e-05,
        6.7566563525676926e-06, -2.3448820552529012e-06, -1.9669673068444594e-06, 1.5147296842824178e-08,
        4.5307067296082899e-07, 1.1499844722819421e-07, -7.3462728224834447e-08, -3.6893389536003647e-08,
        6.2130196189227562e-09, 4.7255226045803468e-09};
};

// The normal distribution below x, and its density.
template <class T>
ESCAIP_INLINE void normal(Vec<T> x, Vec<T>& below, Vec<T>& density) {
    const Vec<T> z = (x < T(0) ? -x : x) * T(0.70710678118654752440);
    const Vec<T> e = exponential<T>(-(z * z)), inverse = T(1) / (z + T(2.5)), t = T(1) - T(5) * inverse;
    Vec<T> series = zeros<T>();
    ESCAIP_UNROLL
    for (int i = int(std::size(Erfcx<T>::c)) - 1; i >= 0; --i) series = series * t + Erfcx<T>::c[i];
    const Vec<T> tail = T(0.5) * e * series * inverse;
    below = x < T(0) ? tail : T(1) - tail;
    density = e * T(0.39894228040143267794);
}

// Rows of a norm: x over the root of its mean square.
template <class T>
struct Row {
    int64_t size;
    T root;  // one over it
    Row(const T* x, int64_t size, double floor) : size(size) {
        root = T(1) / std::sqrt(sum_of([&](int64_t i, int64_t n) {
                   const Vec<T> v = load_some(x + i, n);
                   return v * v;
               }) / T(size) + T(floor));
    }
    template <class F>
    ESCAIP_INLINE T sum_of(const F& f) const {
        Vec<T> total = zeros<T>();
        over_vectors<T>(0, size, [&](int64_t i, int64_t n) { total += f(i, n); });
        return sum<T>(total);
    }
};

// Calls f(row, sums) for all rows; sums (size) of a task are its own, and are added up in order into out.
template <class T, class F>
void over_rows(const NormShape& s, T* out, const F& f) {
    const int64_t tasks = (s.rows + ROWS - 1) / ROWS;
    std::vector<T> sums(out ? tasks * s.size : 0, T(0));
    in_parallel(tasks, s.threads, [&](int64_t task) {
        for (int64_t row = task * ROWS; row < std::min(s.rows, (task + 1) * ROWS); ++row)
            f(row * s.size, out ? sums.data() + task * s.size : nullptr);
    });
    if (!out) return;
    std::fill(out, out + s.size, T(0));
    for (int64_t task = 0; task < tasks; ++task)
        for (int64_t i = 0; i < s.size; ++i) out[i] += sums[task * s.size + i];
}

}  // namespace

template <class T>
void gelu(const SumShape& s, const Sum<T>& x, T* out, T* slope) {
    over_sums(s, [&](int64_t row, int64_t begin, int64_t size) {
        const SumRow<T> of_x(x, s, row);
        over_vectors<T>(0, size, [&](int64_t i, int64_t n) {
            Vec<T> below, density;
            const Vec<T> v = of_x(i, n);
            normal<T>(v, below, density);
            store_some(out + begin + i, v * below, n);
            if (slope) store_some(slope + begin + i, below + v * density, n);
        });
    });
}

template <class T>
void gelu_double_backward(const SumShape& s, const Sum<T>& tangent, const T* grad, const Sum<T>& x, const T* slope,
                          T* to_grad, T* to_x) {
    over_sums(s, [&](int64_t row, int64_t begin, int64_t size) {
        const SumRow<T> of_x(x, s, row), of_t(tangent, s, row);
        over_vectors<T>(0, size, [&](int64_t i, int64_t n) {
            const Vec<T> v = of_x(i, n), t = of_t(i, n);
            const Vec<T> density = exponential<T>(T(-0.5) * v * v) * T(0.39894228040143267794);
            store_some(to_grad + begin + i, t * load_some(slope + begin + i, n), n);
            store_some(to_x + begin + i, t * load_some(grad + begin + i, n) * density * (T(2) - v * v), n);
        });
    });
}

template <class T>
void rms_norm(const NormShape& s, const T* x, const T* w, T* out) {
    over_rows<T>(s, nullptr, [&](int64_t at, T*) {
        const Row<T> row(x + at, s.size, s.floor);
        over_vectors<T>(0, s.size, [&](int64_t i, int64_t n) {
            store_some(out + at + i, load_some(x + at + i, n) * row.root * load_some(w + i, n), n);
        });
    });
}

template <class T>
void rms_norm_backward(const NormShape& s, const T* grad, const T* x, const T* w, T* to_x, T* to_w) {
    over_rows<T>(s, to_w, [&](int64_t at, T* sums) {
        const T *g = grad + at, *v = x + at;
        const Row<T> row(v, s.size, s.floor);
        const T product = row.sum_of([&](int64_t i, int64_t n) {
            return load_some(g + i, n) * load_some(w + i, n) * load_some(v + i, n);
        });
        const T factor = row.root * row.root * row.root * product / T(s.size);
        over_vectors<T>(0, s.size, [&](int64_t i, int64_t n) {
            const Vec<T> gi = load_some(g + i, n), vi = load_some(v + i, n);
            store_some(to_x + at + i, row.root * load_some(w + i, n) * gi - factor * vi, n);
            store_some(sums + i, load_some(sums + i, n) + row.root * gi * vi, n);
        });
    });
}

template <class T>
void rms_norm_double_backward(const NormShape& s, const T* tx, const T* tw, const T* grad, const T* x, const T* w, T* to_grad,
                              T* to_x, T* to_w) {
    over_rows<T>(s, to_w, [&](int64_t at, T* sums) {
        const T *a = tx + at, *g = grad + at, *v = x + at;
        const Row<T> row(v, s.size, s.floor);
        Vec<T> wgx = zeros<T>(), ax = zeros<T>(), turned = zeros<T>();
        over_vectors<T>(0, s.size, [&](int64_t i, int64_t n) {
            const Vec<T> ai = load_some(a + i, n), gi = load_some(g + i, n), vi = load_some(v + i, n), wi = load_some(w + i, n);
            wgx += wi * gi * vi, ax += ai * vi, turned += gi * (ai * wi + load_some(tw + i, n) * vi);
        });
        const T r = row.root, cube = r * r * r / T(s.size), of_x = sum<T>(wgx), of_t = sum<T>(ax);
        const T along = sum<T>(turned) - T(3) * r * r * of_x * of_t / T(s.size);
        over_vectors<T>(0, s.size, [&](int64_t i, int64_t n) {
            const Vec<T> ai = load_some(a + i, n), bi = load_some(tw + i, n), gi = load_some(g + i, n);
            const Vec<T> vi = load_some(v + i, n), wi = load_some(w + i, n);
            store_some(to_grad + at + i, r * (ai * wi + bi * vi) - cube * of_t * wi * vi, n);
            store_some(to_x + at + i, r * bi * gi - cube * (of_x * ai + of_t * wi * gi + along * vi), n);
            store_some(sums + i, load_some(sums + i, n) + gi * (r * ai - cube * of_t * vi), n);
        });
    });
}

#define ESCAIP_INSTANTIATE(T)                                                                            \
    template void gelu(const SumShape&, const Sum<T>&, T*, T*);                                          \
    template void gelu_double_backward(const SumShape&, const Sum<T>&, const T*, const Sum<T>&, const T*, T*, T*); \
    template void rms_norm(const NormShape&, const T*, const T*, T*);                                    \
    template void rms_norm_backward(const NormShape&, const T*, const T*, const T*, T*, T*);             \
    template void rms_norm_double_backward(const NormShape&, const T*, const T*, const T*, const T*, const T*, T*, T*, T*);
ESCAIP_INSTANTIATE(float)
ESCAIP_INSTANTIATE(double)

}  // namespace escaip
