// What the drivers of the kernels over K x K neighbourhoods share: maps, tilings, launches.
#pragma once

#include <algorithm>
#include <optional>

#include "localfilter/neighborhood_sums.cuh"
#include "simulate.h"

namespace simulator {

// T: the storage type, const for inputs. Tensors are [N, C, H, W], contiguous or channels_last.
template <typename T>
effops::localfilter::Maps<T> device_maps(const Tensor& tensor) {
  const int64_t channels = tensor.size(1), pixels = tensor.size(2) * tensor.size(3);
  const bool last = tensor.stride(1) == 1 && tensor.stride(3) == channels;
  const auto start = reinterpret_cast<uintptr_t>(tensor.raw());
  return {tensor.data<T>(),    channels,
          channels * pixels,   last ? 1 : pixels,
          last ? channels : 1, last && channels % effops::localfilter::kQuadChannels == 0 && start % 16 == 0};
}

// The result of an op, [N, C, H, W] or, for the flag "channels_last", [N, H, W, C].
template <typename T>
effops::localfilter::Maps<T> output_maps(Call& call, const std::string& name, int64_t batch, int64_t channels,
                                         int64_t height, int64_t width) {
  const bool last = call.flag("channels_last");
  const auto sizes = last ? std::vector<int64_t>{batch, height, width, channels}
                          : std::vector<int64_t>{batch, channels, height, width};
  Tensor& tensor = call.output(name, kDTypeOf<T>, sizes);
  const int64_t pixels = height * width;
  return {tensor.data<T>(), channels, channels * pixels, last ? 1 : pixels, last ? channels : 1, false};
}

template <typename T>
effops::localfilter::Tiling make_tiling(const Call& call, const effops::localfilter::Window& window,
                                        int64_t batch, bool mirrored,
                                        const effops::localfilter::TileNeeds& needs) {
  return effops::localfilter::make_tiling<effops::accumulator_t<T>>(window, batch, mirrored, needs,
                                                                    call.integer("budget"));
}

// With memory for what is kept between the boxes of a tile where there are several.
template <typename T>
effops::localfilter::SumTarget<T> sum_target(Call& call, const effops::localfilter::Tiling& tiling,
                                             int64_t batch, const std::string& name, int64_t channels) {
  using A = effops::accumulator_t<T>;
  using effops::localfilter::Quad;
  const int64_t height = tiling.window.height, width = tiling.window.width;
  effops::localfilter::SumTarget<T> target{output_maps<T>(call, name, batch, channels, height, width),
                                           nullptr};
  if (!tiling.has_one_box) {
    Tensor& partial = call.scratch(
        "partial_" + name, kDTypeOf<A>,
        {batch, effops::localfilter::quads_in(channels), height, width, effops::localfilter::kQuadChannels});
    target.partial = static_cast<Quad<A>*>(partial.raw());
  }
  return target;
}

// Fewer blocks than there are tiles, so that the kernels loop over the rest.
template <typename Arguments>
void launch_tiles(void (*kernel)(Arguments), const Arguments& arguments) {
  constexpr int64_t kMaxBlocks = 2;
  const effops::localfilter::Tiling& tiling = arguments.tiling;
  launch(dim3(static_cast<unsigned>(std::min(tiling.works, kMaxBlocks))),
         dim3(static_cast<unsigned>(tiling.threads())), static_cast<size_t>(tiling.shared_bytes), kernel,
         arguments);
}

}  // namespace simulator
