// CUDA kernels of the gradients of local_attention, without atomics: each pixel gathers. No torch, no
// launches.
//
// With p = exp(scale q . k - log-sum-exp), D = grad_output . output and dS = scale p (grad_output . v - D) of
// a query and a tap, all recomputed:
//   grad_q(p) = sum over the taps of dS k(p + offset)
//   grad_k(u) = sum over the queries p = u - offset of dS q(p), grad_v(u) = the same of p grad_output(p)
// Taps outside have no keys, values or queries: they enter through the log-sum-exp alone.
#pragma once

#include "neighborhood_sums.cuh"

namespace effops::localfilter {

constexpr int kDeltaThreads = 256;

// delta[n, y, x] = grad_output . output. One thread per pixel.
// Bytes: 2 N Cv H W e, which bound it.
template <typename T>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(Maps<const T> grad_output, Maps<const T> output, int64_t images, int64_t pixels,
                           accumulator_t<T>* delta) {
  using A = accumulator_t<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kDeltaThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x; i < images * pixels;
       i += step) {
    const int64_t image = i / pixels, pixel = i - image * pixels;
    A sum = A(0);
#pragma unroll 4
    for (int64_t c = 0; c < output.channels; ++c) {
      sum += widen(load_pack<1>(grad_output.at(image, pixel, c)).data[0]) *
             widen(load_pack<1>(output.at(image, pixel, c)).data[0]);
    }
    delta[i] = sum;
  }
}

template <typename T>
struct AttentionGradArguments {
  Tiling tiling;  // mirrored for keys and values
  Maps<const T> q, k, v, grad_output;
  const accumulator_t<T>*log_sum_exp, *delta;  // [N, H, W]
  accumulator_t<T> scale;
  SumTarget<T> grad_q, grad_k, grad_v;
  bool need_k, need_v;
};

inline constexpr TileNeeds kQueryGradNeeds{2, true, 0, 0, 0};

// grad_q. Parallelism: as local_attention_kernel, with two numbers per tap and pixel of a box in shared
// memory. Bytes: (3 halo / tile + 2) N C H W e in, N C H W e out; 0.5 numbers from shared memory per
// multiplication, which bound it (K K (2 C + Cv) multiplications per pixel). Sums over more than one box pass
// through memory once per box. Limits: none; 64-bit offsets.
template <typename T>
__global__ void __launch_bounds__(kMaxTileThreads<accumulator_t<T>>, kTileBlocks)
    attention_query_grad_kernel(AttentionGradArguments<T> arguments) {
  using A = accumulator_t<T>;
  EFFOPS_DYNAMIC_SHARED(BlockPlace, shared);
  const Tiling& tiling = arguments.tiling;
  const TileMemory<A> memory(tiling, shared, kQueryGradNeeds.planes);
  const Tile& tile = memory.place->tile;
  const Box& box = memory.place->box;
  const TileThread thread;
  const A scale = arguments.scale;
  const int64_t pixels = tiling.window.height * tiling.window.width;
  for (int64_t work = blockIdx.x; work < tiling.works; work += gridDim.x) {
    enter_tile(tiling, work, /*all_taps=*/false, *memory.place);
    if (tile.is_empty()) continue;
    A log_sum_exp[kLanePixels], delta[kLanePixels];
#pragma unroll
    for (int j = 0; j < kLanePixels; ++j) {
      const bool exists = tile.has(thread.row + j, thread.column);
      const int64_t pixel = tile.image * pixels + tile.pixel(thread.row + j, thread.column);
      log_sum_exp[j] = exists ? arguments.log_sum_exp[pixel] : A(0);
      delta[j] = exists ? arguments.delta[pixel] : A(0);
    }
    for (int64_t i = 0; i < tile.boxes; ++i) {
      enter_box(tiling, i, *memory.place);
      A *weights = memory.plane[0], *value_dots = memory.plane[1];
      dot_box<T>(tiling, tile, box, arguments.q, arguments.k, memory, weights);
      dot_box<T>(tiling, tile, box, arguments.grad_output, arguments.v, memory, value_dots);
      for_own_taps(tiling, box, [&](int tap, int row, int column, int j) {
        const int at = tap * kTilePixels + thread.slot(j);
        const A similarity = weights[at], value_dot = value_dots[at];
        weights[at] = box.has(row, column)
                          ? exp(similarity * scale - log_sum_exp[j]) * (value_dot - delta[j]) * scale
                          : A(0);
      });
      mix_box<T>(tiling, tile, box, arguments.k, weights, memory.halo,
                 [&](int64_t quad, int slot, const Quad<A>& sum) {
                   put_sum(arguments.grad_q, tiling, tile, box, quad, slot, sum, A(1), A(1));
                 });
    }
  }
}

inline constexpr TileNeeds kKeyGradNeeds{2, true, 0, 0, 2};

// line[row][column] of the halo = numbers[N, H, W] of its pixels, 0 where there is none.
template <typename A>
EFFOPS_DEVICE void stage_numbers(const Tiling& tiling, const Tile& tile, const Box& box, const A* numbers,
                                 A* line) {
  const int64_t pixels = tiling.window.height * tiling.window.width;
  const int columns = box.halo_columns(), places = box.halo_rows() * columns;
  for (int i = static_cast<int>(threadIdx.x); i < places; i += tiling.warps * kWarpSize) {
    const int row = i / columns, column = i - row * columns;
    const bool exists = box.has(row, column);
    line[i] = exists ? numbers[tile.image * pixels + box.pixel(row, column)] : A(0);
  }
}

// grad_k and grad_v. The tile is of keys, its halo of the queries whose taps read them.
// Parallelism, bound, limits: as attention_query_grad_kernel. Bytes: (3 halo / tile + 2) N C H W e in,
// 2 N C H W e out; K K (2 C + 2 Cv) multiplications per pixel.
template <typename T>
__global__ void __launch_bounds__(kMaxTileThreads<accumulator_t<T>>, kTileBlocks)
    attention_key_grad_kernel(AttentionGradArguments<T> arguments) {
  using A = accumulator_t<T>;
  EFFOPS_DYNAMIC_SHARED(BlockPlace, shared);
  const Tiling& tiling = arguments.tiling;
  const TileMemory<A> memory(tiling, shared, kKeyGradNeeds.planes);
  const Tile& tile = memory.place->tile;
  const Box& box = memory.place->box;
  const TileThread thread;
  const A scale = arguments.scale;
  for (int64_t work = blockIdx.x; work < tiling.works; work += gridDim.x) {
    enter_tile(tiling, work, /*all_taps=*/false, *memory.place);
    if (tile.is_empty()) continue;
    for (int64_t i = 0; i < tile.boxes; ++i) {
      enter_box(tiling, i, *memory.place);
      const int width = box.halo_columns();
      A *weights = memory.plane[0], *value_dots = memory.plane[1];
      A *log_sum_exp = memory.lines, *delta = log_sum_exp + box.halo_rows() * width;
      stage_numbers(tiling, tile, box, arguments.log_sum_exp, log_sum_exp);
      if (arguments.need_k) stage_numbers(tiling, tile, box, arguments.delta, delta);
      __syncthreads();
      dot_box<T>(tiling, tile, box, arguments.k, arguments.q, memory, weights);
      for_own_taps(tiling, box, [&](int tap, int row, int column, int j) {
        const int at = tap * kTilePixels + thread.slot(j);
        const A similarity = weights[at], log_sum = log_sum_exp[row * width + column];
        weights[at] = box.has(row, column) ? exp(similarity * scale - log_sum) : A(0);
      });
      if (arguments.need_v) {
        mix_box<T>(tiling, tile, box, arguments.grad_output, weights, memory.halo,
                   [&](int64_t quad, int slot, const Quad<A>& sum) {
                     put_sum(arguments.grad_v, tiling, tile, box, quad, slot, sum, A(1), A(1));
                   });
      }
      if (!arguments.need_k) continue;
      dot_box<T>(tiling, tile, box, arguments.v, arguments.grad_output, memory, value_dots);
      for_own_taps(tiling, box, [&](int tap, int row, int column, int j) {
        const int at = tap * kTilePixels + thread.slot(j);
        const A weight = weights[at], value_dot = value_dots[at], query_delta = delta[row * width + column];
        weights[at] = box.has(row, column) ? weight * (value_dot - query_delta) * scale : A(0);
      });
      mix_box<T>(tiling, tile, box, arguments.q, weights, memory.halo,
                 [&](int64_t quad, int slot, const Quad<A>& sum) {
                   put_sum(arguments.grad_k, tiling, tile, box, quad, slot, sum, A(1), A(1));
                 });
    }
  }
}

}  // namespace effops::localfilter
