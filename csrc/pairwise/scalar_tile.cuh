// Dot products of 64 rows and 64 columns by plain instructions. No torch, no launches.
#pragma once

#include "../rowconv/row_tile.cuh"

namespace effops::pairwise {

using rowconv::kStageDepth;
using rowconv::ScalarEngine;

constexpr int kTilePoints = 64;

// Parts of rows and columns, twice: one is filled while the other is multiplied.
template <typename A>
struct ScalarStages {
  static constexpr int kSize = kTilePoints * kStageDepth<A>;
  alignas(16) A rows[2][kSize];
  alignas(16) A columns[2][kSize];
};

// dots[i][j] = row engine.row(i) . column engine.column(j), by all threads of the block, which may have read
// the stages before. Rows and columns: 64 each, `pitch` elements apart, a multiple of the depth of a stage.
template <typename A>
EFFOPS_DEVICE void multiply_tile(const ScalarEngine<A>& engine, const A* rows, const A* columns,
                                 int32_t pitch, ScalarStages<A>& stages,
                                 A (&dots)[ScalarEngine<A>::kM][ScalarEngine<A>::kN]) {
  using Engine = ScalarEngine<A>;
  static_assert(Engine::kThreads == kTilePoints * rowconv::kStageChunks, "a thread copies one chunk of each");
  const int row = static_cast<int>(threadIdx.x) / rowconv::kStageChunks;
  const int chunk = static_cast<int>(threadIdx.x) % rowconv::kStageChunks;
  const int target = rowconv::staged_at<A>(row, chunk);
  const int64_t source = int64_t{row} * pitch + chunk * kPackSize<A>;
  AsyncCopies copies;
  const auto start = [&](int32_t step) {
    copies.start(stages.rows[step % 2] + target, rows + source + step * kStageDepth<A>, true);
    copies.start(stages.columns[step % 2] + target, columns + source + step * kStageDepth<A>, true);
    copies.close_group();
  };
#pragma unroll
  for (int i = 0; i < Engine::kM; ++i) {
#pragma unroll
    for (int j = 0; j < Engine::kN; ++j) dots[i][j] = A(0);
  }
  const int32_t steps = pitch / kStageDepth<A>;
  __syncthreads();
  start(0);
  for (int32_t step = 0; step < steps; ++step) {
    copies.wait<0>();
    __syncthreads();  // the stage is there for all, and the other has been read
    if (step + 1 < steps) start(step + 1);
    engine.add(stages.rows[step % 2], stages.columns[step % 2], dots);
  }
}

}  // namespace effops::pairwise
