// Interface between the CPU ops of this engine and the products of their windows (one copy per instruction
// set): sums over taps, sums over channels. Everything is in accumulators (float, or double for double);
// strides and offsets count elements.
#pragma once

#include <cstdint>

#include "../common/cpu_capability.h"

namespace effops::localfilter {

// What one row of pixels contributes to two output rows.
struct SumStep {
  const void* source;      // channel 0
  const void* weights[2];  // of each output row; null: that row reads nothing here
};

// outs[r][c][i] (+)= sum over steps and taps t of
//   weights[r][weight_offsets[t] + i] * source[c * source_channel_stride + source_offsets[t] + i]
// for whole registers of pixels i that cover [0, count).
struct SumRows {
  const SumStep* steps;
  int64_t num_steps, taps;
  const int64_t *source_offsets, *weight_offsets;
  int64_t source_channel_stride, channels, count;
  void* outs[2];  // the second may be null
  int64_t out_channel_stride;
  bool accumulate;
};

// scores[r][t * tap_stride + i] (+)= sum_c queries[r][c * query_channel_stride + i] *
//                                          source[c * source_channel_stride + offsets[t] + i]
struct DotRows {
  const void* source;
  int64_t source_channel_stride;
  const void* queries[2];  // the second may be null
  int64_t query_channel_stride, channels, count, taps;
  const int64_t* offsets;
  void* scores[2];
  int64_t tap_stride;
  bool accumulate;
};

struct WindowSumKernels {
  // Indexed by whether accumulators are double.
  void (*sum_rows[2])(const SumRows& job);
  void (*dot_rows[2])(const DotRows& job);
};

EFFOPS_DECLARE_KERNEL_TABLE(WindowSumKernels, window_sum_kernels)

}  // namespace effops::localfilter
