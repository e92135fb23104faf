// New maps [N, C, H, W] in the memory format of others.
#pragma once

#include "../common/torch.h"

namespace effops::rowconv {

// Whether results beside x are channels_last: x is, and is not contiguous at the same time.
inline bool is_channels_last(const Tensor& x) {  // [N, C, H, W]
  if (x.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (x.size(dim) == 1) continue;
    if (x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

// Uninitialised, in the dtype, the device and the format of x.
inline Tensor new_maps(const Tensor& x, const std::vector<int64_t>& sizes) {
  const auto format = is_channels_last(x) ? torch::headeronly::MemoryFormat::ChannelsLast
                                          : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
}

}  // namespace effops::rowconv
