// Maps [N, C, H, W] and their memory formats.
#pragma once

#include "torch.h"

namespace effops {

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

// In either format, as it is.
inline Tensor as_maps(const Tensor& maps) { return is_channels_last(maps) ? maps : as_contiguous(maps); }

// Uninitialised, in the device and the format of x, and in its dtype unless another is named.
inline Tensor new_maps(const Tensor& x, const std::vector<int64_t>& sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  const auto format = is_channels_last(x) ? torch::headeronly::MemoryFormat::ChannelsLast
                                          : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty(sizes, dtype.value_or(x.scalar_type()), std::nullopt, x.device(), std::nullopt,
                              format);
}

}  // namespace effops
