// Arguments of the convolutions over sparse rows, whichever kernel makes them. No torch, no launches.
#pragma once

#include "../common/dtype.h"
#include "row_source.cuh"

namespace effops::rowconv {

constexpr int kFlagBlocks = 128;  // of the kernel that packs the weights

// Rows that taps read: those from `second_begin` on lie in the second matrix.
template <typename T>
struct OperandRows {
  const T* first;
  const T* second;
  int64_t second_begin;
  int64_t stride;         // elements from row to row
  int64_t branch_stride;  // elements between the operands of two branches, 0: they share one
  bool aligned;           // rows can be read 16 bytes at a time, in every group

  EFFOPS_DEVICE const T* row(int64_t row, int32_t branch) const {
    const T* begin = row < second_begin ? first + row * stride : second + (row - second_begin) * stride;
    return begin + branch * branch_stride;
  }
};

// Where the channels of a cell are: of maps [N, C, H, W] in either format, or of the rows of a matrix.
struct MapLayout {
  int64_t cells;  // of an image
  int64_t image_stride, cell_stride, channel_stride;

  // Of channel 0.
  EFFOPS_DEVICE int64_t offset(int64_t cell) const {
    if (channel_stride == 1) return cell * cell_stride;
    const int64_t image = cell / cells;
    return image * image_stride + (cell - image * cells) * cell_stride;
  }
};

template <typename T>
struct RowGemm {
  RowSource source;
  BranchList branches;
  OperandRows<T> operand;
  int64_t rows;          // of the result, at most
  const int64_t* count;  // how many there are, or null: `rows`
  const int64_t* positions;  // cell of each row of the result, or null: row r is cell r
  int64_t limit;             // cells: positions beyond have no result
  int32_t groups;
  int32_t depth, columns;     // channels of a group in the operand and in the result
  int32_t padded_depth;       // a multiple of kStageDepth
  const T* weights;           // [taps, groups, columns, padded_depth], zeros from `depth` on
  const int32_t* not_finite;  // [kFlagBlocks]: whether there are such weights
  bool skips_taps;            // looks which taps no row of a tile has
  const T* bias[kMaxBranches];  // all or none
  bool relu;
  uint8_t* signs;       // [branches, rows, sign_bytes]: bit per channel, whether > 0 or NaN; or null
  int64_t sign_bytes;
  const T* addend;      // [rows, groups * columns], or null
  const void* scale;    // per cell, or null
  bool scale_is_float;  // float32 beside another T
  void* result;
  bool wide_result;  // in the accumulator type
  MapLayout layout;

  EFFOPS_DEVICE accumulator_t<T> scale_of(int64_t cell) const {
    if (scale_is_float) return static_cast<accumulator_t<T>>(static_cast<const float*>(scale)[cell]);
    return widen(static_cast<const T*>(scale)[cell]);
  }
  EFFOPS_HD int64_t channels() const { return int64_t{groups} * columns; }  // of the result
  EFFOPS_DEVICE int64_t existing_rows() const { return count == nullptr ? rows : min(*count, rows); }
};

}  // namespace effops::rowconv
