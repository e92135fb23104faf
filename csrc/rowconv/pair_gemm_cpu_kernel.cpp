// See pair_gemm_cpu_kernel.h. Compiled for AVX512-BF16 only.
//
// The tile is that of row_gemm_cpu_kernel.cpp: 6 rows x 4 registers. A pair of elements of a row is broadcast
// as 32 bits and multiplied with 16 pairs of weights per register. Bound by the rate of those products.
#include "pair_gemm_cpu_kernel.h"

#include "row_tiles_cpu.h"

namespace effops::rowconv::EFFOPS_ISA {
namespace {

constexpr int kLanes = Vec<float>::lanes;

// The pair of bfloat16 numbers in 32 bits, in every lane.
EFFOPS_INLINE __m512bh broadcast_pair(int32_t pair) {
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

EFFOPS_INLINE __m512bh load_pairs(const bf16* pairs) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(pairs));
}

template <int R, int N>
EFFOPS_INLINE void multiply_tile(const RowPair* pairs, int64_t row_offset, int64_t sum_offset, int64_t depth,
                                 const bf16* panel) {
  const bf16* rows[R];
  float* sums[R];
  __m512 tile[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    rows[r] = static_cast<const bf16*>(pairs[r].row) + row_offset;
    sums[r] = static_cast<float*>(pairs[r].sums) + sum_offset;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) tile[r][n] = _mm512_loadu_ps(sums[r] + n * kLanes);
  }
  const auto add = [&](const auto& value_of) {
    __m512bh weights[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) weights[n] = load_pairs(panel + n * 2 * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh value = broadcast_pair(value_of(r));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) tile[r][n] = _mm512_dpbf16_ps(tile[r][n], value, weights[n]);
    }
    panel += N * 2 * kLanes;
  };
  int64_t k = 0;
  for (; k + 1 < depth; k += 2) {
    add([&](int r) {
      int32_t pair;
      memcpy(&pair, rows[r] + k, sizeof(pair));
      return pair;
    });
  }
  if (k < depth) add([&](int r) { return static_cast<int32_t>(rows[r][k].bits); });
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) _mm512_storeu_ps(sums[r] + n * kLanes, tile[r][n]);
  }
}

void multiply(const RowPair* pairs, int64_t count, int64_t row_offset, int64_t sum_offset, int64_t depth,
              const void* weights, int64_t columns) {
  constexpr int64_t kPiece = 2 * kDepthPiece;  // as many bytes as of float32
  const int64_t padded_depth = (depth + 1) / 2 * 2;
  for_panels<kLanes>(columns, [&](auto registers, int64_t column) {
    constexpr int n = decltype(registers)::value;
    const bf16* panel = static_cast<const bf16*>(weights) + padded_depth * column;
    for (int64_t begin = 0; begin < depth; begin += kPiece) {
      const int64_t piece = depth - begin < kPiece ? depth - begin : kPiece;
      for_tiles<tile_rows(n)>(count, [&](auto rows, int64_t first) {
        multiply_tile<decltype(rows)::value, n>(pairs + first, row_offset + begin, sum_offset + column, piece,
                                                panel + begin * n * kLanes);
      });
    }
  });
}

}  // namespace

extern const MultiplyPairs multiply_pairs_kernel = &multiply;

}  // namespace effops::rowconv::EFFOPS_ISA
