// CUDA kernels of topk_pack. No torch, no launches.
#pragma once

#include "row_threads_kernels.cuh"
#include "topk_pack_math.h"

namespace effops::binary {

constexpr int kHalfBits = 32;  // the kernels write halves of words, which a warp's ballot gives

// The threshold of a row, from f(key) -> nothing over its keys by `for_keys`.
template <typename Group, typename A, typename Count, int kGuesses, typename ForKeys>
EFFOPS_DEVICE Threshold<A> find_threshold(int64_t length, int64_t k, const ForKeys& for_keys) {
  using Key = key_t<A>;
  if (k == 0 || k == length) return Threshold<A>::of_constant(k != 0);
  Key smallest = KeyOf<A>::nan, largest = kNoKey<A>;
  for_keys([&](Key key) {
    smallest = key < smallest ? key : smallest;
    largest = key > largest ? key : largest;
  });
  ThresholdSearch<A, kGuesses> search(Group::min(smallest), Group::max(largest), length, k);
  while (search.is_open()) {
    Key guesses[kGuesses];
    search.guess(guesses);
    Count counts[kGuesses] = {};
    for_keys([&](Key key) {
#pragma unroll
      for (int g = 0; g < kGuesses; ++g) counts[g] += key >= guesses[g];
    });
    int64_t totals[kGuesses];
#pragma unroll
    for (int g = 0; g < kGuesses; ++g) totals[g] = Group::sum(counts[g]);
    search.update(guesses, totals);
  }
  return search.threshold();
}

// The bits of 32 neighbouring keys, one per lane. `ties`: ones still to be given to keys at the tie.
template <typename A>
EFFOPS_DEVICE uint32_t bits_of_keys(key_t<A> key, key_t<A> high, int64_t& ties) {
  const uint32_t above = __ballot_sync(kFullWarp, key >= high);
  if (ties <= 0) return above;
  const uint32_t equal = __ballot_sync(kFullWarp, key == high - 1);
  const uint32_t before = equal & ((1u << (threadIdx.x % kWarpSize)) - 1);
  const bool taken = key == high - 1 && __popc(before) < ties;
  ties -= __popc(equal);
  return above | __ballot_sync(kFullWarp, taken);
}

// Bit j of out[row] = x[row, j] is among the k largest of its row, ties to the lowest index.
//
// Parallelism: a warp per row, whose keys it holds in registers: kPerLane of 32 neighbours each. The
// threshold is found by counting keys above a guess, about six times (topk_pack_math.h); ballots are the
// bits. Bytes: x once, one bit per element. Bound by instructions: about 6 (2 kPerLane + 60) per lane.
// Limits: length <= 32 kPerLane.
template <typename T, int kPerLane>
__global__ void __launch_bounds__(kRowThreads, 1)
    topk_pack_warp_kernel(const T* x, int64_t rows, int32_t length, int32_t k, uint32_t* out) {
  using A = accumulator_t<T>;
  using Key = key_t<A>;
  static_assert(kPerLane <= kWarpSize, "a lane writes one half word");
  const int lane = RowWarp::rank(), halves = (length + 2 * kHalfBits - 1) / (2 * kHalfBits) * 2;
  const int64_t step = int64_t{gridDim.x} * RowWarp::rows;
  for (int64_t r = int64_t{blockIdx.x} * RowWarp::rows + RowWarp::row(); r < rows; r += step) {
    Key keys[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t j = i * kWarpSize + lane;
      keys[i] = j < length ? key_of(A(widen(load_pack<1>(x + r * length + j).data[0]))) : kNoKey<A>;
    }
    const Threshold<A> threshold = find_threshold<RowWarp, A, int32_t, 1>(length, k, [&](const auto& f) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (keys[i] != kNoKey<A>) f(keys[i]);
      }
    });
    int64_t ties = threshold.ties;
    uint32_t half = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const uint32_t bits = bits_of_keys<A>(keys[i], threshold.high, ties);
      if (lane == i) half = bits;
    }
    if (lane < halves) out[r * halves + lane] = half;
  }
}

// The same for rows of any length.
//
// Parallelism: a block per row. Keys are made anew from x at each of about five counts of four guesses. The
// bits are written by warps, each for a run of the row; where there are ties a count tells what the runs
// before have taken.
// Bytes: x about seven times, from the second-level cache. Bound by its bandwidth or by too few rows.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 1)
    topk_pack_block_kernel(const T* x, int64_t rows, int64_t length, int64_t k, uint32_t* out) {
  using A = accumulator_t<T>;
  EFFOPS_SHARED(int64_t, ties_of_warp, kRowWarps);
  const int lane = RowWarp::rank(), warp = RowWarp::row();
  const int64_t halves = (length + 2 * kHalfBits - 1) / (2 * kHalfBits) * 2;
  const int64_t run = (halves + kRowWarps - 1) / kRowWarps;
  const int64_t begin = warp * run, end = begin + run < halves ? begin + run : halves;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const RowElements<T, RowBlock, 0> elements(x + r * length, length);
    const auto key_at = [&](int64_t j) { return j < length ? key_of(elements.at(0, j)) : kNoKey<A>; };
    const Threshold<A> threshold = find_threshold<RowBlock, A, int64_t, 4>(
        length, k, [&](const auto& f) { elements.for_each([&](A value, int64_t) { f(key_of(value)); }); });
    int64_t ties = threshold.ties;
    if (ties > 0) {
      int64_t found = 0;
      for (int64_t h = begin; h < end; ++h) found += key_at(h * kHalfBits + lane) == threshold.high - 1;
      found = sum_of_warp(found);
      if (lane == 0) ties_of_warp[warp] = found;
      __syncthreads();  // those of the next row's search come before the next write
      for (int w = 0; w < warp; ++w) ties -= ties_of_warp[w];
    }
    for (int64_t h = begin; h < end; ++h) {
      const uint32_t bits = bits_of_keys<A>(key_at(h * kHalfBits + lane), threshold.high, ties);
      if (lane == 0) out[r * halves + h] = bits;
    }
  }
}

}  // namespace effops::binary
