// What the drivers of the kernels that work on rows share: the grid of a choice of threads, made small.
#pragma once

#include <algorithm>

#include "binary/row_threads_kernels.cuh"
#include "simulate.h"

namespace simulator {

// Fewer blocks than there is work, so that the kernels loop over the rest.
template <typename Group, typename Kernel, typename... Arguments>
void launch_rows(Kernel kernel, int64_t rows, const Arguments&... arguments) {
  constexpr int64_t kMaxBlocks = 2;
  const int64_t blocks = std::min(effops::binary::row_blocks<Group>(rows), kMaxBlocks);
  launch(dim3(static_cast<unsigned>(blocks)), dim3(effops::binary::kRowThreads), 0, kernel, arguments...);
}

}  // namespace simulator
