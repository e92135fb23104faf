// What the CUDA front ends over K x K neighbourhoods share: maps for the kernels, tilings, launches.
#pragma once

#include "../common/cuda_launch.cuh"
#include "../common/maps.h"
#include "neighborhood_sums.cuh"
#include "window_check.h"

namespace effops::localfilter {

// Of a tensor [N, C, H, W] in either memory format, as it is. T: the storage type, const for inputs.
template <typename T>
Maps<T> device_maps(const Tensor& tensor) {
  const int64_t channels = tensor.size(1), pixels = tensor.size(2) * tensor.size(3);
  const bool last = is_channels_last(tensor);
  Maps<T> maps{};
  maps.data = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  maps.channels = channels;
  maps.image_stride = channels * pixels;
  maps.channel_stride = last ? 1 : pixels;
  maps.pixel_stride = last ? channels : 1;
  maps.has_quads = last && channels % kQuadChannels == 0 && is_aligned(tensor, 16);
  return maps;
}

// Bytes of shared memory for a block, of which a multiprocessor holds two if it has room for two of 48 KiB.
inline int64_t tile_budget(const Tensor& like) {
  constexpr int64_t kKiB = 1024;
  int bytes = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, like.get_device_index()));
  return std::clamp(bytes / 2 - kKiB, 48 * kKiB, 112 * kKiB);
}

template <typename T>
Tiling tiling_of(const Tensor& like, const Window& window, int64_t batch, bool mirrored,
                 const TileNeeds& needs) {
  return make_tiling<accumulator_t<T>>(window, batch, mirrored, needs, tile_budget(like));
}

// The target of weighted sums: `output`, and memory for what is kept between the boxes of a tile.
template <typename T>
class Sums {
 public:
  Sums(const Tiling& tiling, const Tensor& output) : output_(output), partial_(output) {
    if (tiling.has_one_box) return;
    partial_ = empty_of(
        output,
        {output.size(0), quads_in(output.size(1)), output.size(2), output.size(3), int64_t{kQuadChannels}},
        accumulator_dtype(output));
    has_partial_ = true;
  }

  SumTarget<T> target() const {
    using A = accumulator_t<T>;
    Quad<A>* partial = has_partial_ ? static_cast<Quad<A>*>(partial_.mutable_data_ptr()) : nullptr;
    return {device_maps<T>(output_), partial};
  }

 private:
  Tensor output_, partial_;
  bool has_partial_ = false;
};

template <typename Arguments>
void launch_tiles(const CudaScope& scope, void (*kernel)(Arguments), const Arguments& arguments) {
  const Tiling& tiling = arguments.tiling;
  scope.launch(kernel, tiling.works, tiling.threads(), tiling.shared_bytes, arguments);
}

}  // namespace effops::localfilter
