// Interface between the CPU ops of this engine and their kernels for tiles with many channels (one copy per
// instruction set): what is done to single rows before and after the products of window_sums_cpu_kernel.h.
// A scratch row is a row of accumulators, written in whole registers.
#pragma once

#include <cstdint>

#include "filter_rows_cpu_kernel.h"

namespace effops::localfilter {

// Which pixel of a row of the image stands at each element of a staged row.
struct StagedColumns {
  const int32_t* columns;  // -1: none, zero
  int64_t count;
  int64_t run_first, run_last;  // elements [first, last) that stand for consecutive pixels
};

// Weights of one row of pixels, all taps: T of filters.
struct WeighRow {
  void* weights;  // scratch, tap 0; 0 behind the row's end and, forward, where a tap reads nothing
  int64_t tap_stride;
  bool similarities;  // the filters are products of queries and keys: they are scaled, and 0 outside
  double scale;
  double outside;  // further taps of similarity 0 that count
  // Forward: three scratch rows: flow (dx, dy) if asked for, the normalizer, and what `weights` are still to
  // be divided by. They are `sums_stride` apart.
  void* sums;
  int64_t sums_stride;
  bool flow;
  // Backward: the normalizer of each pixel (as FilterGradient's), by which `weights` are divided; no sums.
  const void* normalizer;
};

// The gradients of the filters of one row, all taps: T (s - D) or (s - D) / S, as FilterGradient's.
struct SlopeRow {
  const void* weights;  // T
  void* slopes;  // sum_c dY_c X_c; scratch, as weights; receives similarities' gradients
  int64_t tap_stride;
  const void *normalizer, *mean, *grad_flow;  // grad_flow: rows flow_stride apart, or null
  int64_t flow_stride;
  bool similarities;  // into `slopes`, times `scale`; otherwise into grad_filters
  double scale;
  void* grad_filters;
  int64_t grad_plane_stride;
};

struct TileRowKernels {
  // Indexed by FloatType: of the filters,
  void (*weigh[kNumFloatTypes])(const FilterRow& row, const WeighRow& job);
  void (*slopes[kNumFloatTypes])(const FilterRow& row, const SlopeRow& job);
  // of the pixels: target[i] = row[columns[i]],
  void (*stage[kNumFloatTypes])(const void* row, int64_t pixel_stride, const StagedColumns& columns,
                                void* target);
  // of the output: row[i] = scratch[i] / divisors[i]; divisors may be null.
  void (*write[kNumFloatTypes])(const void* scratch, const void* divisors, int64_t count, void* row,
                                int64_t pixel_stride);
  // Indexed by whether accumulators are double: row[columns[i]] += staged[i];
  void (*fold[2])(const void* staged, const StagedColumns& columns, void* row);
  // sums[i] += a[i] * b[i];
  void (*add_products[2])(const void* a, const void* b, int64_t count, void* sums);
  // sums[i] += row[i].
  void (*add[2])(const void* row, int64_t count, void* sums);
};

EFFOPS_DECLARE_KERNEL_TABLE(TileRowKernels, tile_row_kernels)

}  // namespace effops::localfilter
