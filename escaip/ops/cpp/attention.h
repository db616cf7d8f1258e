// The attention problem: symbols of docs/concepts/attention.md, arrays contiguous.
#pragma once

#include <cstdint>

namespace escaip {

constexpr long MOST_GROUPS = 5;  // l = 0 .. 4

// Pointers that a call does not use are null.
template <class T>
struct Problem {
    int64_t neighborhoods, queries, tokens, heads, head_size, groups, threads;
    int64_t widths[MOST_GROUPS];
    double scale;
    bool angular_values;  // channels of degree l of the values are multiplied by P_l, too; only with more than one group
    const int64_t *query_offsets, *key_offsets;
    const T *q, *k, *v, *log_envelope, *direction, *grad_out, *out, *lse, *tq, *tk, *tv, *tb, *tn;
    // Value: (out, lse). First derivative: dq, dk, dv, db, dn. Second: the same of the tangents, and g_out.
    T *to_out, *to_lse, *to_q, *to_k, *to_v, *to_b, *to_n;
};

enum Status { DONE = 0, BAD_OFFSETS = 1, NO_MEMORY = 2 };

// Computes the value (order 0) or a derivative.
template <class T>
Status attend(const Problem<T>& p, int order);

}  // namespace escaip
