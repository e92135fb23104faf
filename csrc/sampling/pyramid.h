// Pyramids (lists of maps [B, C, H_l, W_l]) that ops take: checks, shared by the CPU and the CUDA library.
#pragma once

#include <string>
#include <vector>

#include "../common/check.h"
#include "../common/torch.h"

namespace effops::sampling {

struct PyramidShape {
  int64_t levels;    // L
  int64_t batch;     // B
  int64_t channels;  // C
};

constexpr int64_t kMapSideEnd = int64_t{1} << 24;  // up to here float holds every pixel coordinate exactly

inline PyramidShape check_pyramid(const char* op,
                                  const std::vector<Tensor>& pyramid) {  // L x [B, C, H_l, W_l]
  if (pyramid.empty()) fail(op, ": expected at least one map in pyramid, got none");
  const Tensor& first = pyramid.front();
  if (first.dim() != 4) fail(op, ": expected pyramid[0] of shape [B, C, H, W], got ", shape_text(first));
  check_floating(op, "pyramid[0]", first);
  const PyramidShape shape{static_cast<int64_t>(pyramid.size()), first.size(0), first.size(1)};
  for (size_t l = 0; l < pyramid.size(); ++l) {
    const Tensor& map = pyramid[l];
    const std::string name = "pyramid[" + std::to_string(l) + "]";
    if (map.dim() != 4 || map.size(0) != shape.batch || map.size(1) != shape.channels) {
      fail(op, ": expected ", name, " of shape [B=", shape.batch, ", C=", shape.channels, ", H, W], got ",
           shape_text(map));
    }
    if (map.size(2) >= kMapSideEnd || map.size(3) >= kMapSideEnd) {
      fail(op, ": expected maps of fewer than 2^24 rows and columns, got ", name, " of shape ",
           shape_text(map));
    }
    check_dtype(op, name.c_str(), map, first.scalar_type());
    check_same_device(op, name.c_str(), map, "pyramid[0]", first);
  }
  return shape;
}

// Gradients of the maps: contiguous zeros, or empty tensors when they are not needed.
inline std::vector<Tensor> new_pyramid_gradients(const std::vector<Tensor>& pyramid, bool needed,
                                                 std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<Tensor> gradients;
  for (const Tensor& map : pyramid) {
    const std::vector<int64_t> sizes = {map.size(0), map.size(1), map.size(2), map.size(3)};
    gradients.push_back(needed ? zeros_of(map, sizes, dtype) : empty_of(map, {0}, dtype));
  }
  return gradients;
}

}  // namespace effops::sampling
