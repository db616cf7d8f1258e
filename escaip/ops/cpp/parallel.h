// Tasks divided between PyTorch's threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace escaip {

// Calls task(i) for each i below count. What a task writes is its own, so threads change nothing.
template <class Task>
void in_parallel(int64_t count, int64_t threads, const Task& task) {
#ifdef _OPENMP
    if (threads > 1 && count > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(int(std::min(threads, count)))
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace escaip
