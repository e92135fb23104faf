// Interface between ms_deform_attn_cpu.cpp (torch) and its kernels (one copy per instruction set).
#pragma once

#include <cstdint>

#include "../common/cpu_capability.h"
#include "../common/dtype.h"
#include "ms_deform_attn_math.h"

namespace effops::sampling {

// One image and head: the rows of `value` that its points read. Rows are `row_stride` elements apart and
// hold `padded` channels (a whole number of registers), the last padded - channels of them zero.
struct ValueSlice {
  const void* rows;
  int64_t row_stride;
  int64_t padded;
};

// Inputs that all kernels read, contiguous.
struct PointInputs {
  MsDeformAttnShape shape;
  const Level* levels;      // [L]
  const void* locations;    // [B, Q, M, L, P, 2]
  const void* weights;      // [B, Q, M, L, P]
  FloatType location_type;
  FloatType weight_type;
};

// What a backward task reads and writes besides the points and the value. Null = not needed.
struct PointGradients {
  const void* grad_output;  // of one image and head, packed like value: [Q, padded]
  void* grad_rows;          // accumulators of one image and head, [S, padded], rows `row_stride` apart
  int64_t row_stride;
  void* grad_locations;     // [B, Q, M, L, P, 2]
  void* grad_weights;       // [B, Q, M, L, P]
};

// The queries [begin, end) of one head of one image, and for backward the levels they sample.
struct QueryRange {
  int64_t image, head, begin, end;
  int64_t level_begin, level_end;
};

// Source or target of pack and unpack: element (row, channel) at row * row_stride + channel * channel_stride.
struct StridedRows {
  const void* data;
  int64_t row_stride, channel_stride;
};

// Function pointers, indexed by FloatType of value where they are arrays.
struct MsDeformAttnKernels {
  int float_lanes;  // channels are padded to a multiple of this; half as many for double
  int64_t (*scratch_bytes)(const MsDeformAttnShape& shape);
  // Copies rows [begin, end) into consecutive rows of `padded` channels.
  void (*pack[kNumFloatTypes])(const StridedRows& source, int64_t begin, int64_t end, int64_t channels,
                               int64_t padded, void* target);
  // Rounds accumulator rows [begin, end) of `padded` channels to the type of value.
  void (*unpack[kNumFloatTypes])(const void* source, int64_t begin, int64_t end, int64_t channels,
                                 int64_t padded, int64_t row_stride, void* target);
  void (*forward[kNumFloatTypes])(const PointInputs& inputs, const ValueSlice& value, const QueryRange& range,
                                  void* output, void* scratch);
  void (*backward[kNumFloatTypes])(const PointInputs& inputs, const ValueSlice& value,
                                   const QueryRange& range, const PointGradients& gradients, void* scratch);
};

EFFOPS_DECLARE_KERNEL_TABLE(MsDeformAttnKernels, ms_deform_attn_kernels)

}  // namespace effops::sampling
