// Interface between filter_flow on the CPU and its kernels for few channels (one copy per instruction set).
//
// Kernels see rows of consecutive pixels and staged images: pixels of the image as accumulators, padded and
// widened, in which tap dx of pixel i is element i + dx of a row.
#pragma once

#include <cstdint>

#include "../common/cpu_capability.h"
#include "../common/dtype.h"
#include "window_math.h"

namespace effops::localfilter {

constexpr int64_t kFewChannels = 3;

// Filters of `count` consecutive pixels of a row.
struct FilterRow {
  const void* filters;  // tap 0 of pixel 0
  int64_t plane_stride;  // elements between two taps
  int64_t count, kernel;
  int normalize;
  bool renormalize;
  // Pixels [first[dx], last[dx]) have tap dx inside the image, pixels [all_first, all_last) all taps of a row
  // of taps; rows_inside[dy]: whether that row of taps is inside.
  const int64_t *first, *last;
  int64_t all_first, all_last;
  const uint8_t* rows_inside;
  double first_offset, step;  // tap i is at first_offset + i * step, along either axis
};

// out[c][i] = sum_k T_k(i) image[c][i + tap k], the expected flow and what T is normalised by.
struct FilterSums {
  const void* image;  // channel 0 of tap row 0, tap column 0
  int64_t channel_stride, row_stride;
  bool flow;
  // Accumulators, C + 4 rows: the channels, flow (dx, dy), the normalizer, and one for the kernel. The stride
  // is a multiple of a register and at least `count`.
  void* sums;
  int64_t sums_stride;
};

// The gradients of one row of taps; see README.md.
struct FilterGradient {
  const void* image;  // channel 0 of this row of taps
  int64_t channel_stride;
  int64_t tap_row;
  const void* grad;  // channel 0 of the output's gradient, accumulators
  int64_t grad_stride;
  const void* normalizer;  // log-sum-exp, or the reciprocal of the sum (1 for kNone)
  const void* mean;        // sum_k T_k s_k (0 for kNone)
  const void* grad_flow;   // (dx, dy), rows grad_stride apart; or null
  void* grad_filters;      // tap 0 of pixel 0 in storage, or null
  int64_t grad_plane_stride;
  void* weights;  // T of the row's taps as accumulators; whole registers are written, 0 behind `count`
  int64_t weights_stride;
};

struct FilterRowKernels {
  // Indexed by FloatType of the filters and the number of channels.
  void (*sums[kNumFloatTypes][kFewChannels + 1])(const FilterRow& row, const FilterSums& job);
  void (*gradient[kNumFloatTypes][kFewChannels + 1])(const FilterRow& row, const FilterGradient& job);
};

EFFOPS_DECLARE_KERNEL_TABLE(FilterRowKernels, filter_row_kernels)

}  // namespace effops::localfilter
