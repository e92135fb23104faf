// CUDA kernels of hamming_match: which nearest neighbours are matches, in the order of their rows.
// No torch, no launches.
#pragma once

#include "hamming_nearest_kernels.cuh"

namespace effops::binary {

// Each block owns consecutive rows.
struct MatchTiling {
  int64_t blocks, rows_per_block;  // the latter a multiple of kRowThreads
};

constexpr int64_t kMaxMatchBlocks = 1024;  // each block adds up the counts of those before it

inline MatchTiling make_match_tiling(int64_t rows, int64_t max_blocks) {
  const int64_t steps = (rows + kRowThreads - 1) / kRowThreads;
  const int64_t steps_each = (steps + max_blocks - 1) / max_blocks;
  return {(steps + steps_each - 1) / steps_each, steps_each * kRowThreads};
}

struct MatchArguments {
  NearestKeys keys;
  int64_t rows;
  MatchRule rule;

  EFFOPS_DEVICE bool accepts(int64_t row) const {
    if (row >= rows) return false;
    const NeighbourKey best = keys.best[row];
    const NeighbourKey second = keys.second != nullptr ? keys.second[row] : kNoNeighbour;
    return rule.accepts(distance_of(best), distance_of(second)) && !keys.is_one_sided(row, 0, index_of(best));
  }
};

// counts[block] = matches among the block's rows. Bytes: 8 to 24 per row.
__global__ void __launch_bounds__(kRowThreads)
    hamming_count_matches_kernel(MatchArguments arguments, MatchTiling tiling, int32_t* counts) {
  const int64_t first = blockIdx.x * tiling.rows_per_block;
  int32_t count = 0;
  for (int64_t i = 0; i < tiling.rows_per_block; i += kRowThreads) {
    count += __syncthreads_count(arguments.accepts(first + i + threadIdx.x));
  }
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// Writes the matches, in the order of rows, behind those of the blocks before. Bytes: 8 to 24 per row, 20 per
// match.
__global__ void __launch_bounds__(kRowThreads)
    hamming_write_matches_kernel(MatchArguments arguments, MatchTiling tiling, const int32_t* counts,
                                 int64_t* matches, int32_t* distances) {
  constexpr int kWarps = kRowThreads / kWarpSize;
  EFFOPS_SHARED(int64_t, sums, kWarps);
  EFFOPS_SHARED(int32_t, found, kWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int64_t before = 0;
  for (int64_t block = threadIdx.x; block < blockIdx.x; block += kRowThreads) before += counts[block];
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    before += __shfl_xor_sync(kFullWarp, before, offset);
  }
  if (lane == 0) sums[warp] = before;
  __syncthreads();
  before = 0;
  for (int w = 0; w < kWarps; ++w) before += sums[w];
  const int64_t first = blockIdx.x * tiling.rows_per_block;
  for (int64_t i = 0; i < tiling.rows_per_block; i += kRowThreads) {
    const int64_t row = first + i + threadIdx.x;
    const bool accepted = arguments.accepts(row);
    const uint32_t lanes = __ballot_sync(kFullWarp, accepted);
    if (lane == 0) found[warp] = __popc(lanes);
    __syncthreads();
    int64_t at = before + __popc(lanes & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += found[w];
      before += found[w];
    }
    if (accepted) {
      const NeighbourKey key = arguments.keys.best[row];
      matches[2 * at] = row;
      matches[2 * at + 1] = index_of(key);
      distances[at] = distance_of(key);
    }
    __syncthreads();  // the next rows fill `found`
  }
}

}  // namespace effops::binary
