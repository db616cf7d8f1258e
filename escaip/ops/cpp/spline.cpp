// Sums over rows, and splines in feature space (../spline.py): values, their product with a cotangent, their transpose.
//
// A thread takes a run of points, or for the transpose a run of columns over all points in their order, so that every
// sum is made by one thread in one order: the same bits however many threads there are.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "ops.h"
#include "parallel.h"

namespace escaip {
namespace {

constexpr int WIDTH = 6;
// A task of the transpose: columns enough for whole vectors and cache lines.
constexpr int64_t COLUMNS = 32;

// The derivative of order n of the six basis functions, as polynomials: coefficients[j][p] of u^p.
template <class Scalar>
struct Basis {
    Scalar coefficients[WIDTH][WIDTH] = {};
    int terms = 0;

    explicit Basis(int64_t order) {
        static const double quintic[WIDTH][WIDTH] = {
            {1, -5, 10, -10, 5, -1}, {26, -50, 20, 20, -20, 5}, {66, 0, -60, 0, 30, -10},
            {26, 50, 20, -20, -20, 10}, {1, 5, 10, 10, 5, -5}, {0, 0, 0, 0, 0, 1},
        };
        terms = order < WIDTH ? WIDTH - int(order) : 0;
        for (int j = 0; j < WIDTH; ++j) {
            for (int p = 0; p < terms; ++p) {
                double factor = 1.0 / 120.0;
                for (int q = 0; q < order; ++q) factor *= double(p + order - q);
                coefficients[j][p] = Scalar(quintic[j][p + order] * factor);
            }
        }
    }

    // Interval of a point, and the six weights there.
    int64_t at(Scalar point, int64_t rows, Scalar* weight) const {
        // Not a number goes to the first interval and stays one in the weights.
        const Scalar last = Scalar(rows - WIDTH), low = std::floor(point);
        const int64_t interval = low > 0 ? int64_t(std::min(low, last)) : 0;
        const Scalar u = point - Scalar(interval);
        for (int j = 0; j < WIDTH; ++j) {
            Scalar value = 0;
            for (int p = terms - 1; p >= 0; --p) value = value * u + coefficients[j][p];
            weight[j] = value;
        }
        return interval;
    }
};

constexpr int64_t POINTS = 256;

template <class Body>
void over_points(int64_t points, int64_t threads, const Body& body) {
    in_parallel((points + POINTS - 1) / POINTS, threads, [&](int64_t task) {
        for (int64_t t = task * POINTS; t < std::min(points, (task + 1) * POINTS); ++t) body(t);
    });
}

// Elements below which threads cost more than they save.
constexpr int64_t SERIAL = 1 << 15;

}  // namespace

template <class T>
void sum_rows(const T* __restrict x, const int64_t* index, int64_t terms, int64_t width, int64_t threads, T* __restrict out) {
    const int64_t most = std::max<int64_t>(1, width / 16), tasks = terms * width < SERIAL ? 1 : std::min(threads, most);
    const int64_t part = (width + tasks - 1) / tasks;
    in_parallel(tasks, tasks, [&](int64_t task) {
        const int64_t first = task * part, end = std::min(width, first + part);
        for (int64_t t = 0; t < terms; ++t) {
            T* sum = out + index[t] * width;
            const T* term = x + t * width;
            for (int64_t i = first; i < end; ++i) sum[i] += term[i];
        }
    });
}

template <class T>
void spline_values(const SplineShape& s, const T* table, const T* point, T* out) {
    const int64_t rows = s.rows, columns = s.columns;
    const Basis<T> basis(s.order);
    over_points(s.points, s.threads, [&](int64_t t) {
        T w[WIDTH];
        const T* __restrict c = table + basis.at(point[t], rows, w) * columns;
        T* __restrict o = out + t * columns;
        for (int64_t h = 0; h < columns; ++h) {
            o[h] = ((w[0] * c[h] + w[1] * c[h + columns]) + (w[2] * c[h + 2 * columns] + w[3] * c[h + 3 * columns])) +
                   (w[4] * c[h + 4 * columns] + w[5] * c[h + 5 * columns]);
        }
    });
}

template <class T>
void spline_products(const SplineShape& s, const T* cotangent, const T* table, const T* point, T* out) {
    const int64_t rows = s.rows, columns = s.columns;
    const Basis<T> basis(s.order);
    over_points(s.points, s.threads, [&](int64_t t) {
        T w[WIDTH];
        const T* __restrict c = table + basis.at(point[t], rows, w) * columns;
        const T* __restrict g = cotangent + t * columns;
        // Sixteen sums beside each other: a compiler may not reorder one.
        T sums[16] = {};
        int64_t h = 0;
        for (; h + 16 <= columns; h += 16) {
            for (int64_t i = 0; i < 16; ++i) {
                const T* x = c + h + i;
                sums[i] += g[h + i] * (((w[0] * x[0] + w[1] * x[columns]) + (w[2] * x[2 * columns] + w[3] * x[3 * columns])) +
                                       (w[4] * x[4 * columns] + w[5] * x[5 * columns]));
            }
        }
        T total = 0;
        for (; h < columns; ++h) {
            const T* x = c + h;
            total += g[h] * (((w[0] * x[0] + w[1] * x[columns]) + (w[2] * x[2 * columns] + w[3] * x[3 * columns])) +
                             (w[4] * x[4 * columns] + w[5] * x[5 * columns]));
        }
        for (T sum : sums) total += sum;
        out[t] = total;
    });
}

template <class T>
void spline_transpose(const SplineShape& s, const T* cotangent, const T* point, T* out) {
    const int64_t rows = s.rows, columns = s.columns, points = s.points;
    const Basis<T> basis(s.order);
    in_parallel((columns + COLUMNS - 1) / COLUMNS, s.threads, [&](int64_t task) {
        const int64_t first = task * COLUMNS, end = std::min(columns, first + COLUMNS);
        for (int64_t t = 0; t < points; ++t) {
            T w[WIDTH];
            T* __restrict o = out + basis.at(point[t], rows, w) * columns;
            const T* __restrict g = cotangent + t * columns;
            for (int j = 0; j < WIDTH; ++j, o += columns) {
                const T weight = w[j];
                for (int64_t h = first; h < end; ++h) o[h] += weight * g[h];
            }
        }
    });
}

#define ESCAIP_INSTANTIATE(T)                                                            \
    template void sum_rows(const T*, const int64_t*, int64_t, int64_t, int64_t, T*);     \
    template void spline_values(const SplineShape&, const T*, const T*, T*);             \
    template void spline_products(const SplineShape&, const T*, const T*, const T*, T*); \
    template void spline_transpose(const SplineShape&, const T*, const T*, T*);
ESCAIP_INSTANTIATE(float)
ESCAIP_INSTANTIATE(double)

}  // namespace escaip
