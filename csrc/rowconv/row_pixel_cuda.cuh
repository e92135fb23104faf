// Maps [N, C, H, W] as the kernels over chosen pixels read them.
#pragma once

#include "../common/maps.h"
#include "row_gemm_cuda.cuh"
#include "row_pixel_kernels.cuh"

namespace effops::rowconv {

// Pixel after pixel: channels_last, whatever its strides say where sides are 1.
inline Tensor pixel_rows_of(const Tensor& maps) {
  return torch::stable::contiguous(maps, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline MapLayout layout_of(const Tensor& maps) {
  return map_layout(is_channels_last(maps), maps.size(1), maps.size(2) * maps.size(3));
}

}  // namespace effops::rowconv
