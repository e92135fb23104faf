// Pyramids as the CUDA kernels of point_sample and roi_align see them. No torch, no launches.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/warp.h"
#include "bilinear_math.h"

namespace effops::sampling {

constexpr int kMapThreads = 128;
constexpr int kMaxMaps = 32;  // they travel in the kernels' arguments

// A map [B, C, H, W]. Strides count elements.
struct DeviceMap {
  const void* data;
  int64_t image_stride, channel_stride, row_stride, pixel_stride;
  int32_t height, width;
};

struct DevicePyramid {
  DeviceMap maps[kMaxMaps];
  int64_t levels, batch, channels;
};

// Gradients of the maps: contiguous, in the accumulator type where they are added to atomically.
struct DeviceGradients {
  void* maps[kMaxMaps];
};

// Images and maps are user data: out of range, nothing is read.
EFFOPS_DEVICE bool is_in_pyramid(const DevicePyramid& pyramid, int64_t level, int64_t image) {
  return level >= 0 && level < pyramid.levels && image >= 0 && image < pyramid.batch;
}

// First element of an image of a map.
template <typename T>
EFFOPS_DEVICE const T* image_data(const DeviceMap& map, int64_t image) {
  return static_cast<const T*>(map.data) + image * map.image_stride;
}

// Element `index` of an array in the type of the maps or in float.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE A read_coordinate(const void* data, bool as_value, int64_t index) {
  if (as_value) return static_cast<A>(widen(static_cast<const T*>(data)[index]));
  return static_cast<A>(static_cast<const float*>(data)[index]);
}

}  // namespace effops::sampling
