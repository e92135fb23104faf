// What the CUDA kernels over windows share: maps of any floating type and memory format, and tiles of an
// image in shared memory with the pixels around them that the taps reach. No torch, no launches.
#pragma once

#include <cmath>

#include "../common/warp.h"
#include "window_math.h"

namespace effops::localfilter {

// ----------------------------------------------------------------------------------------------- maps

// Maps [N, C, H, W], contiguous or channels_last. Their type is known at run time only: they are a small part
// of what the kernels read, and kernels for all pairs of types would be many.
struct DeviceMaps {
  void* data;
  FloatType type;
  int64_t image_stride, channel_stride, row_stride, pixel_stride;  // in elements

  EFFOPS_HD int64_t offset(int64_t image, int64_t channel, int64_t row, int64_t column) const {
    return image * image_stride + channel * channel_stride + row * row_stride + column * pixel_stride;
  }
};

inline DeviceMaps make_device_maps(const void* data, FloatType type, bool channels_last, int64_t channels,
                                   int64_t height, int64_t width) {
  DeviceMaps maps{};
  maps.data = const_cast<void*>(data);
  maps.type = type;
  maps.image_stride = channels * height * width;
  maps.channel_stride = channels_last ? 1 : height * width;
  maps.pixel_stride = channels_last ? channels : 1;
  maps.row_stride = width * maps.pixel_stride;
  return maps;
}

// Calls f(T{}) with the type of maps that are computed with in A: double, or float for all others.
template <typename A, typename F>
EFFOPS_DEVICE void with_type(FloatType type, const F& f) {
  if constexpr (std::is_same_v<A, double>) {
    f(double{});
  } else {
    switch (type) {
      case FloatType::kBFloat16: return f(bf16{});
      case FloatType::kHalf: return f(f16{});
      default: return f(float{});
    }
  }
}

// values[c] = the element c channels behind `offset`; 0 from channel `count` on.
template <int kCount, typename A>
EFFOPS_DEVICE void read_channels(const DeviceMaps& maps, int64_t offset, int count, A (&values)[kCount]) {
  with_type<A>(maps.type, [&](auto tag) {
    using T = decltype(tag);
    const T* data = static_cast<const T*>(maps.data) + offset;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      values[c] = c < count ? A(widen(load_pack<1>(data + c * maps.channel_stride).data[0])) : A(0);
    }
  });
}

template <int kCount, typename A>
EFFOPS_DEVICE void write_channels(const DeviceMaps& maps, int64_t offset, int count,
                                  const A (&values)[kCount]) {
  with_type<A>(maps.type, [&](auto tag) {
    using T = decltype(tag);
    T* data = static_cast<T*>(maps.data) + offset;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if (c < count) data[c * maps.channel_stride] = narrow<T>(values[c]);
    }
  });
}

// -------------------------------------------------------------------------------------------- windows

// A Window in 32 bits. `center` is right for output pixels that exist.
struct DeviceWindow {
  int32_t height, width, out_height, out_width;
  int32_t kernel, dilation, stride, upsample;
  int padding;

  EFFOPS_HD int32_t center(int32_t out) const { return out * stride / upsample; }
  EFFOPS_HD int32_t offset(int32_t tap) const { return (tap - kernel / 2) * dilation; }
  EFFOPS_HD bool leaves_out() const { return localfilter::leaves_out(padding); }
};

inline DeviceWindow make_device_window(const Window& window) {
  const auto narrowed = [](int64_t value) { return static_cast<int32_t>(value); };
  return {narrowed(window.height),    narrowed(window.width),    narrowed(window.out_height),
          narrowed(window.out_width), narrowed(window.kernel),   narrowed(window.dilation),
          narrowed(window.stride),    narrowed(window.upsample), window.padding};
}

// Whether center + offset lies in [0, size). The sum may leave 32 bits: it wraps to what is outside as well.
EFFOPS_HD bool is_inside(int32_t center, int32_t offset, int32_t size) {
  return static_cast<uint32_t>(center) + static_cast<uint32_t>(offset) < static_cast<uint32_t>(size);
}

// Goes through the rows (or columns) in [low, high], inside the image or not, that row `row` of `size` stands
// for (pad_index), in an order of their own that is always the same.
class Preimages {
 public:
  EFFOPS_DEVICE Preimages(int64_t row, int64_t size, int padding, int64_t low, int64_t high) : high_(high) {
    second_ = high + 1;
    if (padding == kReflect && size > 1) {
      step_ = 2 * (size - 1);
      at_ = from(low, row);
      const bool is_border = row == 0 || row == size - 1;  // its own mirror image
      if (!is_border) second_ = from(low, -row);
      if (at_ > high) skip();
    } else {
      const bool extends = !leaves_out(padding);
      step_ = 1;
      at_ = extends && row == 0 ? low : max(row, low);
      if (!(extends && row == size - 1)) high_ = min(row, high);
      second_ = high_ + 1;
    }
  }

  EFFOPS_DEVICE bool is_done() const { return at_ > high_; }
  EFFOPS_DEVICE int64_t at() const { return at_; }
  EFFOPS_DEVICE void advance() {
    at_ += step_;
    if (at_ > high_) skip();
  }

 private:
  // The first place from `low` on that lies a multiple of the period from `start`.
  EFFOPS_DEVICE int64_t from(int64_t low, int64_t start) const {
    int64_t distance = start - low;
    if (distance < -step_ || distance >= 2 * step_)
      distance %= step_;  // a division: only where taps reach far
    if (distance < 0) distance += step_;
    if (distance >= step_) distance -= step_;
    return low + distance;
  }
  EFFOPS_DEVICE void skip() {
    at_ = second_;
    second_ = high_ + 1;
  }

  int64_t at_, step_, second_, high_;
};

// The rows (or columns) of outputs whose tap `tap` of their axis reads row `row` of `size`, inside the image
// or through its padding:
//   for (Readers y(window, row, size, tap); !y.is_done(); y.advance(window)) use(y.at());
class Readers {
 public:
  EFFOPS_DEVICE Readers(const DeviceWindow& window, int32_t row, int32_t size, int32_t tap) {
    const int64_t offset = window.offset(tap);
    if (window.padding == kReflect && size > 1) {
      // The centres lie in a range shorter than the period of the mirror images: at most one each.
      const int64_t period = 2 * (int64_t{size} - 1);
      const bool is_border = row == 0 || row == size - 1;  // its own mirror image
      const int64_t one = wrap(row - offset, period), other = is_border ? size : wrap(-row - offset, period);
      center_ = last_ = static_cast<int32_t>(one < size ? one : -1);
      second_ = static_cast<int32_t>(other < size ? other : -1);
      if (center_ < 0) skip();
    } else {
      const bool extends = !leaves_out(window.padding);
      const int64_t center = row - offset, end = size - 1;
      center_ = extends && row == 0 ? 0 : static_cast<int32_t>(max(min(center, int64_t{size}), int64_t{0}));
      last_ = static_cast<int32_t>(extends && row == end ? end : max(min(center, end), int64_t{-1}));
      second_ = -1;
    }
    find(window);
  }

  EFFOPS_DEVICE bool is_done() const { return center_ > last_; }
  EFFOPS_DEVICE int32_t at() const { return out_; }
  EFFOPS_DEVICE void advance(const DeviceWindow& window) {
    ++out_;
    if (++phase_ < window.upsample) return;
    next();
    find(window);
  }

 private:
  // Brought into [0, period) by a multiple of it.
  static EFFOPS_DEVICE int64_t wrap(int64_t value, int64_t period) {
    if (value < -period || value >= 2 * period) value %= period;  // a division: only where taps reach far
    if (value < 0) value += period;
    return value >= period ? value - period : value;
  }
  EFFOPS_DEVICE void next() {
    if (++center_ > last_) skip();
  }
  EFFOPS_DEVICE void skip() {
    if (second_ < 0) {
      last_ = center_ - 1;
    } else {
      center_ = last_ = second_;
      second_ = -1;
    }
  }
  // The first output of the next centre that has any.
  EFFOPS_DEVICE void find(const DeviceWindow& window) {
    phase_ = 0;
    out_ = center_ * window.upsample;
    if (window.stride == 1) return;
    for (; !is_done(); next()) {
      out_ = center_ / window.stride;
      if (out_ * window.stride == center_) return;
    }
  }

  int32_t center_, last_, second_;  // centres to come: up to the last, then the second, if it is not -1
  int32_t out_, phase_;             // phase: which output of the centre
};

// ---------------------------------------------------------------------------------------------- tiles

// A part of an image in shared memory, channel after channel. Rows are `pitch` elements apart, of which those
// from `columns` on are 0.
struct TileShape {
  int32_t rows, columns, pitch;

  EFFOPS_HD int32_t plane() const { return rows * pitch; }
};

// Copies kRows rows of a tile, `step` rows apart, of all channels. Reads something in any case, so that a
// thread's loads do not wait for each other.
template <int kRows, int kChannels, typename T, typename A>
EFFOPS_DEVICE void load_tile_rows(const T* source, const DeviceMaps& maps, const DeviceWindow& window,
                                  const TileShape& shape, int channels, int row, int step, int64_t first_row,
                                  int64_t first_column, A* tile) {
  int64_t y[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    y[r] = row + r * step < shape.rows ? pad_index(first_row + row + r * step, window.height, window.padding)
                                       : -1;
  }
  for (int column = static_cast<int>(threadIdx.x) % kWarpSize; column < shape.pitch; column += kWarpSize) {
    const int64_t x = column < shape.columns ? pad_index(first_column + column, window.width, window.padding)
                                             : -1;
    T values[kRows][kChannels];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t pixel = y[r] >= 0 && x >= 0 ? y[r] * maps.row_stride + x * maps.pixel_stride : 0;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        values[r][c] = load_pack<1>(source + pixel + (c < channels ? c : 0) * maps.channel_stride).data[0];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * step >= shape.rows) continue;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const A value = y[r] >= 0 && x >= 0 && c < channels ? A(widen(values[r][c])) : A(0);
        tile[c * shape.plane() + (row + r * step) * shape.pitch + column] = value;
      }
    }
  }
}

// Fills kChannels planes; pixels that nothing stands for and channels from `channels` on are 0. `first_row`
// and `first_column` may lie outside the image. Barriers are the caller's.
//
// Warps copy rows, some at a time; lanes are neighbours in them.
// Bytes: the tile once, from the second-level cache where other tiles share its border. Bound: the latency
// of its few rounds of loads.
template <int kThreads, int kChannels, typename A>
EFFOPS_DEVICE void load_tile(const DeviceMaps& maps, const DeviceWindow& window, const TileShape& shape,
                             int64_t image, int64_t channel, int channels, int64_t first_row,
                             int64_t first_column, A* tile) {
  // Loads of a thread at a time: small blocks have more registers for them.
  constexpr int kLoads = kThreads > 128 ? 8 : 16, kWarps = kThreads / kWarpSize;
  constexpr int kRows = kLoads / kChannels > 4 ? 4 : kLoads / kChannels;
  if (channels == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < kChannels * shape.plane(); i += kThreads) tile[i] = A(0);
    return;
  }
  with_type<A>(maps.type, [&](auto tag) {
    using T = decltype(tag);
    const T* source = static_cast<const T*>(maps.data) + image * maps.image_stride +
                      channel * maps.channel_stride;
    for (int row = static_cast<int>(threadIdx.x) / kWarpSize; row < shape.rows; row += kRows * kWarps) {
      load_tile_rows<kRows, kChannels>(source, maps, window, shape, channels, row, kWarps, first_row,
                                       first_column, tile);
    }
  });
}

// Rows (or columns) of the image from the first to the last centre of `count` neighbouring outputs, at most.
inline int64_t center_span(const Window& window, int64_t outputs, int64_t count) {
  const int64_t last = (outputs < count ? outputs : count) - 1;
  return (last * window.stride + window.upsample - 1) / window.upsample + 1;
}

// exp, where a relative error of 1e-6 does no harm.
EFFOPS_DEVICE float fast_exp(float value) {
#if defined(__CUDACC__)
  constexpr float kLog2E = 1.4426950408889634f;
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value * kLog2E));
  return result;
#else
  return expf(value);
#endif
}
EFFOPS_DEVICE double fast_exp(double value) { return exp(value); }

}  // namespace effops::localfilter
