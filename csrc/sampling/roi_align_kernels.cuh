// CUDA kernels of roi_align. No torch, no launches.
#pragma once

#include "pyramid_kernels.cuh"
#include "roi_align_math.h"

namespace effops::sampling {

template <typename T>
struct RoiAlignArguments {
  DevicePyramid pyramid;
  double strides[kMaxMaps];
  const void* rois;      // [R, 5]
  const int64_t* level;  // [R]
  bool rois_as_value;    // of type T, else float
  RoiSettings settings;
  int64_t rois_count;
};

// A RoI on its map. Without a map in the pyramid `exists` is false.
template <typename A>
struct DeviceRoi {
  int64_t level, image;
  RoiAxis<A> y, x;
  bool exists;
};

template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE DeviceRoi<A> read_roi(const RoiAlignArguments<T>& arguments, int64_t r) {
  DeviceRoi<A> roi{};
  if (r >= arguments.rois_count) return roi;
  const auto read = [&](int i) {
    return read_coordinate<T>(arguments.rois, arguments.rois_as_value, 5 * r + i);
  };
  roi.level = arguments.level[r];
  roi.image = roi_image(read(0), arguments.pyramid.batch);
  if (!is_in_pyramid(arguments.pyramid, roi.level, roi.image)) return roi;
  const RoiSettings& s = arguments.settings;
  const A stride = static_cast<A>(arguments.strides[roi.level]);
  const int32_t height = arguments.pyramid.maps[roi.level].height;
  const int32_t width = arguments.pyramid.maps[roi.level].width;
  roi.x = roi_axis(read(1), read(3), stride, s.width, width, s.sampling_ratio, s.aligned);
  roi.y = roi_axis(read(2), read(4), stride, s.height, height, s.sampling_ratio, s.aligned);
  roi.exists = true;
  return roi;
}

// Calls f(row, column, weight) for every pixel that a sample of bin (i, j) reads, with the weight of the
// interpolation.
template <typename A, typename F>
EFFOPS_DEVICE void for_samples(const DeviceRoi<A>& roi, int32_t i, int32_t j, const F& f) {
  for (int32_t a = 0; a < roi.y.samples; ++a) {
    const AxisSample<A> y = sample_axis(roi.y, i, a);
    if (y.index < 0) continue;
    for (int32_t b = 0; b < roi.x.samples; ++b) {
      const AxisSample<A> x = sample_axis(roi.x, j, b);
      if (x.index < 0) continue;
      const A left = A(1) - x.fraction, top = A(1) - y.fraction;
      f(y.index, x.index, top * left);
      if (x.has_next) f(y.index, x.index + 1, top * x.fraction);
      if (y.has_next) f(y.index + 1, x.index, y.fraction * left);
      if (x.has_next && y.has_next) f(y.index + 1, x.index + 1, y.fraction * x.fraction);
    }
  }
}

// One bin of one channel; `data` is the channel's first element.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE A average_bin(const DeviceRoi<A>& roi, const DeviceMap& map, const T* data, int32_t i,
                            int32_t j) {
  A sum = A(0);
  for_samples(roi, i, j, [&](int32_t row, int32_t column, A weight) {
    sum += weight * A(widen(load_pack<1>(data + row * map.row_stride + column * map.pixel_stride).data[0]));
  });
  return roi.y.samples > 0 && roi.x.samples > 0 ? sum * (roi.y.reciprocal * roi.x.reciprocal) : A(0);
}

// The bin of a thread: element `index` of [C, h, w] of its RoI.
struct BinPlace {
  int32_t channel, i, j;

  EFFOPS_DEVICE BinPlace(const RoiSettings& settings, int32_t index) {
    const int32_t line = index / settings.width;
    j = index - line * settings.width;
    channel = line / settings.height;
    i = line - channel * settings.height;
  }
};

// out[r, c, i, j] = average of the samples of bin (i, j).
//
// Parallelism: one thread per element of the output; neighbours are neighbouring bins of a channel, whose
// pixels lie next to each other where x is innermost. Blocks take kMapThreads elements of one RoI.
// Bytes: 4 n_y n_x R C h w e_value through the first-level cache, which bounds it; the boxes' pixels from
// memory.
// Limits: C h w < 2^31.
template <typename T>
__global__ void __launch_bounds__(kMapThreads)
    roi_align_forward_kernel(RoiAlignArguments<T> arguments, int64_t blocks_per_roi, int64_t works,
                             T* output) {
  using A = accumulator_t<T>;
  const RoiSettings& s = arguments.settings;
  const int64_t elements = arguments.pyramid.channels * s.bins();
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t r = work / blocks_per_roi, index = work % blocks_per_roi * kMapThreads + threadIdx.x;
    if (index >= elements) continue;
    const DeviceRoi<A> roi = read_roi<T>(arguments, r);
    A value = A(0);
    if (roi.exists) {
      const BinPlace place(s, static_cast<int32_t>(index));
      const DeviceMap& map = arguments.pyramid.maps[roi.level];
      value = average_bin<T>(roi, map, image_data<T>(map, roi.image) + place.channel * map.channel_stride,
                             place.i, place.j);
    }
    output[r * elements + index] = narrow<T>(value);
  }
}

constexpr int kTileBins = 64;  // of a block's tile in shared memory, times 32 channels
constexpr int kTileStride = kWarpSize + 1;

struct RoiTiling {
  int64_t channel_tiles, bin_tiles;
  int64_t works;  // RoIs * channel_tiles * bin_tiles
};

// The same for maps with channels innermost: lanes are channels, and a tile of bins is turned in shared
// memory, so that both the reads and the writes are coalesced.
template <typename T>
__global__ void __launch_bounds__(kMapThreads)
    roi_align_forward_channels_last_kernel(RoiAlignArguments<T> arguments, RoiTiling tiling, T* output) {
  using A = accumulator_t<T>;
  constexpr int kWarps = kMapThreads / kWarpSize;
  EFFOPS_SHARED(A, tile, kTileBins * kTileStride);
  const RoiSettings& s = arguments.settings;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t channels = arguments.pyramid.channels, bins = s.bins();
  for (int64_t work = blockIdx.x; work < tiling.works; work += gridDim.x) {
    const int64_t rest = work / tiling.bin_tiles, first_bin = work % tiling.bin_tiles * kTileBins;
    const int64_t r = rest / tiling.channel_tiles, first = rest % tiling.channel_tiles * kWarpSize;
    const DeviceRoi<A> roi = read_roi<T>(arguments, r);
    const DeviceMap& map = arguments.pyramid.maps[roi.exists ? roi.level : 0];
    const int64_t count = bins - first_bin < kTileBins ? bins - first_bin : kTileBins;
    for (int32_t b = warp; b < count; b += kWarps) {
      A value = A(0);
      if (roi.exists && first + lane < channels) {
        const T* data = image_data<T>(map, roi.image) + (first + lane) * map.channel_stride;
        const int32_t bin = static_cast<int32_t>(first_bin) + b;
        value = average_bin<T>(roi, map, data, bin / s.width, bin % s.width);
      }
      tile[b * kTileStride + lane] = value;
    }
    __syncthreads();
    for (int c = warp; c < kWarpSize && first + c < channels; c += kWarps) {
      T* row = output + (r * channels + first + c) * bins + first_bin;
      for (int64_t b = lane; b < count; b += kWarpSize) row[b] = narrow<T>(tile[b * kTileStride + c]);
    }
    __syncthreads();  // the next work fills the tile
  }
}

// grad_map[pixel] += weight / (n_y n_x) * g, atomically, into accumulators that are zeros at the start.
//
// Parallelism: as forward. Bytes: 4 n_y n_x R C h w atomics of 4 bytes in the second-level cache, which
// bound it. The order of the additions, and with it the last bits, change from run to run.
template <typename T>
__global__ void __launch_bounds__(kMapThreads)
    roi_align_backward_kernel(RoiAlignArguments<T> arguments, int64_t blocks_per_roi, int64_t works,
                              const T* grad_output, DeviceGradients gradients) {
  using A = accumulator_t<T>;
  const RoiSettings& s = arguments.settings;
  const int64_t elements = arguments.pyramid.channels * s.bins();
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t r = work / blocks_per_roi, index = work % blocks_per_roi * kMapThreads + threadIdx.x;
    if (index >= elements) continue;
    const DeviceRoi<A> roi = read_roi<T>(arguments, r);
    if (!roi.exists) continue;
    const BinPlace place(s, static_cast<int32_t>(index));
    const int64_t width = arguments.pyramid.maps[roi.level].width;
    const int64_t plane = width * arguments.pyramid.maps[roi.level].height;
    A* sums = static_cast<A*>(gradients.maps[roi.level]) +
              (roi.image * arguments.pyramid.channels + place.channel) * plane;
    const A g = A(widen(grad_output[r * elements + index])) * (roi.y.reciprocal * roi.x.reciprocal);
    for_samples(roi, place.i, place.j, [&](int32_t row, int32_t column, A weight) {
      const A update[1] = {weight * g};
      add_atomically(sums + row * width + column, update);
    });
  }
}

// ------------------------------------------------------------------------------------- deterministic

constexpr int kRoiChannels = 8;  // of a thread

// Unpacks the boxes once for the kernel below, whose sums leave no registers for divisions. One thread each.
template <typename T>
__global__ void __launch_bounds__(kMapThreads)
    roi_table_kernel(RoiAlignArguments<T> arguments, DeviceRoi<accumulator_t<T>>* table) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kMapThreads;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kMapThreads + threadIdx.x; r < arguments.rois_count;
       r += step) {
    table[r] = read_roi<T>(arguments, r);
  }
}

struct RoiMapTiling {
  int32_t level;
  int32_t pixel_tiles, channel_tiles;  // of 32 pixels, of kRoiChannels channels
  int32_t works;                       // images * pixel_tiles * channel_tiles
};

// Whether a RoI may read one of the rows [first, last]. NaN may: its samples are skipped one by one.
template <typename A>
EFFOPS_DEVICE bool may_read_rows(const RoiAxis<A>& y, int32_t bins, int32_t first, int32_t last) {
  const A end = y.first + y.bin * static_cast<A>(bins);
  const A low = y.first < end ? y.first : end, high = y.first < end ? end : y.first;
  return !(high + A(1) < static_cast<A>(first)) && !(low - A(1) > static_cast<A>(last));
}

// Weight of pixel `place` in a sample of its axis, or false if the sample does not read it.
template <typename A>
EFFOPS_DEVICE bool sample_weight(const AxisSample<A>& sample, int32_t place, A& weight) {
  if (sample.index < 0) return false;
  weight = sample.index == place ? A(1) - sample.fraction : sample.fraction;
  return sample.index == place || (sample.has_next && sample.index + 1 == place);
}

// Adds the part of one RoI to the sums of pixel (row, column) for kRoiChannels channels, at most
// `channels`; `grad` is bin (0, 0) of the first of them.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE void add_roi(const RoiAxis<A>& y_axis, const RoiAxis<A>& x_axis, const RoiSettings& s,
                           int32_t row, int32_t column, const T* grad, int32_t channels,
                           A (&sums)[kRoiChannels]) {
  const A scale = y_axis.reciprocal * x_axis.reciprocal;
  for (int32_t i = 0; i < s.height; ++i) {
    for (int32_t a = 0; a < y_axis.samples; ++a) {
      A wy;
      if (!sample_weight(sample_axis(y_axis, i, a), row, wy)) continue;
      for (int32_t j = 0; j < s.width; ++j) {
        for (int32_t b = 0; b < x_axis.samples; ++b) {
          A wx;
          if (!sample_weight(sample_axis(x_axis, j, b), column, wx)) continue;
          const T* bin = grad + i * s.width + j;
          const A weight = wy * wx * scale;
#pragma unroll
          for (int c = 0; c < kRoiChannels; ++c) {
            if (c < channels) sums[c] += weight * A(widen(bin[c * s.bins()]));
          }
        }
      }
    }
  }
}

// grad_map[pixel] = sum over the RoIs, in their order, and their samples. Bit-reproducible: no atomics,
// every element of the map is written once.
//
// Parallelism: a warp owns 32 consecutive pixels of an image, one per lane, and kRoiChannels channels. Its
// lanes look at 32 RoIs at a time; those that may read the warp's rows are then added one after the other.
// Bytes: R boxes per tile from the second-level cache; grad_output once per pixel and sample that reads it.
// Bound by the instructions that compare samples with pixels: h n_y + (rows found) * w n_x per RoI and pixel.
// Limits: fits_roi_map_tiling.
template <typename T>
__global__ void __launch_bounds__(kMapThreads, 4)
    roi_align_map_gradient_kernel(RoiAlignArguments<T> arguments, RoiMapTiling tiling,
                                  const DeviceRoi<accumulator_t<T>>* table, const T* grad_output,
                                  T* gradient) {
  using A = accumulator_t<T>;
  constexpr int kWarps = kMapThreads / kWarpSize;
  const RoiSettings& s = arguments.settings;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t channels = arguments.pyramid.channels, bins = s.bins();
  const int32_t width = arguments.pyramid.maps[tiling.level].width;
  const int32_t pixels = width * arguments.pyramid.maps[tiling.level].height;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t next = static_cast<int64_t>(blockIdx.x) * kWarps + warp; next < tiling.works; next += step) {
    const int32_t work = static_cast<int32_t>(next), tile = work / tiling.channel_tiles;
    const int32_t image = tile / tiling.pixel_tiles;
    const int32_t first = (tile - image * tiling.pixel_tiles) * kWarpSize, left_pixels = pixels - first;
    const int32_t first_channel = (work - tile * tiling.channel_tiles) * kRoiChannels;
    const int32_t first_row = first / width;
    const int32_t last_row = (first + (left_pixels < kWarpSize ? left_pixels : kWarpSize) - 1) / width;
    // Lanes past the end of the map look at its first pixel, and store nothing.
    const int32_t pixel = lane < left_pixels ? first + lane : 0, row = pixel / width,
                  column = pixel - row * width;
    const int64_t left = channels - first_channel;
    const int32_t owned_channels = left < kRoiChannels ? static_cast<int32_t>(left) : kRoiChannels;
    A sums[kRoiChannels] = {};
    for (int64_t begin = 0; begin < arguments.rois_count; begin += kWarpSize) {
      const bool exists = begin + lane < arguments.rois_count && table[begin + lane].exists;
      const bool wanted = exists && table[begin + lane].level == tiling.level &&
                          table[begin + lane].image == image &&
                          may_read_rows(table[begin + lane].y, s.height, first_row, last_row);
      uint32_t found = __ballot_sync(kFullWarp, wanted);
      for (; found != 0; found &= found - 1) {
        const int64_t r = begin + lowest_bit(found);
        add_roi<T>(table[r].y, table[r].x, s, row, column,
                   grad_output + (r * channels + first_channel) * bins, owned_channels, sums);
      }
    }
    if (lane >= left_pixels) continue;
    T* target = gradient + (image * channels + first_channel) * pixels + pixel;
#pragma unroll
    for (int c = 0; c < kRoiChannels; ++c) {
      if (c < owned_channels) target[static_cast<int64_t>(c) * pixels] = narrow<T>(sums[c]);
    }
  }
}

// ------------------------------------------------------------------------------------------- geometry

inline int64_t roi_blocks(int64_t channels, const RoiSettings& settings) {
  return (channels * settings.bins() + kMapThreads - 1) / kMapThreads;
}

inline RoiTiling make_roi_tiling(int64_t rois, int64_t channels, const RoiSettings& settings) {
  const int64_t channel_tiles = (channels + kWarpSize - 1) / kWarpSize;
  const int64_t bin_tiles = (settings.bins() + kTileBins - 1) / kTileBins;
  return {channel_tiles, bin_tiles, rois * channel_tiles * bin_tiles};
}

// Sizes for which the deterministic kernel counts in 32 bits.
inline bool fits_roi_map_tiling(int64_t batch, int64_t channels, int64_t pixels) {
  const int64_t tiles = (pixels + kWarpSize - 1) / kWarpSize,
                chunks = (channels + kRoiChannels - 1) / kRoiChannels;
  return pixels <= INT32_MAX - kWarpSize && (batch == 0 || tiles * chunks <= INT32_MAX / batch);
}

inline RoiMapTiling make_roi_map_tiling(int64_t level, int64_t batch, int64_t channels, int64_t pixels) {
  const int64_t pixel_tiles = (pixels + kWarpSize - 1) / kWarpSize;
  const int64_t channel_tiles = (channels + kRoiChannels - 1) / kRoiChannels;
  return {static_cast<int32_t>(level), static_cast<int32_t>(pixel_tiles), static_cast<int32_t>(channel_tiles),
          static_cast<int32_t>(batch * pixel_tiles * channel_tiles)};
}

}  // namespace effops::sampling
