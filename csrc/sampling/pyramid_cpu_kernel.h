// Interface between pyramid_cpu.h (torch) and its kernels (one copy per instruction set): how the kernels
// of point_sample and roi_align see maps and their gradients.
#pragma once

#include <cstdint>

#include "../common/cpu_capability.h"
#include "../common/dtype.h"

namespace effops::sampling {

// One image of a map, some of its channels. Strides count elements.
struct MapSlice {
  const void* data;  // first channel of pixel (0, 0)
  int64_t row_stride, pixel_stride, channel_stride;
  int64_t channels;
  // Channels in whole registers, over which kernels are vectorised: they lie next to each other, the last
  // padded - channels of them zero, unless kernels pack what they read. 0: kernels take the channels one by
  // one.
  int64_t padded;
  // The channels lie apart, or the last ones don't fill a register and what follows them may be no memory.
  bool kernel_packs = false;
};

// Sums for the gradient of one image of a map: accumulators of some channels of rows [row_begin, row_end).
struct SumSlice {
  void* data;  // first channel of the first pixel of row `row_begin`
  int64_t row_begin, row_end;
  int64_t row_stride, pixel_stride;
  int64_t channels;
  int64_t padded;  // as in MapSlice; with 0, channels lie channel_stride apart
  int64_t channel_stride;
};

// A map to pack, as runs of `width` pixels.
struct PackSource {
  const void* data;
  int64_t width, row_stride, pixel_stride, channel_stride;
};

// Function pointers, indexed by FloatType of the maps.
struct PyramidKernels {
  int float_lanes;  // channels are padded to a multiple of this; half as many for double
  // Copies pixels [begin, end) into rows of `padded` channels, pixel 0 to `target`.
  void (*pack[kNumFloatTypes])(const PackSource& source, int64_t begin, int64_t end, int64_t channels,
                               int64_t padded, void* target);
  // Rounds `pixels` rows of `padded` accumulators into planes that are `plane` elements apart.
  void (*unpack[kNumFloatTypes])(const void* sums, int64_t padded, int64_t pixels, int64_t channels,
                                 void* target, int64_t plane);
};

EFFOPS_DECLARE_KERNEL_TABLE(PyramidKernels, pyramid_kernels)

}  // namespace effops::sampling
