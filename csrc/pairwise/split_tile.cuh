// Products of 64 rows and 64 columns of float32 on the tensor cores of bf16: a number is split into the bf16
// next to it and the bf16 next to what is left, and of the four products all but the smallest are added, so
// that dot products of unit vectors are good to about 2^-17. No torch, no launches.
//
// A row of a tile has `pitch` channels, a multiple of 32, in chunks of 16 bytes: eight high parts, their low
// parts, the next high parts. Chunks of eight exchange their places so that eight rows touch all banks, in
// device memory too: a tile is copied as it is.
#pragma once

#include "../common/async_copy.h"
#include "../common/mma.h"
#include "scalar_tile.cuh"

namespace effops::pairwise {

constexpr int kSplitDepth = 32;         // what the pitch is a multiple of
constexpr int kSplitMaxChannels = 128;  // whose sums fit into registers

EFFOPS_HD int32_t split_elements(int32_t pitch) { return 2 * pitch; }  // of a row

// Where the high part of a channel is in the tile.
EFFOPS_HD int32_t split_at(int row, int32_t channel, int32_t pitch) {
  const int32_t chunk = channel / 8 * 2;
  return row * split_elements(pitch) + (chunk ^ (row % 8)) * 8 + channel % 8;
}
// The same of the low part, and of the channel 16 * step further where a channel is one of the first 16.
EFFOPS_HD int32_t split_low(int32_t at) { return at ^ 8; }
EFFOPS_HD int32_t split_step(int32_t at, int32_t step) { return (at ^ (step % 2 * 32)) + step / 2 * 64; }

EFFOPS_DEVICE uint32_t bf16_pair(float low, float high) {
#if defined(__CUDACC__)
  return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
#else
  return uint32_t{narrow<bf16>(high).bits} << 16 | narrow<bf16>(low).bits;
#endif
}

// Two numbers as pairs of their high and of their low parts.
EFFOPS_DEVICE void split_pair(float a, float b, uint32_t& high, uint32_t& low) {
  high = bf16_pair(a, b);
  low = bf16_pair(a - bit_cast<float>(high << 16), b - bit_cast<float>(high & 0xffff0000u));
}

// A warp has 16 rows and all columns; a thread's are those of multiply_add().
struct SplitEngine {
  static constexpr int kThreads = 128;
  static constexpr int kM = 2, kN = 16;  // a thread's rows and columns
  static constexpr int kRowLanes = 4;    // neighbours that have the same rows

  int lane, warp;
  EFFOPS_DEVICE explicit SplitEngine(unsigned thread)
      : lane(static_cast<int>(thread) % kWarpSize), warp(static_cast<int>(thread) / kWarpSize) {}

  EFFOPS_DEVICE int row(int i) const { return 16 * warp + 8 * i + lane / 4; }
  EFFOPS_DEVICE int column(int j) const { return 8 * (j / 2) + 2 * (lane % 4) + j % 2; }

  // dots[i][j] = row(i) . column(j), of tiles in shared memory.
  EFFOPS_DEVICE void multiply(const bf16* rows, const bf16* columns, int32_t channels, int32_t pitch,
                              float (&dots)[kM][kN]) const {
#pragma unroll
    for (int j = 0; j < kN; ++j) dots[0][j] = dots[1][j] = 0.0f;
    const int32_t row_at = split_at(16 * warp + lane % 16, lane / 16 * 8, pitch);
    const int32_t column_at = split_at(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8, pitch);
    const int32_t sixteen = 16 * split_elements(pitch);  // columns
#pragma unroll 1
    for (int32_t step = 0; 16 * step < channels; ++step) {
      const int32_t row_now = split_step(row_at, step), column_now = split_step(column_at, step);
      uint32_t row_high[4], row_low[4];
      load_matrices<false>(row_high, rows + row_now);
      load_matrices<false>(row_low, rows + split_low(row_now));
#pragma unroll
      for (int n = 0; n < kTilePoints / 16; ++n) {
        uint32_t high[4], low[4];
        load_matrices<false>(high, columns + column_now + n * sixteen);
        load_matrices<false>(low, columns + split_low(column_now) + n * sixteen);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int j = 4 * n + 2 * m;
          add_split(dots[0][j], dots[0][j + 1], dots[1][j], dots[1][j + 1], row_high, row_low,
                    {high[2 * m], high[2 * m + 1]}, {low[2 * m], low[2 * m + 1]});
        }
      }
    }
  }

  static EFFOPS_DEVICE void add_split(float& sum0, float& sum1, float& sum2, float& sum3,
                                      const uint32_t (&row_high)[4], const uint32_t (&row_low)[4],
                                      const uint32_t (&column_high)[2], const uint32_t (&column_low)[2]) {
    multiply_add<bf16>(sum0, sum1, sum2, sum3, row_low, column_high);
    multiply_add<bf16>(sum0, sum1, sum2, sum3, row_high, column_low);
    multiply_add<bf16>(sum0, sum1, sum2, sum3, row_high, column_high);
  }
};

// sums[d] += sum over the columns of a tile of coefficient * column[d], for the rows of a SplitEngine and up
// to kSplitMaxChannels channels.
struct SplitColumnSums {
  static constexpr int kN = kSplitMaxChannels / 8;
  float sums[kN][4] = {};  // as multiply_add() has them

  EFFOPS_DEVICE void add(const SplitEngine& engine, const bf16* columns, int32_t channels, int32_t pitch,
                         const float (&coefficients)[SplitEngine::kM][SplitEngine::kN]) {
#pragma unroll
    for (int k = 0; k < kTilePoints / 16; ++k) {  // 16 columns
      uint32_t row_high[4], row_low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 4 * k + i / 2 * 2;
        split_pair(coefficients[i % 2][j], coefficients[i % 2][j + 1], row_high[i], row_low[i]);
      }
      const int32_t at = split_at(16 * k + engine.lane % 16, engine.lane / 16 * 8, pitch);
#pragma unroll
      for (int n = 0; n < kN / 2; ++n) {  // 16 channels
        if (16 * n >= channels) break;
        uint32_t high[4], low[4];
        load_matrices<true>(high, columns + split_step(at, n));
        load_matrices<true>(low, columns + split_step(split_low(at), n));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float (&own)[4] = sums[2 * n + m];
          SplitEngine::add_split(own[0], own[1], own[2], own[3], row_high, row_low,
                                 {high[2 * m], high[2 * m + 1]}, {low[2 * m], low[2 * m + 1]});
        }
      }
    }
  }

  // To rows of `pitch` elements.
  EFFOPS_DEVICE void store(const SplitEngine& engine, int32_t channels, int32_t pitch, float* rows) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (8 * n >= channels) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* target = rows + int64_t{engine.row(i)} * pitch + 8 * n + 2 * (engine.lane % 4);
        *reinterpret_cast<Pack<float, 2>*>(target) = {{sums[n][2 * i], sums[n][2 * i + 1]}};
      }
    }
  }
};

}  // namespace effops::pairwise
