// Convolutions in small groups, depthwise ones above all, over sparse rows: too little to multiply for tiles.
// No torch, no launches.
#pragma once

#include "../common/warp.h"
#include "row_gemm.cuh"

namespace effops::rowconv {

constexpr int kDirectThreads = 256;
constexpr int kDirectChannels = 8;  // of a thread: a byte of signs

// Whether the tiles of row_gemm_kernels.cuh fit the groups; signs need groups of whole bytes.
inline bool takes_direct_kernel(int64_t groups, int64_t depth, int64_t columns) {
  constexpr int64_t kLeastChannels = 16;
  return groups > 1 && (columns % 8 != 0 || columns < kLeastChannels || depth < kLeastChannels);
}

template <typename T>
struct DirectSums {
  using A = accumulator_t<T>;
  const RowGemm<T>& gemm;
  int64_t first;  // channel
  int count;  // that exist, of kDirectChannels
  A sums[kDirectChannels];

  // A row of the operand times the weights of a tap.
  EFFOPS_DEVICE void add_row(const T* values, int64_t tap) {
    const int64_t channels = gemm.channels();
    const T* weights = gemm.weights + tap * channels * int64_t{gemm.padded_depth};
#pragma unroll
    for (int e = 0; e < kDirectChannels; ++e) {
      if (e >= count) continue;
      const int64_t channel = first + e;
      const T* own = values + channel / gemm.columns * gemm.depth;
      for (int64_t k = 0; k < gemm.depth; ++k) {
        sums[e] += widen(own[k]) * widen(weights[channel * gemm.padded_depth + k]);
      }
    }
  }

  // The same for depthwise convolutions whose rows can be read 16 bytes at a time.
  EFFOPS_DEVICE void add_depthwise(const T* values, int64_t tap) {
    const T* weights = gemm.weights + tap * int64_t{gemm.groups} + first;
    constexpr int kPack = kPackSize<T>;
#pragma unroll
    for (int p = 0; p < kDirectChannels; p += kPack) {
      if (p >= count) continue;
      A value[kPack], weight[kPack];
      widen_pack(load_pack<kPack>(values + first + p), value);
      widen_pack(load_pack<kPack>(weights + p), weight);
#pragma unroll
      for (int e = 0; e < kPack; ++e) sums[p + e] += value[e] * weight[e];
    }
  }

  EFFOPS_DEVICE void add_branch(const RowPlace& place, TapWalk& tap) {
    const int32_t branch = tap.branch;
    const bool depthwise = gemm.depth == 1 && gemm.columns == 1 && gemm.operand.aligned;
    for (; !tap.is_done(gemm.branches) && tap.branch == branch; tap.advance(gemm.branches)) {
      const int64_t row = gemm.source.row(place, gemm.branches, tap);
      if (row == kNoRow) continue;
      const bool is_sum = row < kNoRow;
      const int64_t bucket = is_sum ? bucket_of_sum(row) : 0;
      const int64_t begin = is_sum ? gemm.source.offsets[bucket] : 0;
      const int64_t end = is_sum ? gemm.source.offsets[bucket + 1] : 1;
      for (int64_t member = begin; member < end; ++member) {
        const int64_t own = is_sum ? gemm.source.member(member, tap.index) : row;
        const T* values = gemm.operand.row(own, branch);
        if (depthwise) {
          add_depthwise(values, tap.index);
        } else {
          add_row(values, tap.index);
        }
      }
    }
  }

  // Adds the bias; with relu returns a bit per channel that passes it.
  EFFOPS_DEVICE uint32_t activate(int32_t branch) {
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < kDirectChannels; ++e) {
      if (e >= count) continue;
      if (gemm.bias[branch] != nullptr) sums[e] += widen(gemm.bias[branch][first + e]);
      const bool passes = !gemm.relu || !(sums[e] <= A(0));
      bits |= uint32_t{passes} << e;
      if (!passes) sums[e] = A(0);
    }
    return bits;
  }
};

template <typename T>
EFFOPS_DEVICE void store_direct(const RowGemm<T>& gemm, int64_t row, int64_t first, int count,
                                accumulator_t<T> (&totals)[kDirectChannels]) {
  using A = accumulator_t<T>;
  const int64_t cell = gemm.positions == nullptr ? row : gemm.positions[row];
  if (cell < 0 || cell >= gemm.limit) return;
  const int64_t offset = gemm.layout.offset(cell);
#pragma unroll
  for (int e = 0; e < kDirectChannels; ++e) {
    if (e >= count) continue;
    A total = totals[e];
    if (gemm.addend != nullptr) total += widen(gemm.addend[row * gemm.channels() + first + e]);
    if (gemm.scale != nullptr) total *= gemm.scale_of(cell);
    const int64_t at = offset + (first + e) * gemm.layout.channel_stride;
    if (gemm.wide_result) {
      static_cast<A*>(gemm.result)[at] = total;
    } else {
      static_cast<T*>(gemm.result)[at] = narrow<T>(total);
    }
  }
}

// `count` channels of a row of the result, from `first` on.
template <typename T>
EFFOPS_DEVICE void convolve_directly(const RowGemm<T>& gemm, int64_t row, int64_t first, int count) {
  const RowPlace place = gemm.source.place(row);
  accumulator_t<T> totals[kDirectChannels] = {};
  TapWalk tap;
  for (int32_t branch = 0; branch < gemm.branches.count; ++branch) {
    DirectSums<T> own{gemm, first, count, {}};
    own.add_branch(place, tap);
    const uint32_t bits = own.activate(branch);
    if (gemm.signs != nullptr) {
      gemm.signs[(branch * gemm.rows + row) * gemm.sign_bytes + first / 8] = static_cast<uint8_t>(bits);
    }
#pragma unroll
    for (int e = 0; e < kDirectChannels; ++e) totals[e] += own.sums[e];
  }
  store_direct(gemm, row, first, count, totals);
}

// As row_gemm_kernel, with weights [taps, groups, columns, depth] that are not padded.
//
// Parallelism: a thread per row and 8 channels. Bytes: the operand's rows once per tap, from the caches where
// rows share them; the result once. Bound: bandwidth where depthwise, else the loads of the operand.
template <typename T>
__global__ void __launch_bounds__(kDirectThreads, 2)
    row_direct_kernel(const __grid_constant__ RowGemm<T> gemm) {
  const int64_t octets = (gemm.channels() + kDirectChannels - 1) / kDirectChannels;
  const int64_t total = gemm.existing_rows() * octets, step = int64_t{gridDim.x} * kDirectThreads;
  for (int64_t i = int64_t{blockIdx.x} * kDirectThreads + threadIdx.x; i < total; i += step) {
    const int64_t row = i / octets, first = (i - row * octets) * kDirectChannels;
    convolve_directly(gemm, row, first,
                      static_cast<int>(min(gemm.channels() - first, int64_t{kDirectChannels})));
  }
}

}  // namespace effops::rowconv
