// CUDA kernel of local_attention. No torch, no launches. The gradients are in
// local_attention_backward_kernels.cuh.
#pragma once

#include "neighborhood_sums.cuh"

namespace effops::localfilter {

template <typename T>
struct AttentionArguments {
  Tiling tiling;
  Maps<const T> q, k, v;
  SumTarget<T> output;
  accumulator_t<T>* log_sum_exp;  // [N, H, W]
  accumulator_t<T> scale;
};

inline constexpr TileNeeds kAttentionNeeds{1, true, 2, 3, 0};

// The softmax of each pixel of a tile so far, and what its warps tell each other; lines of kTilePixels in
// shared memory.
template <typename A>
struct SoftmaxLines {
  A* top;        // the largest similarity, at least the lowest finite number
  A* sum;        // of exp(similarity - top)
  A* rescale;    // what the sums before the last box were multiplied by
  A* warp_top;   // [warps, kTilePixels]
  A* warp_sum;

  EFFOPS_DEVICE SoftmaxLines(const Tiling& tiling, A* lines)
      : top(lines),
        sum(top + kTilePixels),
        rescale(sum + kTilePixels),
        warp_top(rescale + kTilePixels),
        warp_sum(warp_top + tiling.warps * kTilePixels) {}
};

template <typename A>
constexpr A kLowest = sizeof(A) == 8 ? A(-0x1.fffffffffffffp1023) : A(-0x1.fffffep127f);

// Taps of [0, kernel) along an axis that lie inside for a pixel `at` of a lattice's `size`.
EFFOPS_DEVICE int64_t taps_inside(const Tiling& tiling, int64_t at, int64_t size) {
  const int64_t first = tiling.before - at, end = first + size;
  return (end < tiling.window.kernel ? end : tiling.window.kernel) - (first > 0 ? first : 0);
}

// Before the first box. Taps outside take part with similarity 0 where the border says so.
template <typename A>
EFFOPS_DEVICE void start_softmax(const Tiling& tiling, const Tile& tile, const SoftmaxLines<A>& lines) {
  for (int slot = static_cast<int>(threadIdx.x); slot < kTilePixels; slot += tiling.warps * kWarpSize) {
    const int row = row_of_slot(slot), column = column_of_slot(slot);
    int64_t outside = 0;
    if (tiling.window.padding == kZeros && tile.has(row, column)) {
      outside = tiling.window.taps() - taps_inside(tiling, tile.above + row, tile.above + tile.below) *
                                           taps_inside(tiling, tile.left + column, tile.left + tile.right);
    }
    lines.top[slot] = outside > 0 ? A(0) : kLowest<A>;
    lines.sum[slot] = static_cast<A>(outside);
  }
}

// Replaces the dot products of a box by exp(similarity - top), zeros for taps that read nothing. Threads
// touch their own taps only.
template <typename A>
EFFOPS_DEVICE void softmax_box(const Tiling& tiling, const Box& box, A scale, const SoftmaxLines<A>& lines,
                               A* sums) {
  const TileThread thread;
  A top[kLanePixels], total[kLanePixels];
#pragma unroll
  for (int j = 0; j < kLanePixels; ++j) top[j] = kLowest<A>;
  for_own_taps(tiling, box, [&](int tap, int row, int column, int j) {
    const A similarity = sums[tap * kTilePixels + thread.slot(j)] * scale;
    sums[tap * kTilePixels + thread.slot(j)] = similarity;
    if (box.has(row, column) && similarity > top[j]) top[j] = similarity;  // NaN comes back in the sum
  });
#pragma unroll
  for (int j = 0; j < kLanePixels; ++j) lines.warp_top[thread.warp * kTilePixels + thread.slot(j)] = top[j];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kLanePixels; ++j) {
    const A before = lines.top[thread.slot(j)];
    top[j] = before;
    total[j] = A(0);
    for (int warp = 0; warp < tiling.warps; ++warp) {
      const A other = lines.warp_top[warp * kTilePixels + thread.slot(j)];
      if (other > top[j]) top[j] = other;
    }
  }
  for_own_taps(tiling, box, [&](int tap, int row, int column, int j) {
    const A similarity = sums[tap * kTilePixels + thread.slot(j)];
    const A weight = box.has(row, column) ? exp(similarity - top[j]) : A(0);
    sums[tap * kTilePixels + thread.slot(j)] = weight;
    total[j] += weight;
  });
#pragma unroll
  for (int j = 0; j < kLanePixels; ++j) lines.warp_sum[thread.warp * kTilePixels + thread.slot(j)] = total[j];
  __syncthreads();
  if (thread.warp != 0) return;
#pragma unroll
  for (int j = 0; j < kLanePixels; ++j) {
    const int slot = thread.slot(j);
    const A rescale = exp(lines.top[slot] - top[j]);
    A sum = lines.sum[slot] * rescale;
    for (int warp = 0; warp < tiling.warps; ++warp) sum += lines.warp_sum[warp * kTilePixels + slot];
    lines.top[slot] = top[j];
    lines.sum[slot] = sum;
    lines.rescale[slot] = rescale;
  }
}

// output(p) = sum over the taps of softmax(scale q(p) . k(p + offset)) v(p + offset), and the softmax' log of
// the sum of exponentials.
//
// Parallelism: a block per tile of 8 x 16 pixels; the similarities of a box of taps lie in shared memory, all
// 81 of a 9 x 9 window at one time; more boxes go through a running maximum, once per box.
// Bytes: (2 halo / tile + 1) N C H W e in, N Cv H W e out, nothing of size K K; 0.5 numbers from shared
// memory per multiplication, which bound it (K K (C + Cv) multiplications per pixel). Limits: none; 64-bit
// offsets.
template <typename T>
__global__ void __launch_bounds__(kMaxTileThreads<accumulator_t<T>>, kTileBlocks)
    local_attention_kernel(AttentionArguments<T> arguments) {
  using A = accumulator_t<T>;
  EFFOPS_DYNAMIC_SHARED(BlockPlace, shared);
  const Tiling& tiling = arguments.tiling;
  const TileMemory<A> memory(tiling, shared, kAttentionNeeds.planes);
  const Tile& tile = memory.place->tile;
  const Box& box = memory.place->box;
  const SoftmaxLines<A> lines(tiling, memory.lines);
  const TileThread thread;
  for (int64_t work = blockIdx.x; work < tiling.works; work += gridDim.x) {
    enter_tile(tiling, work, /*all_taps=*/false, *memory.place);
    if (tile.is_empty()) continue;
    start_softmax(tiling, tile, lines);
    for (int64_t i = 0; i < tile.boxes; ++i) {
      enter_box(tiling, i, *memory.place);
      A* weights = memory.plane[0];
      dot_box<T>(tiling, tile, box, arguments.q, arguments.k, memory, weights);
      softmax_box(tiling, box, arguments.scale, lines, weights);
      mix_box<T>(tiling, tile, box, arguments.v, weights, memory.halo,
                 [&](int64_t quad, int slot, const Quad<A>& sum) {
                   const A rescale = lines.rescale[slot], factor = A(1) / lines.sum[slot];
                   put_sum(arguments.output, tiling, tile, box, quad, slot, sum, rescale, factor);
                 });
    }
    __syncthreads();
    for (int slot = static_cast<int>(threadIdx.x); slot < kTilePixels; slot += tiling.warps * kWarpSize) {
      const int row = row_of_slot(slot), column = column_of_slot(slot);
      if (!tile.has(row, column)) continue;
      const int64_t pixels = tiling.window.height * tiling.window.width;
      arguments.log_sum_exp[tile.image * pixels + tile.pixel(row, column)] = lines.top[slot] +
                                                                             log(lines.sum[slot]);
    }
  }
}

}  // namespace effops::localfilter
