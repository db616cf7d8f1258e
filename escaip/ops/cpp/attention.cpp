// Neighborhood attention for the CPU: value, first and second derivative (docs/concepts/attention.md).
//
// Plain C++ with the vector extensions of GCC and Clang; compiled once for each ESCAIP_SCALAR. A thread takes whole
// neighborhoods, so that every sum is made by one thread in one order: the same bits however many threads there are.
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "kernels.h"
#include "single.h"

namespace escaip {
namespace {

// Kept by a thread from call to call, since fresh memory costs a page fault every 4 KiB; given back when large.
struct Memory {
    void* start = nullptr;
    size_t bytes = 0;
    ~Memory() { std::free(start); }
    void* reserve(size_t wanted) {
        if (wanted > bytes) {
            std::free(start);
            start = std::aligned_alloc(64, (wanted + 63) / 64 * 64);
            bytes = start ? wanted : 0;
        }
        return start;
    }
    void trim() {
        if (bytes <= (size_t(8) << 20)) return;
        std::free(start);
        start = nullptr, bytes = 0;
    }
};
thread_local Memory memory;

struct Extent {
    long most_keys = 0, most_tile = 0;
};

template <class T>
Status measure(const Problem<T>& p, Extent& extent) {
    for (long i = 0; i < p.neighborhoods; ++i) {
        const long queries = p.query_offsets[i + 1] - p.query_offsets[i], keys = p.key_offsets[i + 1] - p.key_offsets[i];
        if (queries < 0 || keys < 0) return BAD_OFFSETS;
        const long rows = std::min(block_rows<T>(queries, padded<T>(keys)), queries);
        extent.most_keys = std::max({extent.most_keys, keys, queries});
        extent.most_tile = std::max(extent.most_tile, padded<T>(rows) * padded<T>(keys));
    }
    const bool all = p.query_offsets[0] == 0 && p.key_offsets[0] == 0 &&
                     p.query_offsets[p.neighborhoods] == p.queries && p.key_offsets[p.neighborhoods] == p.tokens;
    return all ? DONE : BAD_OFFSETS;
}

template <class T>
void clear(T* to, long first, long n, long each) {
    if (to) std::fill_n(to + first * each, n * each, T(0));
}

template <class T, int order, bool angular, bool turned>
void neighborhood(Worker<T>& w, long i) {
    w.open(i);
    const long row = w.heads * w.d;
    if (w.J == 0 || w.M == 0) {
        for (T* x : {w.p.to_out, w.p.to_q}) clear(x, w.q0, w.J, row);
        for (T* x : {w.p.to_k, w.p.to_v}) clear(x, w.k0, w.M, row);
        clear(w.p.to_lse, w.q0, w.J, w.heads);
    } else if (w.J == 1 && !angular) {
        for (long head = 0; head < w.heads; ++head) {
            const Single<T> single(w, head);
            order == 0 ? single.forward() : order == 1 ? single.backward() : single.double_backward();
        }
    } else {
        order == 0   ? forward<T, angular, turned>(w)
        : order == 1 ? backward<T, angular, turned>(w)
                     : double_backward<T, angular, turned>(w);
    }
    if (order > 0) w.close();
}

// Calls work() on every thread.
template <class Work>
void on_threads(long threads, const Work& work) {
    if (threads <= 1) return work();
#ifdef _OPENMP
#pragma omp parallel num_threads(int(threads))
    work();
#else
    std::vector<std::thread> others;
    for (long i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
#endif
}

template <class T, int order, bool angular, bool turned>
Status run(const Problem<T>& p) {
    Extent extent;
    const Status status = measure(p, extent);
    if (status != DONE) return status;
    Arena<T> counter;
    Worker<T>(p, extent.most_tile, extent.most_keys, order, counter);
    const long chunk = std::max(1L, std::min(8L, long(p.neighborhoods / (4 * std::max<int64_t>(1, p.threads)))));
    std::atomic<long> next{0};
    std::atomic<Status> outcome{DONE};
    on_threads(std::min<long>(p.threads, (p.neighborhoods + chunk - 1) / chunk), [&] {
        Arena<T> arena;
        arena.memory = static_cast<T*>(memory.reserve(counter.used * sizeof(T)));
        if (!arena.memory) {
            outcome = NO_MEMORY;
            return;
        }
        Worker<T> worker(p, extent.most_tile, extent.most_keys, order, arena);
        for (long first; (first = next.fetch_add(chunk)) < p.neighborhoods;) {
            for (long i = first; i < std::min<long>(first + chunk, p.neighborhoods); ++i) {
                neighborhood<T, order, angular, turned>(worker, i);
            }
        }
        memory.trim();
    });
    return outcome;
}

template <class T, int order>
Status run(const Problem<T>& p) {
    if (p.groups == 1) return run<T, order, false, false>(p);
    return p.angular_values ? run<T, order, true, true>(p) : run<T, order, true, false>(p);
}

}  // namespace

template <class T>
Status attend(const Problem<T>& p, int order) {
    return order == 0 ? run<T, 0>(p) : order == 1 ? run<T, 1>(p) : run<T, 2>(p);
}
template Status attend(const Problem<ESCAIP_SCALAR>&, int);

}  // namespace escaip
