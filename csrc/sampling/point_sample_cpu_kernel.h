// Interface between point_sample_cpu.cpp (torch) and its kernels (one copy per instruction set).
#pragma once

#include "pyramid_cpu_kernel.h"

namespace effops::sampling {

// A point on its map. Corner k lies at column x0 + (k & 1), line y0 + (k >> 1); A is the accumulator type.
template <typename A>
struct LocatedPoint {
  int64_t row;      // of the output
  int32_t x0, y0;   // may be -1
  uint32_t inside;  // bit k: corner k is inside the map; 0: inactive point
  A weight[4];
};

// Some channels of an array [N, C].
struct PointRows {
  void* data;
  int64_t first_channel, total_channels;
};

// Function pointers, indexed by FloatType of the maps. `points` are LocatedPoint of its accumulator.
struct PointSampleKernels {
  // output[row, channels] = sum of weight * corner
  void (*forward[kNumFloatTypes])(const MapSlice& map, const void* points, int64_t count,
                                  const PointRows& output);
  // dots[4 * i + k] += <grad_output[row, channels], corner k of point i>
  void (*dots[kNumFloatTypes])(const MapSlice& map, const void* points, int64_t count,
                               const PointRows& grad_output, void* dots);
  // sums at corner k += weight * grad_output[row, channels], for corners in the rows of `sums`
  void (*scatter[kNumFloatTypes])(const SumSlice& sums, const void* points, int64_t count,
                                  const PointRows& grad_output);
};

EFFOPS_DECLARE_KERNEL_TABLE(PointSampleKernels, point_sample_kernels)

}  // namespace effops::sampling
