// CUDA kernels of point_sample. No torch, no launches.
#pragma once

#include "pyramid_kernels.cuh"

namespace effops::sampling {

template <typename T>
struct PointSampleArguments {
  DevicePyramid pyramid;
  const int64_t* batch;  // [N]
  const int64_t* level;  // [N]
  const void* xy;        // [N, 2]
  bool xy_as_value;      // of type T, else float
  int32_t lanes_log2;    // lanes that share a point
  int64_t points;
};

// A point on its map. Corner k, of (y0,x0) (y0,x1) (y1,x0) (y1,x1), is `valid` if it is inside.
template <typename A>
struct DevicePoint {
  int64_t level, image;
  int32_t x0, y0;
  Corners<A> corners;
  A weight[4];
  bool active;

  EFFOPS_DEVICE int32_t column(int corner) const { return x0 + (corner & 1); }
  EFFOPS_DEVICE int32_t line(int corner) const { return y0 + (corner >> 1); }
};

EFFOPS_DEVICE float pixel_coordinate(float unit, float side) { return fmaf(unit, side, -0.5f); }
EFFOPS_DEVICE double pixel_coordinate(double unit, double side) { return fma(unit, side, -0.5); }

// A point that does not exist is inactive, like one outside its map, its image or the pyramid.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE DevicePoint<A> read_point(const PointSampleArguments<T>& arguments, int64_t n) {
  DevicePoint<A> point{};
  if (n >= arguments.points) return point;
  point.level = arguments.level[n];
  point.image = arguments.batch[n];
  if (!is_in_pyramid(arguments.pyramid, point.level, point.image)) return point;
  const int32_t height = arguments.pyramid.maps[point.level].height;
  const int32_t width = arguments.pyramid.maps[point.level].width;
  const A x = pixel_coordinate(read_coordinate<T>(arguments.xy, arguments.xy_as_value, 2 * n), A(width));
  const A y = pixel_coordinate(read_coordinate<T>(arguments.xy, arguments.xy_as_value, 2 * n + 1), A(height));
  if (!is_active(x, y, height, width)) return point;
  point.active = true;
  point.corners = corners_at(x, y, height, width);
  corner_weights(point.corners, point.weight);
  point.x0 = static_cast<int32_t>(floor(x));
  point.y0 = static_cast<int32_t>(floor(y));
  return point;
}

// out[n, :] = sum over the corners inside the map of weight * map[level, batch, :, corner].
//
// Parallelism: a point belongs to a group of 1..32 lanes, each with kVector consecutive channels, and takes
// several turns where there are more channels. A block works on consecutive points.
// Bytes: 4 N C e_value gathered, N C e_value written. Maps with channels innermost are read in whole
// sectors; of others each element costs a sector of 32 bytes: bound by the second-level cache.
// Limits: with kVector > 1 channels are innermost, C % kVector == 0, and all rows begin at multiples of
// kVector elements.
template <typename T, int kVector>
__global__ void __launch_bounds__(kMapThreads)
    point_sample_forward_kernel(PointSampleArguments<T> arguments, T* output) {
  using A = accumulator_t<T>;
  const int lanes = 1 << arguments.lanes_log2, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t groups = kMapThreads >> arguments.lanes_log2, channels = arguments.pyramid.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * groups;
  int64_t n = blockIdx.x * groups + (threadIdx.x >> arguments.lanes_log2);
  for (; n < arguments.points; n += step) {
    const DevicePoint<A> point = read_point<T>(arguments, n);
    const DeviceMap& map = arguments.pyramid.maps[point.level < 0 || !point.active ? 0 : point.level];
    const T* data = image_data<T>(map, point.active ? point.image : 0);
    const int64_t first = point.y0 * map.row_stride + point.x0 * map.pixel_stride;
    for (int64_t channel = lane * kVector; channel < channels; channel += lanes * kVector) {
      A sums[kVector] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (!point.active || !point.corners.valid[k]) continue;
        const int64_t offset = first + (k >> 1) * map.row_stride + (k & 1) * map.pixel_stride;
        A corner[kVector];
        widen_pack(load_pack<kVector>(data + offset + channel * map.channel_stride), corner);
#pragma unroll
        for (int c = 0; c < kVector; ++c) sums[c] += point.weight[k] * corner[c];
      }
      Pack<T, kVector> result;
#pragma unroll
      for (int c = 0; c < kVector; ++c) result.data[c] = narrow<T>(sums[c]);
      store_pack_once(output + n * channels + channel, result);
    }
  }
}

template <typename T>
EFFOPS_DEVICE void store_xy(void* grad_xy, bool as_value, int64_t index, accumulator_t<T> value) {
  if (as_value) {
    static_cast<T*>(grad_xy)[index] = narrow<T>(value);
  } else {
    static_cast<float*>(grad_xy)[index] = static_cast<float>(value);
  }
}

// grad_map[corner] += weight * g (kScatter: atomically, into accumulators that are zeros at the start);
// grad_xy = (W, H) * slopes of <g, v>, from the dot products of g with the corners.
//
// Parallelism: as forward; the dot products are reduced over the group by shuffles, in a fixed order.
// Bytes: forward's, 4 N C atomics of 4 bytes in the second-level cache, which bound it.
// Limits: the order of the atomic additions, and with it the last bits of grad_map, change from run to run.
template <typename T, bool kScatter, bool kNeedXy>
__global__ void __launch_bounds__(kMapThreads)
    point_sample_backward_kernel(PointSampleArguments<T> arguments, const T* grad_output,
                                 DeviceGradients gradients, void* grad_xy) {
  using A = accumulator_t<T>;
  const int lanes = 1 << arguments.lanes_log2, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t groups = kMapThreads >> arguments.lanes_log2, channels = arguments.pyramid.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * groups;
  for (int64_t begin = blockIdx.x * groups; begin < arguments.points; begin += step) {
    const int64_t n = begin + (threadIdx.x >> arguments.lanes_log2);
    const DevicePoint<A> point = read_point<T>(arguments, n);
    const int64_t level = point.active ? point.level : 0, image = point.active ? point.image : 0;
    const DeviceMap& map = arguments.pyramid.maps[level];
    const T* data = image_data<T>(map, image);
    A* sums = kScatter ? static_cast<A*>(gradients.maps[level]) : nullptr;
    const int64_t plane = static_cast<int64_t>(map.height) * map.width;
    A dots[4] = {};
    for (int64_t channel = lane; point.active && channel < channels; channel += lanes) {
      const A g = widen(load_pack<1>(grad_output + n * channels + channel).data[0]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (!point.corners.valid[k]) continue;
        const int64_t x = point.column(k), y = point.line(k);
        if (kNeedXy) {
          const T* pixel = data + y * map.row_stride + x * map.pixel_stride + channel * map.channel_stride;
          dots[k] += g * widen(load_pack<1>(pixel).data[0]);
        }
        if (kScatter) {
          const A update[1] = {point.weight[k] * g};
          add_atomically(sums + (image * channels + channel) * plane + y * map.width + x, update);
        }
      }
    }
    if (kNeedXy) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        for (int offset = 1; offset < lanes; offset *= 2)
          dots[k] += __shfl_xor_sync(kFullWarp, dots[k], offset);
      }
      if (lane == 0 && n < arguments.points) {
        A dx = A(0), dy = A(0);
        if (point.active) corner_slopes(point.corners, dots, dx, dy);
        store_xy<T>(grad_xy, arguments.xy_as_value, 2 * n, A(map.width) * dx);
        store_xy<T>(grad_xy, arguments.xy_as_value, 2 * n + 1, A(map.height) * dy);
      }
    }
  }
}

// ------------------------------------------------------------------------------------- deterministic

constexpr int kOwnedPixels = 32;  // of a warp, times 32 channels
constexpr int kOwnedStride = kWarpSize + 1;  // of a pixel in shared memory, against bank conflicts
constexpr int kOwnedElements = kOwnedPixels * kOwnedStride;
constexpr uint32_t kNoPixels = 0xffffffffu;

// How the pixels and channels of one map are cut; a warp takes one work at a time.
struct MapTiling {
  int64_t level;
  int64_t pixel_tiles, channel_tiles;
  int64_t works;  // images * pixel_tiles * channel_tiles
};

// The corners of a point among the pixels [first, first + kOwnedPixels), one byte each, 0xff: elsewhere.
template <typename A>
EFFOPS_DEVICE uint32_t owned_corners(const DevicePoint<A>& point, int64_t level, int64_t image, int64_t first,
                                     int32_t width) {
  uint32_t owned = kNoPixels;
  if (!point.active || point.level != level || point.image != image) return owned;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t pixel = static_cast<int64_t>(point.line(k)) * width + point.column(k) - first;
    if (point.corners.valid[k] && pixel >= 0 && pixel < kOwnedPixels) {
      owned ^= (static_cast<uint32_t>(pixel) ^ 0xffu) << (8 * k);
    }
  }
  return owned;
}

// grad_map[pixel] = sum over the points, in their order, of weight * g. Bit-reproducible: no atomics, every
// element of the map is written once.
//
// Parallelism: a warp owns 32 pixels and 32 channels of an image, summed in shared memory. Its lanes look
// at 32 points at a time, then add those found one after the other, a channel per lane.
// Bytes: N points per tile of pixels and channels from the second-level cache; grad_output once per found
// corner tile; the gradient once. Bound by the instructions of the search: H W / 32 * C / 32 * N / 32 turns.
template <typename T>
__global__ void __launch_bounds__(kMapThreads)
    point_sample_map_gradient_kernel(PointSampleArguments<T> arguments, MapTiling tiling,
                                     const T* grad_output, T* gradient) {
  using A = accumulator_t<T>;
  constexpr int kWarps = kMapThreads / kWarpSize;
  EFFOPS_SHARED(A, tiles, kWarps * kOwnedElements);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  A* tile = tiles + warp * kOwnedElements;
  const int64_t channels = arguments.pyramid.channels;
  const int32_t width = arguments.pyramid.maps[tiling.level].width;
  const int64_t pixels = static_cast<int64_t>(arguments.pyramid.maps[tiling.level].height) * width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * kWarps + warp; work < tiling.works; work += step) {
    const int64_t tile_index = work / tiling.channel_tiles, image = tile_index / tiling.pixel_tiles;
    const int64_t first = tile_index % tiling.pixel_tiles * kOwnedPixels;
    const int64_t first_channel = work % tiling.channel_tiles * kWarpSize, channel = first_channel + lane;
    for (int p = 0; p < kOwnedPixels; ++p) tile[p * kOwnedStride + lane] = A(0);
    for (int64_t begin = 0; begin < arguments.points; begin += kWarpSize) {
      const DevicePoint<A> point = read_point<T>(arguments, begin + lane);
      const uint32_t owned = owned_corners(point, tiling.level, image, first, width);
      uint32_t found = __ballot_sync(kFullWarp, owned != kNoPixels);
      for (; found != 0; found &= found - 1) {
        const int source = lowest_bit(found);
        const uint32_t corners = __shfl_sync(kFullWarp, owned, source);
        const A g = channel < channels ? A(widen(grad_output[(begin + source) * channels + channel])) : A(0);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const A weight = __shfl_sync(kFullWarp, point.weight[k], source);
          const uint32_t pixel = corners >> (8 * k) & 0xffu;
          if (pixel != 0xffu) tile[pixel * kOwnedStride + lane] += weight * g;
        }
      }
    }
    __syncwarp();
    for (int c = 0; c < kWarpSize && first_channel + c < channels; ++c) {
      if (first + lane < pixels) {
        gradient[(image * channels + first_channel + c) * pixels + first + lane] =
            narrow<T>(tile[lane * kOwnedStride + c]);
      }
    }
    __syncwarp();  // the next work clears the tile
  }
}

// ------------------------------------------------------------------------------------------- geometry

// Lanes (log2) that share a point: enough for all channels, if 32 are.
inline int32_t point_lanes_log2(int64_t channels, int64_t vector) {
  int32_t log2 = 0;
  while (log2 < 5 && (vector << log2) < channels) ++log2;
  return log2;
}

inline int64_t point_blocks(int64_t points, int32_t lanes_log2) {
  const int64_t groups = kMapThreads >> lanes_log2;
  return (points + groups - 1) / groups;
}

inline MapTiling make_map_tiling(int64_t level, int64_t batch, int64_t pixels, int64_t channels,
                                 int64_t pixels_per_tile, int64_t channels_per_tile) {
  const int64_t pixel_tiles = (pixels + pixels_per_tile - 1) / pixels_per_tile;
  const int64_t channel_tiles = (channels + channels_per_tile - 1) / channels_per_tile;
  return {level, pixel_tiles, channel_tiles, batch * pixel_tiles * channel_tiles};
}

}  // namespace effops::sampling
