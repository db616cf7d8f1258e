// One query per neighborhood and no angles (the self token as the only query): plain passes over the keys.
#pragma once

#include "worker.h"

namespace escaip {

template <class T>
struct Single {
    Worker<T>& w;
    const long head, d, width, stride;
    T *p, *dp;  // per key

    Single(Worker<T>& worker, long of_head)
        : w(worker), head(of_head), d(worker.d), width(worker.start[1]), stride(worker.heads * worker.d), p(worker.sums),
          dp(worker.rows) {}

    const T* row(const T* x, long first) const { return x + first * stride + head * d; }
    T* row(T* x, long first) const { return x + first * stride + head * d; }

    void add(T* to, T factor, const T* x, long n) const {
        for (long c = 0; c < n; ++c) to[c] += factor * x[c];
    }

    void forward() const {
        const T *q = row(w.p.q, w.q0), *k = row(w.p.k, w.k0), *v = row(w.p.v, w.k0);
        T* out = row(w.p.to_out, w.q0);
        T top = -std::numeric_limits<T>::infinity(), total = 0;
        for (long m = 0; m < w.M; ++m) {
            p[m] = T(w.p.scale) * dot(q, k + m * stride, width) + w.bias[m];
            top = std::max(top, p[m]);
        }
        exponentials(top);
        for (long m = 0; m < w.M; ++m) total += p[m];
        for (long c = 0; c < d; ++c) out[c] = 0;
        for (long m = 0; m < w.M; ++m) add(out, p[m] / total, v + m * stride, d);
        w.p.to_lse[w.q0 * w.heads + head] = top + std::log(total);
    }

    void exponentials(T shift) const {
        for (long m = w.M; m < w.Mp; ++m) p[m] = shift;
        for (long m = 0; m < w.Mp; m += lanes<T>) store<T>(p + m, exponential<T>(load(p + m) - shift));
    }

    void probabilities(const T* q, const T* k) const {
        for (long m = 0; m < w.M; ++m) p[m] = T(w.p.scale) * dot(q, k + m * stride, width) + w.bias[m];
        exponentials(w.p.lse[w.q0 * w.heads + head]);
    }

    // to[0 .. width) = a x + b y, zero up to d.
    void combine(T* to, T a, const T* x, T b, const T* y) const {
        for (long c = 0; c < width; ++c) to[c] = a * x[c] + (y ? b * y[c] : T(0));
        for (long c = width; c < d; ++c) to[c] = 0;
    }

    void backward() const {
        const T *q = row(w.p.q, w.q0), *k = row(w.p.k, w.k0), *v = row(w.p.v, w.k0), *g = row(w.p.grad_out, w.q0);
        T *dq = row(w.p.to_q, w.q0), *dk = row(w.p.to_k, w.k0), *dv = row(w.p.to_v, w.k0);
        const T D = dot(g, row(w.p.out, w.q0), d), scale = T(w.p.scale);
        probabilities(q, k);
        for (long c = 0; c < d; ++c) dq[c] = 0;
        for (long m = 0; m < w.M; ++m) {
            const T r = p[m] * (dot(g, v + m * stride, d) - D);
            w.db[m] += r;
            add(dq, scale * r, k + m * stride, width);
            combine(dk + m * stride, scale * r, q, T(0), nullptr);
            for (long c = 0; c < d; ++c) dv[m * stride + c] = p[m] * g[c];
        }
    }

    void double_backward() const {
        const T *q = row(w.p.q, w.q0), *k = row(w.p.k, w.k0), *v = row(w.p.v, w.k0), *g = row(w.p.grad_out, w.q0);
        const T *tq = row(w.p.tq, w.q0), *tk = row(w.p.tk, w.k0), *tv = row(w.p.tv, w.k0);
        T *gq = row(w.p.to_q, w.q0), *gk = row(w.p.to_k, w.k0), *gv = row(w.p.to_v, w.k0), *go = row(w.p.to_out, w.q0);
        const T D = dot(g, row(w.p.out, w.q0), d), scale = T(w.p.scale);
        T mu = 0;
        probabilities(q, k);
        for (long m = 0; m < w.M; ++m) {
            dp[m] = scale * (dot(tq, k + m * stride, width) + dot(q, tk + m * stride, width)) + w.tbias[m];
            mu += p[m] * dp[m];
        }
        for (long c = 0; c < d; ++c) go[c] = gq[c] = 0;
        for (long m = 0; m < w.M; ++m) {
            dp[m] = p[m] * (dp[m] - mu);
            add(go, dp[m], v + m * stride, d);
            add(go, p[m], tv + m * stride, d);
        }
        const T dD = dot(g, go, d);
        for (long m = 0; m < w.M; ++m) {
            const T centred = dot(g, v + m * stride, d) - D, r = p[m] * centred;
            const T dr = dp[m] * centred + p[m] * (dot(g, tv + m * stride, d) - dD);
            w.db[m] += dr;
            add(gq, scale * dr, k + m * stride, width);
            add(gq, scale * r, tk + m * stride, width);
            combine(gk + m * stride, scale * dr, q, scale * r, tq);
            for (long c = 0; c < d; ++c) gv[m * stride + c] = dp[m] * g[c];
        }
    }
};

}  // namespace escaip
