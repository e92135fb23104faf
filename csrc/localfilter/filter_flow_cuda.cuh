// What the CUDA front ends of filter_flow and its gradients share: arguments of the kernels.
#pragma once

#include "../common/cuda_launch.cuh"
#include "../common/dtype_switch.h"
#include "../common/maps.h"
#include "filter_flow.h"
#include "filter_flow_kernels.cuh"

namespace effops::localfilter {

// Contiguous or channels_last (as_maps).
inline DeviceMaps device_maps_of(const Tensor& maps) {
  return make_device_maps(maps.const_data_ptr(), float_type_of(maps.scalar_type()), is_channels_last(maps),
                          maps.size(1), maps.size(2), maps.size(3));
}

// Bytes that a block may have.
inline int64_t shared_memory_limit(const Tensor& like) {
  int bytes = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, like.get_device_index()));
  return bytes;
}

// `filters`: contiguous. Maps, and the normalizer, are the caller's to fill in.
template <typename Arguments>
Arguments make_filter_arguments(const FilterShape& shape, const Tensor& filters) {
  Arguments arguments{};
  arguments.window = make_device_window(shape.window);
  // Weights as given, of which only those inside the image count, are divided by their sum.
  arguments.normalize = shape.normalize == kNone && shape.normalizer() ? int{kSum} : shape.normalize;
  arguments.batch = shape.batch;
  arguments.groups = shape.groups;
  arguments.group_channels = shape.channels / shape.groups;
  arguments.filters = static_cast<decltype(arguments.filters)>(filters.const_data_ptr());
  return arguments;
}

inline std::vector<int64_t> out_sizes(const FilterShape& shape, int64_t channels) {
  return {shape.batch, channels, shape.window.out_height, shape.window.out_width};
}

}  // namespace effops::localfilter
