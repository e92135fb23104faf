// CUDA kernel of hamming_distance. No torch, no launches.
#pragma once

#include "hamming_tile_kernels.cuh"

namespace effops::binary {

struct DistanceVisitor {
  static constexpr int32_t kAbsent = 0;

  const HammingTile& tile;
  const TilePlace place;
  int32_t rows, columns;  // of the work
  int32_t* output;        // its first pair
  int64_t stride;         // from row to row of the output
  bool has_pairs;         // whether two columns can be written at once

  EFFOPS_DEVICE int32_t row_constant(int32_t norm, int) const { return norm; }
  EFFOPS_DEVICE int32_t column_constant(int32_t norm, int32_t) const { return norm; }
  EFFOPS_DEVICE void stage(int32_t) const {}

  EFFOPS_DEVICE void visit(const PairCounts& counts, int32_t first) const {
    int32_t* target = output + place.row(0) * stride + first + place.column(0, 0);
#pragma unroll
    for (int i = 0; i < 8; ++i, target += 8 * stride) {
      __syncwarp();  // keeps the compiler from holding the constants of all rows in registers
      const int row = place.row(i);
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int column = place.column(n, 0), left = columns - first - column;
        Pack<int32_t, 2> distances;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          distances.data[e] = tile.row_constants[row] + tile.column_constants[column + e] -
                              2 * counts[i / 2][n][2 * (i % 2) + e];
        }
        if (has_pairs && left > 1) {
          *reinterpret_cast<Pack<int32_t, 2>*>(target + 8 * n) = distances;
        } else {
          if (left > 0) target[8 * n] = distances.data[0];
          if (left > 1) target[8 * n + 1] = distances.data[1];
        }
      }
    }
  }
};

// output[b, i, j] = H(a[b, i], b[b, j])
//
// Parallelism: see hamming_tile_kernels.cuh. Bytes: 4 B Na Nb written, in whole sectors of 32, which bounds
// it up to 256 bits and on tensor cores always; a is read `splits` times, b once per 128 rows, from the
// second-level cache.
template <typename Counter>
__global__ void __launch_bounds__(kTileThreads, Counter::kBlocks)
    hamming_distance_kernel(HammingArguments arguments, HammingTiling tiling, int32_t* output) {
  if constexpr (Counter::kNative) {
    EFFOPS_SHARED(HammingTile, tile, 1);
    const int64_t stride = arguments.b.rows;
    for (int64_t index = blockIdx.x; index < tiling.works; index += gridDim.x) {
      const TileWork work = tiling.work(arguments, index);
      int32_t* target = output + (work.item * arguments.a.rows + work.first_row) * stride + work.first_column;
      DistanceVisitor visitor{tile[0],
                              TilePlace(threadIdx.x),
                              static_cast<int32_t>(work.end_row - work.first_row),
                              static_cast<int32_t>(work.end_column - work.first_column),
                              target,
                              stride,
                              stride % 2 == 0};
      visit_tiles<Counter>(arguments, work, tile[0], visitor);
    }
  }
}

}  // namespace effops::binary
