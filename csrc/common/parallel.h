// Threads: torch's own pool, so that torch.set_num_threads holds for effops too.
#pragma once

#include <cstdint>

#include "torch.h"

namespace effops {

// Calls f(begin, end) on pieces of [0, count) of at least `grain` items. f must not throw: an exception
// inside a worker thread loses its text. Work has to be split by output, never by a sum's terms, so that
// results do not depend on the number of threads.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, count, grain, f);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t num_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

}  // namespace effops
