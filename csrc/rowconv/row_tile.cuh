// Tiles of products in shared memory, and the two ways of multiplying them. No torch, no launches.
//
//   sums[i][j] += sum_k left[row(i)][k] * right[column(j)][k]
//
// A stage holds 64 bytes of every row and column: 32 elements of half precision, 16 of float32, 8 of float64.
// Its 16-byte chunks are placed so that eight rows, and sixteen, touch each bank as rarely as can be.
#pragma once

#include "../common/async_copy.h"
#include "../common/mma.h"

namespace effops::rowconv {

constexpr int kStageBytes = 64;  // of a row
constexpr int kStageChunks = kStageBytes / 16;
template <typename T>
constexpr int kStageDepth = kStageBytes / static_cast<int>(sizeof(T));  // elements of a row in a stage

// Where a chunk of a row is, in elements.
template <typename T>
EFFOPS_DEVICE int staged_at(int row, int chunk) {
  return row * kStageDepth<T> + (chunk ^ (row / 2 % kStageChunks)) * kPackSize<T>;
}

template <typename T>
EFFOPS_DEVICE Pack<T, kPackSize<T>> staged_chunk(const T* rows, int row, int chunk) {
  return *reinterpret_cast<const Pack<T, kPackSize<T>>*>(rows + staged_at<T>(row, chunk));
}

// On tensor cores, 128 rows x 32 kColumnWarps columns of half precision; a warp has 32 x 32.
template <int kColumnWarps>
struct TensorEngine {
  static constexpr bool kNative = kHasHalfMma;
  static constexpr int kRows = 128, kColumns = 32 * kColumnWarps;
  static constexpr int kThreads = 128 * kColumnWarps;
  // Of a multiprocessor: 168 registers for a thread of the smallest tile, else 128.
  static constexpr int kBlocks = kColumnWarps == 1 ? 3 : 4 / kColumnWarps;
  static constexpr int kM = 4, kN = 8;  // a thread's rows and columns
  static constexpr int kAdjacent = 2;  // columns that are neighbours

  int lane, row_warp, column_warp;
  EFFOPS_DEVICE explicit TensorEngine(unsigned thread)
      : lane(static_cast<int>(thread) % kWarpSize),
        row_warp(static_cast<int>(thread) / kWarpSize / kColumnWarps),
        column_warp(static_cast<int>(thread) / kWarpSize % kColumnWarps) {}

  EFFOPS_DEVICE int row(int i) const { return 32 * row_warp + 8 * i + lane / 4; }
  EFFOPS_DEVICE int column(int j) const { return 32 * column_warp + 8 * (j / 2) + 2 * (lane % 4) + j % 2; }

  template <typename T>
  EFFOPS_DEVICE void add(const T* left, const T* right, float (&sums)[kM][kN]) const {
    // One address each, from which the others differ by constants: a step of 16 rows keeps the order of the
    // chunks, and two chunks further is one bit.
    const int row_at = staged_at<T>(32 * row_warp + lane % 16, lane / 16);
    const int column_at = staged_at<T>(32 * column_warp + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // 16 elements, two chunks
      const int flip = 2 * kPackSize<T> * k;
      uint32_t rows[2][4], columns[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrices<false>(rows[m], left + (row_at ^ flip) + 16 * m * kStageDepth<T>);
        load_matrices<false>(columns[m], right + (column_at ^ flip) + 16 * m * kStageDepth<T>);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t column[2] = {columns[n / 2][n % 2 * 2], columns[n / 2][n % 2 * 2 + 1]};
          multiply_add<T>(sums[2 * m][2 * n], sums[2 * m][2 * n + 1], sums[2 * m + 1][2 * n],
                          sums[2 * m + 1][2 * n + 1], rows[m], column);
        }
      }
    }
  }

  // Bit j of `bits` belongs to column(j); bit o of the result's byte o / 8 to column o of the tile. `bytes`:
  // the row's, of which `count` exist; none is written where the row doesn't exist.
  EFFOPS_DEVICE void store_bits(uint32_t bits, uint8_t* bytes, int count, bool exists) const {
    uint32_t word = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) word |= (bits >> (2 * n) & 3u) << (8 * n + 2 * (lane % 4));
    word |= __shfl_xor_sync(kFullWarp, word, 1);
    word |= __shfl_xor_sync(kFullWarp, word, 2);
    const int own = 4 * column_warp + lane % 4;
    if (exists && own < count) bytes[own] = static_cast<uint8_t>(word >> (8 * (lane % 4)));
  }
};

// By plain instructions, 64 x 64; a thread has every 16th row and column from its own on.
template <typename T>
struct ScalarEngine {
  static constexpr bool kNative = true;
  static constexpr int kRows = 64, kColumns = 64;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = sizeof(T) == 4 ? 2 : 1;
  static constexpr int kM = 4, kN = 4;
  static constexpr int kAdjacent = 1;
  using A = accumulator_t<T>;

  int x, y;
  EFFOPS_DEVICE explicit ScalarEngine(unsigned thread)
      : x(static_cast<int>(thread) % 16), y(static_cast<int>(thread) / 16) {}

  EFFOPS_DEVICE int row(int i) const { return y + 16 * i; }
  EFFOPS_DEVICE int column(int j) const { return x + 16 * j; }

  EFFOPS_DEVICE void add(const T* left, const T* right, A (&sums)[kM][kN]) const {
#pragma unroll 1
    for (int chunk = 0; chunk < kStageChunks; ++chunk) {
      A rows[kM][kPackSize<T>];
#pragma unroll
      for (int i = 0; i < kM; ++i) widen_pack(staged_chunk(left, row(i), chunk), rows[i]);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        A column[kPackSize<T>];
        widen_pack(staged_chunk(right, this->column(j), chunk), column);
#pragma unroll
        for (int k = 0; k < kPackSize<T>; ++k) {
#pragma unroll
          for (int i = 0; i < kM; ++i) sums[i][j] += rows[i][k] * column[k];
        }
      }
    }
  }

  EFFOPS_DEVICE void store_bits(uint32_t bits, uint8_t* bytes, int count, bool exists) const {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const uint32_t both = __ballot_sync(kFullWarp, static_cast<int>(bits >> j & 1u));
      const uint32_t own = both >> (y % 2 * 16) & 0xffffu;  // columns 16 j to 16 j + 15 of the row
      if (exists && x < 2 && 2 * j + x < count) bytes[2 * j + x] = static_cast<uint8_t>(own >> (8 * x));
    }
  }
};

}  // namespace effops::rowconv
