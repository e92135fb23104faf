// Interface between the ops that move features and their kernels (one copy per instruction set): copies
// between planes, in which the cells of a channel lie next to each other, and rows, in which the channels of
// a cell do.
#pragma once

#include <cstdint>

#include "cpu_capability.h"
#include "dtype.h"

namespace effops {

constexpr int64_t kCopyTile = 128;  // cells of a call, at most: their rows stay in the caches

// Strides count elements.
struct PlaneRun {
  const void* data;  // channel 0 of the first cell
  int64_t cell_stride, channel_stride;
};

struct RowCopyKernels {
  // rows[i][c] = planes[i * cell_stride + c * channel_stride], i < count, c < channels. Indexed by
  // size_index.
  void (*to_rows[3])(const PlaneRun& planes, int64_t count, int64_t channels, void* const* rows);
  // planes[i + c * channel_stride] = rows[i][c]. Indexed by size_index.
  void (*to_planes[3])(const void* const* rows, int64_t count, int64_t channels, void* planes,
                       int64_t channel_stride);
  // sums[c] += row[c], sums in accumulators. Indexed by FloatType, as the others.
  void (*add[kNumFloatTypes])(const void* row, int64_t channels, void* sums);
  // row[c] = sum of the four rows that begin at `four`.
  void (*add_four[kNumFloatTypes])(const void* four, int64_t channels, void* row);
  // row[c] = sums[c], rounded.
  void (*round[kNumFloatTypes])(const void* sums, int64_t channels, void* row);
};

// Copies know only the size of an element.
inline int size_index(int64_t element_bytes) { return element_bytes == 2 ? 0 : element_bytes == 4 ? 1 : 2; }

EFFOPS_DECLARE_KERNEL_TABLE(RowCopyKernels, row_copy_kernels)

}  // namespace effops
