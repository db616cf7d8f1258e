// Sums over pairs of bonds for the CPU: value, first and second derivative (../steinhardt.py has the formulas).
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

constexpr int MOST = 17;  // degrees 0 .. 16

// Monomial coefficients of the Legendre polynomials: table[l][p] of c^p.
struct Legendre {
    double table[MOST][MOST] = {};
    Legendre() {
        table[0][0] = 1.0;
        table[1][1] = 1.0;
        for (int l = 1; l + 1 < MOST; ++l) {
            for (int p = 0; p <= l + 1; ++p) {
                const double up = p > 0 ? table[l][p - 1] : 0.0;
                table[l + 1][p] = ((2 * l + 1) * up - l * table[l - 1][p]) / (l + 1);
            }
        }
    }
};
const Legendre legendre;

// f(c) = Σ_l grad_l P_l(c) for l ≥ 1 and its first two derivatives, as polynomials.
struct Polynomial {
    double f[MOST] = {}, d[MOST] = {}, dd[MOST] = {};
    int degree;
    template <class Scalar>
    Polynomial(const Scalar* grad, int size) : degree(size - 1) {
        for (int l = 1; l < size; ++l)
            for (int p = 0; p <= l; ++p) f[p] += double(grad[l]) * legendre.table[l][p];
        for (int p = 0; p < degree; ++p) d[p] = (p + 1) * f[p + 1];
        for (int p = 0; p + 1 < degree; ++p) dd[p] = (p + 1) * d[p + 1];
    }
    static inline double at(const double* coefficients, int degree, double c) {
        double value = coefficients[degree];
        for (int p = degree - 1; p >= 0; --p) value = value * c + coefficients[p];
        return value;
    }
};

// The bonds of one atom, by component; tokens without a direction are left out.
struct Bonds {
    std::vector<double> x, y, z, w, bx, by, bz, a;
    std::vector<int64_t> token;
    double total = 0, total_a = 0;  // of all tokens
    int64_t size = 0;
    template <class Scalar>
    void open(const Scalar* n, const Scalar* weight, int64_t begin, int64_t end, const Scalar* ta, const Scalar* tn) {
        for (auto* v : {&x, &y, &z, &w, &bx, &by, &bz, &a}) v->clear();
        token.clear();
        total = total_a = 0;
        for (int64_t t = begin; t < end; ++t) {
            const Scalar* v = n + 3 * t;
            total += weight[t];
            if (ta) total_a += ta[t];
            if (v[0] == 0 && v[1] == 0 && v[2] == 0) continue;
            token.push_back(t);
            // A length that is 1 up to rounding to float32 would show where symmetry makes the sums cancel.
            const double a0 = v[0], a1 = v[1], a2 = v[2];
            const double scale = sizeof(Scalar) == 4 ? 1.0 / std::sqrt(a0 * a0 + a1 * a1 + a2 * a2) : 1.0;
            x.push_back(scale * a0), y.push_back(scale * a1), z.push_back(scale * a2), w.push_back(weight[t]);
            if (ta) {
                a.push_back(ta[t]);
                bx.push_back(tn[3 * t]), by.push_back(tn[3 * t + 1]), bz.push_back(tn[3 * t + 2]);
            }
        }
        size = int64_t(token.size());
    }
};

template <class Task>
void over_atoms(const BondShape& s, const Task& task) {
    // Every thread gets some atoms of a small structure, and of a large one as many as one thread's cache likes.
    const int64_t length = std::clamp<int64_t>(s.atoms / (4 * std::max<int64_t>(1, s.threads)), 4, 32);
    in_parallel((s.atoms + length - 1) / length, s.threads, [&](int64_t run) {
        Bonds bonds;
        for (int64_t i = run * length; i < std::min(s.atoms, (run + 1) * length); ++i) task(bonds, i);
    });
}

}  // namespace

template <class T>
void steinhardt(const BondShape& s, const T* n, const T* w, T* out) {
    const int64_t *offsets = s.offsets, size = s.size;
    over_atoms(s, [&](Bonds& b, int64_t i) {
        b.open<T>(n, w, offsets[i], offsets[i + 1], nullptr, nullptr);
        double sums[MOST] = {};
        for (int64_t j = 0; j < b.size; ++j) {
            double row[MOST] = {};
            for (int64_t k = 0; k < b.size; ++k) {
                const double c = b.x[j] * b.x[k] + b.y[j] * b.y[k] + b.z[j] * b.z[k];
                double before = 1.0, here = c;
                for (int l = 1; l < size; ++l) {
                    row[l] += b.w[k] * here;
                    const double next = ((2 * l + 1) * c * here - l * before) / (l + 1);
                    before = here, here = next;
                }
            }
            for (int l = 1; l < size; ++l) sums[l] += b.w[j] * row[l];
        }
        sums[0] = b.total * b.total;
        for (int64_t l = 0; l < size; ++l) out[i * size + l] = T(sums[l]);
    });
}

template <class T>
void steinhardt_backward(const BondShape& s, const T* grad, const T* n, const T* w, T* to_n, T* to_w) {
    const int64_t *offsets = s.offsets, size = s.size;
    over_atoms(s, [&](Bonds& b, int64_t i) {
        b.open<T>(n, w, offsets[i], offsets[i + 1], nullptr, nullptr);
        const Polynomial p(grad + i * size, int(size));
        const double constant = 2.0 * grad[i * size] * b.total;
        for (int64_t t = offsets[i]; t < offsets[i + 1]; ++t) {
            to_w[t] = T(constant);
            to_n[3 * t] = to_n[3 * t + 1] = to_n[3 * t + 2] = 0;
        }
        if (size < 2) return;
        for (int64_t j = 0; j < b.size; ++j) {
            double sw = 0, sx = 0, sy = 0, sz = 0;
            for (int64_t k = 0; k < b.size; ++k) {
                const double c = b.x[j] * b.x[k] + b.y[j] * b.y[k] + b.z[j] * b.z[k];
                sw += b.w[k] * Polynomial::at(p.f, p.degree, c);
                const double slope = b.w[k] * Polynomial::at(p.d, p.degree - 1, c);
                sx += slope * b.x[k], sy += slope * b.y[k], sz += slope * b.z[k];
            }
            const int64_t t = b.token[j];
            to_w[t] = T(constant + 2.0 * sw);
            to_n[3 * t] = T(2.0 * b.w[j] * sx);
            to_n[3 * t + 1] = T(2.0 * b.w[j] * sy);
            to_n[3 * t + 2] = T(2.0 * b.w[j] * sz);
        }
    });
}

template <class T>
void steinhardt_double_backward(const BondShape& s, const T* tn, const T* ta, const T* grad, const T* n, const T* w,
                                T* to_grad, T* to_n, T* to_w) {
    const int64_t *offsets = s.offsets, size = s.size;
    over_atoms(s, [&](Bonds& b, int64_t i) {
        b.open(n, w, offsets[i], offsets[i + 1], ta, tn);
        const Polynomial p(grad + i * size, int(size));
        const double constant = 2.0 * grad[i * size] * b.total_a;
        double sums[MOST] = {};
        for (int64_t t = offsets[i]; t < offsets[i + 1]; ++t) {
            to_w[t] = T(constant);
            to_n[3 * t] = to_n[3 * t + 1] = to_n[3 * t + 2] = 0;
        }
        for (int64_t j = 0; j < b.size && size > 1; ++j) {
            double sw = 0, sx = 0, sy = 0, sz = 0;
            for (int64_t k = 0; k < b.size; ++k) {
                const double c = b.x[j] * b.x[k] + b.y[j] * b.y[k] + b.z[j] * b.z[k];
                const double jk = b.bx[j] * b.x[k] + b.by[j] * b.y[k] + b.bz[j] * b.z[k];
                const double along_both = jk + b.bx[k] * b.x[j] + b.by[k] * b.y[j] + b.bz[k] * b.z[j];
                const double f = Polynomial::at(p.f, p.degree, c), d = Polynomial::at(p.d, p.degree - 1, c);
                const double dd = p.degree > 1 ? Polynomial::at(p.dd, p.degree - 2, c) : 0.0;
                const double ww = b.w[j] * b.w[k], wd = ww * d;
                sw += b.a[k] * f + b.w[k] * d * along_both;
                const double along = (b.a[j] * b.w[k] + b.a[k] * b.w[j]) * d + ww * dd * along_both;
                sx += along * b.x[k] + wd * b.bx[k];
                sy += along * b.y[k] + wd * b.by[k];
                sz += along * b.z[k] + wd * b.bz[k];
                // Legendre polynomials and their slopes: P'_{l+1} = P'_{l-1} + (2l + 1) P_l.
                const double value = b.a[j] * b.w[k], slope = ww * jk;
                double before = 1.0, here = c, slope_before = 0.0, slope_here = 1.0;
                for (int l = 1; l < size; ++l) {
                    sums[l] += value * here + slope * slope_here;
                    const double next = ((2 * l + 1) * c * here - l * before) / (l + 1);
                    const double slope_next = slope_before + (2 * l + 1) * here;
                    before = here, here = next, slope_before = slope_here, slope_here = slope_next;
                }
            }
            const int64_t t = b.token[j];
            to_w[t] = T(constant + 2.0 * sw);
            to_n[3 * t] = T(2.0 * sx);
            to_n[3 * t + 1] = T(2.0 * sy);
            to_n[3 * t + 2] = T(2.0 * sz);
        }
        sums[0] = b.total_a * b.total;
        for (int64_t l = 0; l < size; ++l) to_grad[i * size + l] = T(2.0 * sums[l]);
    });
}

#define ESCAIP_INSTANTIATE(T)                                                                    \
    template void steinhardt(const BondShape&, const T*, const T*, T*);                          \
    template void steinhardt_backward(const BondShape&, const T*, const T*, const T*, T*, T*);   \
    template void steinhardt_double_backward(const BondShape&, const T*, const T*, const T*, const T*, const T*, T*, T*, T*);
ESCAIP_INSTANTIATE(float)
ESCAIP_INSTANTIATE(double)

}  // namespace escaip
