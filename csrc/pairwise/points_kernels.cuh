// Rows of points on CUDA: normalised, and gradients back through that; a warp per row. No torch, no launches.
#pragma once

#include "../common/warp.h"
#include "pairwise_math.h"

namespace effops::pairwise {

constexpr int kPointThreads = 256;
constexpr int kPointWarps = kPointThreads / kWarpSize;  // rows of a block
constexpr int kLaneChannels = static_cast<int>(kMaxChannels) / kWarpSize;
constexpr int64_t kPointPad = 128;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
inline int64_t point_blocks(int64_t rows) { return divide_up(rows, kPointWarps); }

// Points as the kernels on pairs read them: [B, rows, channels], rows padded by zeros to a multiple of
// kPointPad and channels to what a kernel wants, as numbers or as sums of one or two bf16 (with two of them,
// exact to 2^-17 of the number).
template <typename T>
struct PaddedPoints {
  T* values;  // or null
  bf16* high;  // or null
  bf16* low;  // or null
  int64_t rows, channels;

  EFFOPS_DEVICE bool exists() const { return values != nullptr || high != nullptr; }
  EFFOPS_DEVICE int64_t offset(int64_t image, int64_t row) const { return (image * rows + row) * channels; }
  EFFOPS_DEVICE void put(int64_t image, int64_t row, int64_t channel, T value) const {
    const int64_t at = offset(image, row) + channel;
    if (values != nullptr) values[at] = value;
    if (high == nullptr) return;
    high[at] = narrow<bf16>(static_cast<float>(value));
    if (low != nullptr) low[at] = narrow<bf16>(static_cast<float>(value) - widen(high[at]));
  }
};

// Sums that several blocks have made parts of, [splits, B, rows, channels], rows and channels padded.
template <typename T>
struct SplitSums {
  const T* data;
  int64_t splits, batch, rows, channels;

  EFFOPS_DEVICE T at(int64_t image, int64_t row, int64_t channel) const {
    const int64_t step = batch * rows * channels;
    const T* part = data + (image * rows + row) * channels + channel;
    T sum = 0;
#pragma unroll 4
    for (int64_t split = 0; split < splits; ++split) sum += part[split * step];
    return sum;
  }
};

// The row of this warp.
struct PointRow {
  int64_t image, row;
  int lane;

  EFFOPS_DEVICE explicit PointRow(int64_t rows) : lane(static_cast<int>(threadIdx.x) % kWarpSize) {
    const int64_t index = int64_t{blockIdx.x} * kPointWarps + threadIdx.x / kWarpSize;
    image = index / rows;
    row = index - image * rows;
  }
};

// Calls f(i, channel) for the channels of this lane, i < kLaneChannels.
template <typename F>
EFFOPS_DEVICE void for_lane_channels(int lane, int64_t channels, const F& f) {
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const int64_t channel = lane + int64_t{kWarpSize} * i;
    if (channel < channels) f(i, channel);
  }
}

// All lanes get the same bits.
EFFOPS_DEVICE double add_lanes(double value) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

template <typename T>
EFFOPS_DEVICE bool is_finite(T value) {
  return value - value == T(0);
}

template <typename T>
EFFOPS_DEVICE T not_a_number() {
  if constexpr (sizeof(T) == 8)
    return bit_cast<T>(uint64_t{0x7ff8000000000000});
  else
    return bit_cast<T>(uint32_t{0x7fc00000});
}

// ------------------------------------------------------------------------------------------ normalise

// lost[image] |= whether a number of it is not finite; x [B, rows, channels]. Every number is read once.
template <typename T>
__global__ void __launch_bounds__(kPointThreads)
    find_lost_images_kernel(const T* x, int64_t batch, int64_t rows, int64_t channels, int32_t* lost) {
  const PointRow place(rows);
  if (place.image >= batch) return;
  const T* from = x + (place.image * rows + place.row) * channels;
  int bad = 0;
  for_lane_channels(place.lane, channels, [&](int, int64_t channel) { bad |= !is_finite(from[channel]); });
  if (__any_sync(kFullWarp, bad) != 0 && place.lane == 0) atomicOr(lost + place.image, 1);
}

template <typename T>
struct Normalization {
  const T* x;  // [B, rows, channels]
  int64_t batch, rows, channels;
  const int32_t* lost;  // [B], where not 0 all rows become NaN; or null
  T* unit;  // [B, rows, channels]; or null
  PaddedPoints<T> padded;  // if it exists
};

// The norm of a row, as a double, by one warp; NaN if a number of it is not finite.
template <typename T>
EFFOPS_DEVICE double row_norm(const T* row, int lane, int64_t channels) {
  double square = 0;
  int bad = 0;
  for_lane_channels(lane, channels, [&](int, int64_t channel) {
    const double value = row[channel];
    square += value * value;
    bad |= !is_finite(value);
  });
  const double norm = sqrt(add_lanes(square));
  return __any_sync(kFullWarp, bad) != 0 ? not_a_number<double>() : norm;
}

// x / max(norm, 1e-12). NaN stays NaN.
EFFOPS_DEVICE double divisor_of(double norm) { return norm < kSmallestNorm ? kSmallestNorm : norm; }

// Bytes: x twice (the second time from a cache), the copies once.
template <typename T>
__global__ void __launch_bounds__(kPointThreads) normalize_points_kernel(Normalization<T> arguments) {
  const PointRow place(arguments.rows);
  if (place.image >= arguments.batch) return;
  const int64_t begin = (place.image * arguments.rows + place.row) * arguments.channels;
  double divisor = divisor_of(row_norm(arguments.x + begin, place.lane, arguments.channels));
  if (arguments.lost != nullptr && arguments.lost[place.image] != 0) divisor = not_a_number<double>();
  for_lane_channels(place.lane, arguments.channels, [&](int, int64_t channel) {
    const T value = static_cast<T>(arguments.x[begin + channel] / divisor);
    if (arguments.unit != nullptr) arguments.unit[begin + channel] = value;
    if (arguments.padded.exists()) arguments.padded.put(place.image, place.row, channel, value);
  });
}

// A gradient of normalised points as a sum of what there is.
template <typename T>
struct GradientParts {
  const T* first;  // [B, rows, channels], or null
  const T* second;  // the same
  SplitSums<T> sums;  // if its data are not null

  EFFOPS_DEVICE T at(int64_t image, int64_t row, int64_t channel, int64_t index) const {
    T value = first != nullptr ? first[index] : T(0);
    if (second != nullptr) value += second[index];
    if (sums.data != nullptr) value += sums.at(image, row, channel);
    return value;
  }
};

// The gradient of x from that of u = x / max(norm, 1e-12): (g - u (u . g)) / norm, or g / 1e-12.
template <typename T>
__global__ void __launch_bounds__(kPointThreads, 2)
    normalize_points_grad_kernel(const T* x, int64_t batch, int64_t rows, int64_t channels,
                                 GradientParts<T> parts, T* grad_x) {
  const PointRow place(rows);
  if (place.image >= batch) return;
  const int64_t begin = (place.image * rows + place.row) * channels;
  const double norm = row_norm(x + begin, place.lane, channels), divisor = divisor_of(norm);
  T gradient[kLaneChannels];
  double dot = 0;
  for_lane_channels(place.lane, channels, [&](int i, int64_t channel) {
    gradient[i] = parts.at(place.image, place.row, channel, begin + channel);
    dot += x[begin + channel] / divisor * gradient[i];
  });
  dot = norm < kSmallestNorm ? 0 : add_lanes(dot);
  for_lane_channels(place.lane, channels, [&](int i, int64_t channel) {
    grad_x[begin + channel] = static_cast<T>((gradient[i] - x[begin + channel] / divisor * dot) / divisor);
  });
}

}  // namespace effops::pairwise
