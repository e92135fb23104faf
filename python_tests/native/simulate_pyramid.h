// What the drivers of the kernels that read pyramids share: arguments map0, map1, ... and their gradients.
#pragma once

#include <string>

#include "sampling/pyramid_kernels.cuh"
#include "simulate.h"

namespace simulator {

constexpr int64_t kMaxBlocks = 3;  // small, so that kernels loop over the rest of the work

inline std::string map_name(int64_t level) { return "map" + std::to_string(level); }

inline effops::sampling::DevicePyramid read_pyramid(const Call& call) {
  effops::sampling::DevicePyramid pyramid{};
  for (; call.has(map_name(pyramid.levels)); ++pyramid.levels) {
    const Tensor& map = call.tensor(map_name(pyramid.levels));
    pyramid.batch = map.size(0);
    pyramid.channels = map.size(1);
    pyramid.maps[pyramid.levels] = {map.raw(),
                                    map.stride(0),
                                    map.stride(1),
                                    map.stride(2),
                                    map.stride(3),
                                    static_cast<int32_t>(map.size(2)),
                                    static_cast<int32_t>(map.size(3))};
  }
  return pyramid;
}

// Outputs grad_map0, grad_map1, ... (with a prefix) in type T.
template <typename T>
effops::sampling::DeviceGradients make_gradients(Call& call, const std::string& prefix, Fill fill) {
  effops::sampling::DeviceGradients gradients{};
  for (int64_t l = 0; call.has(map_name(l)); ++l) {
    const Tensor& map = call.tensor(map_name(l));
    gradients.maps[l] = call.output(prefix + "grad_" + map_name(l), kDTypeOf<T>, map.sizes(), fill).raw();
  }
  return gradients;
}

template <typename Kernel, typename... Arguments>
void launch_few_blocks(Kernel kernel, int64_t works, int threads, const Arguments&... arguments) {
  const auto blocks = static_cast<unsigned>(works < kMaxBlocks ? works : kMaxBlocks);
  launch(dim3(blocks), dim3(static_cast<unsigned>(threads)), 0, kernel, arguments...);
}

}  // namespace simulator
