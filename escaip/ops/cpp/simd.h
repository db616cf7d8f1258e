// Vectors of the widest kind the target has, through the vector extensions of GCC and Clang: no intrinsics.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#define ESCAIP_VECTOR_BYTES 64
#define ESCAIP_PANEL 4  // vectors beside each other in a register block: 6 × 4 sums in 32 registers
#elif defined(__AVX__)
#define ESCAIP_VECTOR_BYTES 32
#define ESCAIP_PANEL 2  // 6 × 2 sums in 16 registers
#elif defined(__aarch64__)
#define ESCAIP_VECTOR_BYTES 16
#define ESCAIP_PANEL 4
#else
#define ESCAIP_VECTOR_BYTES 16
#define ESCAIP_PANEL 2
#endif

#define ESCAIP_INLINE inline __attribute__((always_inline))
#define ESCAIP_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define ESCAIP_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ESCAIP_UNROLL _Pragma("GCC unroll 32")
#endif

namespace escaip {

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float Vec __attribute__((vector_size(ESCAIP_VECTOR_BYTES)));
    typedef int32_t Int __attribute__((vector_size(ESCAIP_VECTOR_BYTES)));
    // exp: below the least (1e-30) the result is zero, since products of smaller numbers are denormal, which is slow;
    // adding `magic` rounds to an integer held in the low bits.
    static constexpr float least = -69.0f, magic = 12582912.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr int mantissa_bits = 23, exp_degree = 7;
};

template <>
struct Simd<double> {
    typedef double Vec __attribute__((vector_size(ESCAIP_VECTOR_BYTES)));
    typedef int64_t Int __attribute__((vector_size(ESCAIP_VECTOR_BYTES)));
    static constexpr double least = -690.0, magic = 6755399441055744.0, ln2_high = 6.93145751953125e-1,
                            ln2_low = 1.42860682030941723212e-6;
    static constexpr int mantissa_bits = 52, exp_degree = 13;
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
constexpr long lanes = ESCAIP_VECTOR_BYTES / sizeof(T);

template <class T>
constexpr long padded(long n) {
    return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

template <class T>
ESCAIP_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

template <class T>
ESCAIP_INLINE void store(T* p, Vec<T> v) {
    std::memcpy(p, &v, sizeof(v));
}

template <class T>
ESCAIP_INLINE Vec<T> zeros() {
    return Vec<T>{};
}

// ---- shuffles ---------------------------------------------------------------------------------------------------

#if defined(__clang__) || __GNUC__ >= 12
#define ESCAIP_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ESCAIP_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, typename Simd<T>::Int{__VA_ARGS__})
#endif

// Lanes half, half + 1, .. of a and b taken in turn, with half 0 (the lower lanes) or 1 (the upper).
template <class T, int half, std::size_t... i>
ESCAIP_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<i...>) {
    return ESCAIP_SHUFFLE(T, a, b, (int(half * lanes<T> / 2 + i / 2 + (i % 2) * lanes<T>))...);
}

template <class T, int by, std::size_t... i>
ESCAIP_INLINE Vec<T> rotate(Vec<T> a, std::index_sequence<i...>) {
    return ESCAIP_SHUFFLE(T, a, a, (int((i + by) % lanes<T>))...);
}

template <class T, int by, class Op>
ESCAIP_INLINE Vec<T> fold(Vec<T> v, Op op) {
    if constexpr (by == 0) {
        return v;
    } else {
        return fold<T, by / 2>(op(v, rotate<T, by>(v, std::make_index_sequence<lanes<T>>())), op);
    }
}

template <class T>
ESCAIP_INLINE T sum(Vec<T> v) {
    return fold<T, lanes<T> / 2>(v, [](Vec<T> a, Vec<T> b) { return a + b; })[0];
}

template <class T>
ESCAIP_INLINE T largest(Vec<T> v) {
    return fold<T, lanes<T> / 2>(v, [](Vec<T> a, Vec<T> b) { return a > b ? a : b; })[0];
}

// One square of lanes × lanes: each round interleaves row i with row i + lanes / 2.
template <class T, int rounds>
ESCAIP_INLINE void transpose_rounds(Vec<T>* row) {
    constexpr auto all = std::make_index_sequence<lanes<T>>();
    if constexpr (rounds > 1) {
        Vec<T> next[lanes<T>];
        ESCAIP_UNROLL
        for (long i = 0; i < lanes<T> / 2; ++i) {
            next[2 * i] = interleave<T, 0>(row[i], row[i + lanes<T> / 2], all);
            next[2 * i + 1] = interleave<T, 1>(row[i], row[i + lanes<T> / 2], all);
        }
        transpose_rounds<T, rounds / 2>(next);
        ESCAIP_UNROLL
        for (long i = 0; i < lanes<T>; ++i) row[i] = next[i];
    }
}

// to[c][r] = from[r][c] with rows and columns multiples of the lanes.
template <class T>
void transpose(const T* from, long from_stride, long rows, long columns, T* to, long to_stride) {
    constexpr long L = lanes<T>;
    for (long r = 0; r < rows; r += L) {
        for (long c = 0; c < columns; c += L) {
            Vec<T> square[L];
            ESCAIP_UNROLL
            for (long i = 0; i < L; ++i) square[i] = load(from + (r + i) * from_stride + c);
            transpose_rounds<T, L>(square);
            ESCAIP_UNROLL
            for (long i = 0; i < L; ++i) store<T>(to + (c + i) * to_stride + r, square[i]);
        }
    }
}

// ---- functions --------------------------------------------------------------------------------------------------

template <class T, int degree>
ESCAIP_INLINE Vec<T> exp_series(Vec<T> r, Vec<T> tail, T factorial) {
    // Horner: 1 + r (1 + r / 2 (1 + r / 3 (..))) written with coefficients 1 / n!.
    if constexpr (degree < 0) {
        return tail;
    } else {
        return exp_series<T, degree - 1>(r, tail * r + T(1) / factorial, degree > 0 ? factorial / degree : factorial);
    }
}

constexpr double factorial(int n) { return n <= 1 ? 1.0 : n * factorial(n - 1); }

// e^x to about 1e-7 (float) and 1e-15 (double) for x up to about 80; exactly 0 for −inf and below `least`.
template <class T>
ESCAIP_INLINE Vec<T> exponential(Vec<T> x) {
    using S = Simd<T>;
    const Vec<T> shifted = x * T(1.4426950408889634074) + S::magic;
    const Vec<T> n = shifted - S::magic;
    const Vec<T> r = (x - n * S::ln2_high) - n * S::ln2_low;
    const Vec<T> series = exp_series<T, S::exp_degree>(r, zeros<T>(), T(factorial(S::exp_degree)));
    typedef typename S::Int Int;
    const Vec<T> scaled = (Vec<T>)((Int)series + ((Int)shifted << S::mantissa_bits));
    return x < S::least ? zeros<T>() : scaled;
}

template <class T>
ESCAIP_INLINE T dot(const T* a, const T* b, long n) {
    Vec<T> total = zeros<T>();
    long i = 0;
    for (; i + lanes<T> <= n; i += lanes<T>) total += load(a + i) * load(b + i);
    T rest = 0;
    for (; i < n; ++i) rest += a[i] * b[i];
    return sum<T>(total) + rest;
}

}  // namespace escaip
