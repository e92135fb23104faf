// Arguments of the CUDA kernels that read pyramids, from tensors.
#pragma once

#include "../common/cuda_launch.cuh"
#include "pyramid.h"
#include "pyramid_kernels.cuh"

namespace effops::sampling {

inline DevicePyramid make_device_pyramid(const char* op, const std::vector<Tensor>& pyramid) {
  if (pyramid.size() > kMaxMaps) {
    fail(op, ": expected at most ", kMaxMaps, " maps in pyramid on CUDA, got ", pyramid.size());
  }
  DevicePyramid result{};
  result.levels = static_cast<int64_t>(pyramid.size());
  result.batch = pyramid[0].size(0);
  result.channels = pyramid[0].size(1);
  for (size_t l = 0; l < pyramid.size(); ++l) {
    const Tensor& map = pyramid[l];
    result.maps[l] = {map.const_data_ptr(),
                      map.stride(0),
                      map.stride(1),
                      map.stride(2),
                      map.stride(3),
                      static_cast<int32_t>(map.size(2)),
                      static_cast<int32_t>(map.size(3))};
  }
  return result;
}

inline DeviceGradients make_device_gradients(const std::vector<Tensor>& gradients) {
  DeviceGradients result{};
  for (size_t l = 0; l < gradients.size(); ++l) result.maps[l] = gradients[l].mutable_data_ptr();
  return result;
}

// Whether `vector` consecutive channels of every pixel can be read at once.
inline bool has_channel_vectors(const std::vector<Tensor>& pyramid, int64_t vector) {
  for (const Tensor& map : pyramid) {
    const uintptr_t bytes = static_cast<uintptr_t>(vector) * map.element_size();
    if (map.stride(1) != 1 || map.size(1) % vector != 0 || map.stride(0) % vector != 0 ||
        map.stride(2) % vector != 0 || map.stride(3) % vector != 0 || !is_aligned(map, bytes)) {
      return false;
    }
  }
  return true;
}

// Sums of gradients are kept in float for the half types and rounded at the end.
inline ScalarType sum_dtype(const Tensor& map) {
  return map.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void round_gradients(std::vector<Tensor>& gradients, ScalarType dtype) {
  for (Tensor& gradient : gradients) {
    if (gradient.scalar_type() != dtype) gradient = torch::stable::to(gradient, dtype);
  }
}

}  // namespace effops::sampling
