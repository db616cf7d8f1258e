// The other kernels that the binding calls: rows, splines, densities of neighbors, layers. Arrays are contiguous.
#pragma once

#include <cstdint>

namespace escaip {

// out (rows, width), zero on entry, plus the rows of x (terms, width) at their indices, in their order.
template <class T>
void sum_rows(const T* x, const int64_t* index, int64_t terms, int64_t width, int64_t threads, T* out);

// Splines in feature space (../spline.py): table (rows, columns), point (points), the derivative of an order.
struct SplineShape {
    int64_t order, rows, columns, points, threads;
};
// out (points, columns)
template <class T>
void spline_values(const SplineShape& s, const T* table, const T* point, T* out);
// out (points) = Σ over columns of cotangent (points, columns) times the values
template <class T>
void spline_products(const SplineShape& s, const T* cotangent, const T* table, const T* point, T* out);
// out (rows, columns), zero on entry, plus the weights of each point times its row of cotangent
template <class T>
void spline_transpose(const SplineShape& s, const T* cotangent, const T* point, T* out);

// Sums base + first[i] + second[j] of rows, without what is null: base (rows, size), i and j (rows). Rows of `elements`
// numbers in all, of which the last may be shorter.
struct SumShape {
    const int64_t *i, *j;
    int64_t rows, size, elements, threads;
};
template <class T>
struct Sum {
    const T *base, *first, *second;
};
// The activation of a sum and its slope (or null), as long as the rows (../layers.py).
template <class T>
void gelu(const SumShape& s, const Sum<T>& x, T* out, T* slope);
template <class T>
void gelu_double_backward(const SumShape& s, const Sum<T>& tangent, const T* grad, const Sum<T>& x, const T* slope,
                          T* to_grad, T* to_x);

// Norm of rows (../layers.py): x, grad, tx (rows, size), w, tw (size).
struct NormShape {
    int64_t rows, size, threads;
    double floor;
};
template <class T>
void rms_norm(const NormShape& s, const T* x, const T* w, T* out);
template <class T>
void rms_norm_backward(const NormShape& s, const T* grad, const T* x, const T* w, T* to_x, T* to_w);
template <class T>
void rms_norm_double_backward(const NormShape& s, const T* tx, const T* tw, const T* grad, const T* x, const T* w, T* to_grad,
                              T* to_x, T* to_w);

// Products of two densities of neighbors (../harmonics.py): n (tokens, 3), w (tokens, channels), grad
// (atoms, pairs, degree + 1), offsets (atoms + 1), first and second (pairs) or null for each channel with itself.
struct DensityShape {
    const int64_t *offsets, *first, *second;
    int64_t atoms, channels, pairs, degree, threads;
};
template <class T>
void power_spectrum(const DensityShape& s, const T* n, const T* w, T* out);
// to_n and to_w: zero on entry for tokens of no atom
template <class T>
void power_spectrum_backward(const DensityShape& s, const T* grad, const T* n, const T* w, T* to_n, T* to_w);
// for cotangents tn and tw of to_n and to_w
template <class T>
void power_spectrum_double_backward(const DensityShape& s, const T* tn, const T* tw, const T* grad, const T* n, const T* w,
                                    T* to_grad, T* to_n, T* to_w);

}  // namespace escaip
