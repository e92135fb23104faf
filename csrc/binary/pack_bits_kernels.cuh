// CUDA kernels of pack_bits and unpack_bits. No torch, no launches.
#pragma once

#include "../common/dtype.h"
#include "../common/host_device.h"
#include "../common/warp.h"

namespace effops::binary {

constexpr int kPackThreads = 256;
constexpr int kPackWarps = kPackThreads / kWarpSize;
constexpr int kWordsPerTurn = 8;  // of a warp: that many pairs of loads are under way

EFFOPS_DEVICE bool is_one(uint8_t value) { return value != 0; }
template <typename T>
EFFOPS_DEVICE bool is_one(T value) {
  return widen(value) > accumulator_t<T>(0);
}

// out[row, word], bit j = x[row, 64 word + j] > 0; bits after the end of a row are 0.
//
// Parallelism: a warp takes kWordsPerTurn words, counted over all rows; each half of a word is a ballot.
// Bytes: x once, one bit per element. Bound by memory.
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_bits_kernel(const T* x, int64_t rows, int64_t bits, int64_t words, uint64_t* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t total = rows * words, step = int64_t{gridDim.x} * kPackWarps * kWordsPerTurn;
  int64_t first = (int64_t{blockIdx.x} * kPackWarps + threadIdx.x / kWarpSize) * kWordsPerTurn;
  for (; first < total; first += step) {
    int64_t row = first / words, word = first % words;
    bool ones[kWordsPerTurn][2];
#pragma unroll
    for (int i = 0; i < kWordsPerTurn; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t j = word * 64 + half * kWarpSize + lane;
        ones[i][half] = row < rows && j < bits && is_one(load_pack_once<1>(x + row * bits + j).data[0]);
      }
      if (++word == words) {
        word = 0;
        ++row;
      }
    }
    uint64_t mine = 0;
#pragma unroll
    for (int i = 0; i < kWordsPerTurn; ++i) {
      const uint32_t low = __ballot_sync(kFullWarp, ones[i][0]), high = __ballot_sync(kFullWarp, ones[i][1]);
      if (lane == i) mine = uint64_t{high} << 32 | low;
    }
    if (lane < kWordsPerTurn && first + lane < total) out[first + lane] = mine;
  }
}

// out[row, j] = bit j of the row that begins at byte row * stride.
//
// Parallelism: a thread takes the 8 bits of one packed byte.
// Bytes: one bit read and one byte written per element. Bound by memory.
// Limits: with kVector the rows are whole bytes, so that the 8 results are one access.
template <bool kVector>
__global__ void __launch_bounds__(kPackThreads)
    unpack_bits_kernel(const uint8_t* packed, int64_t stride, int64_t rows, int64_t bits, uint8_t* out) {
  const int64_t bytes = (bits + 7) / 8, total = rows * bytes, step = int64_t{gridDim.x} * kPackThreads;
  for (int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x; i < total; i += step) {
    const int64_t row = i / bytes, byte = i % bytes;
    const uint32_t value = load_pack<1>(packed + row * stride + byte).data[0];
    uint8_t* to = out + row * bits + byte * 8;
    if constexpr (kVector) {
      Pack<uint8_t, 8> result;
#pragma unroll
      for (int j = 0; j < 8; ++j) result.data[j] = static_cast<uint8_t>(value >> j & 1);
      store_pack_once(to, result);
    } else {
      for (int64_t j = 0; j < 8 && byte * 8 + j < bits; ++j) to[j] = static_cast<uint8_t>(value >> j & 1);
    }
  }
}

// Blocks that give each thread (or warp) one turn.
inline int64_t pack_blocks(int64_t words) {
  constexpr int64_t per_block = kPackWarps * kWordsPerTurn;
  return (words + per_block - 1) / per_block;
}
inline int64_t unpack_blocks(int64_t bytes) { return (bytes + kPackThreads - 1) / kPackThreads; }

}  // namespace effops::binary
