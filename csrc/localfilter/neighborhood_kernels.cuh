// CUDA kernels of neighborhood_dot and neighborhood_mix, which are also each other's gradients. No torch, no
// launches.
#pragma once

#include "neighborhood_sums.cuh"

namespace effops::localfilter {

template <typename T>
struct DotArguments {
  Tiling tiling;
  Maps<const T> q, k;
  Maps<T> output;  // [N, K * K, H, W]
};

inline constexpr TileNeeds kDotNeeds{1, true, 0, 0, 0};

// output[tap](p) = sum_c q_c(p) k_c(p + offset of the tap), 0 where the tap lies outside.
//
// Parallelism: a block per tile of 8 x 16 pixels and box of taps; warps share the columns of taps, lanes the
// pixels, threads hold 8 channels of 4 pixels in registers.
// Bytes: K K N H W e for the output, (1 + halo / tile) N C H W e for the inputs; 0.5 numbers from shared
// memory per multiplication. Bound by the output's bytes for few channels, by shared memory beyond about 16.
// Limits: none; 64-bit offsets.
template <typename T>
__global__ void __launch_bounds__(kMaxTileThreads<accumulator_t<T>>, kTileBlocks)
    neighborhood_dot_kernel(DotArguments<T> arguments) {
  using A = accumulator_t<T>;
  EFFOPS_DYNAMIC_SHARED(BlockPlace, shared);
  const Tiling& tiling = arguments.tiling;
  const TileMemory<A> memory(tiling, shared, kDotNeeds.planes);
  const Tile& tile = memory.place->tile;
  const Box& box = memory.place->box;
  const TileThread thread;
  for (int64_t work = blockIdx.x; work < tiling.works; work += gridDim.x) {
    enter_tile(tiling, work, /*all_taps=*/true, *memory.place);
    if (tile.is_empty()) continue;
    for (int64_t i = 0; i < tile.boxes; ++i) {
      enter_box(tiling, i, *memory.place);
      const A* sums = memory.plane[0];
      dot_box<T>(tiling, tile, box, arguments.q, arguments.k, memory, memory.plane[0]);
      for_own_taps(tiling, box, [&](int tap, int row, int column, int j) {
        if (!tile.has(thread.row + j, thread.column)) return;
        const int tap_row = row - thread.row - j, tap_column = column - thread.column;
        const int64_t channel = (box.tap_row + tap_row) * tiling.window.kernel + box.tap_column + tap_column;
        const A sum = sums[tap * kTilePixels + thread.slot(j)];
        *arguments.output.at(tile.image, tile.pixel(thread.row + j, thread.column), channel) =
            narrow<T>(box.has(row, column) ? sum : A(0));
      });
    }
  }
}

template <typename T>
struct MixArguments {
  Tiling tiling;           // mirrored for the transposed sum
  Maps<const T> weights;   // [N, K * K, H, W]
  Maps<const T> maps;
  SumTarget<T> output;
  bool transposed;
};

inline constexpr TileNeeds kMixNeeds{1, false, 0, 0, 0};

// output(p) = sum over the taps of weights[tap](p) v(p + offset of the tap), without those outside;
// transposed: output(u) = sum over the taps of weights[tap](p) v(p) for the pixel p = u - offset of the tap,
// without those outside: a gather, every element is written once and in a fixed order.
//
// Parallelism: as neighborhood_dot_kernel, but warps share the channels, four each.
// Bytes: K K N H W e for the weights, (1 + halo / tile) N C H W e for the rest; 0.5 numbers from shared
// memory per multiplication. Bound by the weights' bytes for few channels, by shared memory beyond about 16.
// Limits: none; 64-bit offsets.
template <typename T>
__global__ void __launch_bounds__(kMaxTileThreads<accumulator_t<T>>, kTileBlocks)
    neighborhood_mix_kernel(MixArguments<T> arguments) {
  using A = accumulator_t<T>;
  EFFOPS_DYNAMIC_SHARED(BlockPlace, shared);
  const Tiling& tiling = arguments.tiling;
  const TileMemory<A> memory(tiling, shared, kMixNeeds.planes);
  const Tile& tile = memory.place->tile;
  const Box& box = memory.place->box;
  const TileThread thread;
  const int64_t kernel = tiling.window.kernel;
  for (int64_t work = blockIdx.x; work < tiling.works; work += gridDim.x) {
    enter_tile(tiling, work, /*all_taps=*/false, *memory.place);
    if (tile.is_empty()) continue;
    for (int64_t i = 0; i < tile.boxes; ++i) {
      enter_box(tiling, i, *memory.place);
      A* weights = memory.plane[0];
      for_own_taps<4>(tiling, box, [&](int tap, int row, int column, int j) {
        const int64_t tap_row = box.tap_row + row - thread.row - j;
        const int64_t tap_column = box.tap_column + column - thread.column;
        const int64_t index = tap_row * kernel + tap_column;
        const bool exists = tile.has(thread.row + j, thread.column) && box.has(row, column);
        int64_t channel = 0, pixel = 0;  // read for nothing, so that loads do not wait for each other
        if (exists) {
          channel = arguments.transposed ? kernel * kernel - 1 - index : index;
          pixel = arguments.transposed ? box.pixel(row, column) : tile.pixel(thread.row + j, thread.column);
        }
        const T weight = load_pack<1>(arguments.weights.at(tile.image, pixel, channel)).data[0];
        weights[tap * kTilePixels + thread.slot(j)] = exists ? widen(weight) : A(0);
      });
      mix_box<T>(tiling, tile, box, arguments.maps, weights, memory.halo,
                 [&](int64_t quad, int slot, const Quad<A>& sum) {
                   put_sum(arguments.output, tiling, tile, box, quad, slot, sum, A(1), A(1));
                 });
    }
  }
}

}  // namespace effops::localfilter
