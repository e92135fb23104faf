// The inner loops of the convolutions at chosen positions, one table per instruction set. All numbers are
// accumulators (float or double), but for rows of bfloat16 in pair_gemm_cpu_kernel.h; the conversions at both
// ends know the storage types.
//
// Multiply: for each of `count` chosen rows, with the weights of one tap,
//     sums[i][o] += sum_c rows[i][c] * weights[c][o],      c < depth, o < columns.
// The weights are packed in panels of a few registers of columns, [depth][panel], one panel after the other,
// so that panel p begins at depth * (first column of p). A tile of rows times a panel of columns stays in
// registers while the depth runs; a row is read where it lies, one broadcast per element, so nothing is
// copied. Bound by the rate of multiply-adds: per element of the depth a tile of 6 x 4 registers takes 24 of
// them and 10 loads. A piece of `kDepthPiece` rows of a panel stays in the first-level cache while all tiles
// use it.
//
// Outer product: products[c][o] += sum_i a[i][c] * g[i][o], the same tile with the rows i as the depth.
#pragma once

#include <cstdint>

#include "../common/cpu_capability.h"
#include "../common/dtype.h"

namespace effops::rowconv {

// A chosen row and what it is added to; or the two rows of an outer product, which are only read.
struct RowPair {
  const void* row;
  void* sums;
};

// Bits beside the elements of a row, from the lowest bit of the first byte on; null: no bits, all elements
// count.
struct SignedRow {
  const void* data;  // storage
  const uint8_t* bits;
};

// Pairs of functions are for float and for double accumulators.
struct RowGemmKernels {
  int float_lanes;
  int panel_registers;  // of a panel of weights, at most
  // columns: rounded up to whole registers. The offsets are added to the pairs' pointers.
  void (*multiply[2])(const RowPair* pairs, int64_t count, int64_t row_offset, int64_t sum_offset,
                      int64_t depth, const void* weights, int64_t columns);
  // pairs: (a, g). products: [rows_a, columns].
  void (*outer[2])(const RowPair* pairs, int64_t count, int64_t a_offset, int64_t rows_a, int64_t g_offset,
                   int64_t columns, void* products);
  // Depthwise: sums[i][c] += rows[i][c] * weights[c], and products[c] += sum_i a[i][c] * g[i][c].
  void (*multiply_channels[2])(const RowPair* pairs, int64_t count, const void* weights, int64_t channels);
  void (*outer_channels[2])(const RowPair* pairs, int64_t count, int64_t channels, void* products);
  // target[c] = row.data[c] where row.bits are set, else 0. Indexed by the FloatType of the data.
  void (*widen[kNumFloatTypes])(const SignedRow& row, int64_t count, void* target);
  // values[c] += bias[c] (bias may be null). With `bits`: relu, and bit c says whether the value passed it.
  void (*activate[2])(void* values, const void* bias, int64_t count, uint8_t* bits);
};

EFFOPS_DECLARE_KERNEL_TABLE(RowGemmKernels, row_gemm_kernels)

}  // namespace effops::rowconv
