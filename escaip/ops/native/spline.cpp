// Splines in feature space for the CPU: evaluation, its product with a cotangent, its transpose (../spline.py).
//
// A thread takes a run of points, or for the transpose a run of columns over all points in their order, so that every
// sum is made by one thread in one order: the same bits however many threads there are.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "parallel.h"

namespace {

using escaip::in_parallel;

using Scalar = ESCAIP_SCALAR;
constexpr int WIDTH = 6;
// A task of the transpose: columns enough for whole vectors and cache lines.
constexpr int64_t COLUMNS = 32;

// The derivative of order n of the six basis functions, as polynomials: coefficients[j][p] of u^p.
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

}  // namespace

extern "C" {

// out (points, columns) of table (rows, columns).
void escaip_spline_values(const Scalar* table, const Scalar* point, int64_t order, int64_t rows, int64_t columns,
                          int64_t points, int64_t threads, Scalar* out) {
    const Basis basis(order);
    over_points(points, threads, [&](int64_t t) {
        Scalar w[WIDTH];
        const Scalar* __restrict c = table + basis.at(point[t], rows, w) * columns;
        Scalar* __restrict o = out + t * columns;
        for (int64_t h = 0; h < columns; ++h) {
            o[h] = ((w[0] * c[h] + w[1] * c[h + columns]) + (w[2] * c[h + 2 * columns] + w[3] * c[h + 3 * columns])) +
                   (w[4] * c[h + 4 * columns] + w[5] * c[h + 5 * columns]);
        }
    });
}

// out (points) = sum over columns of cotangent (points, columns) times the values.
void escaip_spline_products(const Scalar* cotangent, const Scalar* table, const Scalar* point, int64_t order,
                            int64_t rows, int64_t columns, int64_t points, int64_t threads, Scalar* out) {
    const Basis basis(order);
    over_points(points, threads, [&](int64_t t) {
        Scalar w[WIDTH];
        const Scalar* __restrict c = table + basis.at(point[t], rows, w) * columns;
        const Scalar* __restrict g = cotangent + t * columns;
        // Sixteen sums beside each other: a compiler may not reorder one.
        Scalar sums[16] = {};
        int64_t h = 0;
        for (; h + 16 <= columns; h += 16) {
            for (int64_t i = 0; i < 16; ++i) {
                const Scalar* x = c + h + i;
                sums[i] += g[h + i] * (((w[0] * x[0] + w[1] * x[columns]) + (w[2] * x[2 * columns] + w[3] * x[3 * columns])) +
                                       (w[4] * x[4 * columns] + w[5] * x[5 * columns]));
            }
        }
        Scalar total = 0;
        for (; h < columns; ++h) {
            const Scalar* x = c + h;
            total += g[h] * (((w[0] * x[0] + w[1] * x[columns]) + (w[2] * x[2 * columns] + w[3] * x[3 * columns])) +
                             (w[4] * x[4 * columns] + w[5] * x[5 * columns]));
        }
        for (Scalar sum : sums) total += sum;
        out[t] = total;
    });
}

// out (rows, columns), zero on entry, plus the weights of each point times its row of cotangent (points, columns).
void escaip_spline_transpose(const Scalar* cotangent, const Scalar* point, int64_t order, int64_t rows, int64_t columns,
                             int64_t points, int64_t threads, Scalar* out) {
    const Basis basis(order);
    in_parallel((columns + COLUMNS - 1) / COLUMNS, threads, [&](int64_t task) {
        const int64_t first = task * COLUMNS, end = std::min(columns, first + COLUMNS);
        for (int64_t t = 0; t < points; ++t) {
            Scalar w[WIDTH];
            Scalar* __restrict o = out + basis.at(point[t], rows, w) * columns;
            const Scalar* __restrict g = cotangent + t * columns;
            for (int j = 0; j < WIDTH; ++j, o += columns) {
                const Scalar weight = w[j];
                for (int64_t h = first; h < end; ++h) o[h] += weight * g[h];
            }
        }
    });
}

}  // extern "C"
