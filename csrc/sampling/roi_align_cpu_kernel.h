// Interface between roi_align_cpu.cpp (torch) and its kernels (one copy per instruction set).
#pragma once

#include "pyramid_cpu_kernel.h"

namespace effops::sampling {

// Weighted sums along one axis: sum t, for t < count, has the terms begin[t] to begin[t + 1], each a place
// on the source's axis and a weight. Forward the source is the map and sums are bins; backward the source
// is the grid of bins and sum t belongs to pixel target[t] of the map.
struct AxisSums {
  int64_t count;
  const int64_t* begin;   // [count + 1]
  const int32_t* source;  // [begin[count]]
  const void* weight;     // [begin[count]], accumulators
  const int32_t* target;  // [count], or null: forward
};

struct RoiSums {
  AxisSums y, x;
  int64_t height, width;  // bins
};

// Function pointers, indexed by FloatType of the maps.
struct RoiAlignKernels {
  // columns: the largest count of an x axis; side: the widest row that forward may have to pack.
  int64_t (*scratch_bytes)(int64_t bins, int64_t columns, int64_t side);
  // output[c, i, j] = sum of weights * map, for the channels of the slice; `output` is contiguous.
  void (*forward[kNumFloatTypes])(const MapSlice& map, const RoiSums& sums, void* output, void* scratch);
  // Adds the sums of weights * grad_output to the pixels in the rows of `target`.
  void (*scatter[kNumFloatTypes])(const SumSlice& target, const RoiSums& sums, const void* grad_output,
                                  void* scratch);
};

EFFOPS_DECLARE_KERNEL_TABLE(RoiAlignKernels, roi_align_kernels)

}  // namespace effops::sampling
