// RoIAlign: bins, samples and the border rule on one axis. Scalar maths that the CPU library, the CUDA
// kernels and the simulator share, in the order of operations of effops.reference.roi_align.
//
//   out[r, :, i, j] = 1 / (n_y n_x) * sum over a < n_y, b < n_x of  v(x_jb, y_ia)
//   y_ia = y1 + i bin + (a + 0.5) bin / n_y,  bin = (y2 - y1) / h,  the same in x
//
// v(x, y) = 0 if y < -1 or y > H (the same in x); otherwise x and y are clamped to the map and it is
// interpolated bilinearly. Both the samples and the interpolation are products of an x and a y part.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace effops::sampling {

struct RoiSettings {
  int32_t height, width;   // h, w: bins
  int32_t sampling_ratio;  // samples per bin and axis; 0 or less: adaptive
  bool aligned;

  EFFOPS_HD int64_t bins() const { return int64_t{height} * width; }
};

// Products that the compiler may not fuse with an addition: the border rule is a jump.
EFFOPS_HD float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
EFFOPS_HD double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// x / count, correctly rounded, given the rounded reciprocal of the count (Markstein). On the device it
// takes the place of a subroutine; Inf gives NaN, which the border rule treats alike.
template <typename A>
EFFOPS_HD A divide_by_count(A x, A count, [[maybe_unused]] A reciprocal) {
#if defined(__CUDA_ARCH__)
  const A quotient = x * reciprocal;
  return fma(fma(-quotient, count, x), reciprocal, quotient);
#else
  return x / count;
#endif
}

// The bins of a box on one axis of a map, in pixels.
template <typename A>
struct RoiAxis {
  A first;          // where the first bin begins
  A bin;            // length of a bin; negative for inverted boxes
  A reciprocal;     // of samples
  int32_t samples;  // per bin
  int32_t side;     // pixels of the map, < 2^24
};

template <typename A>
EFFOPS_HD int32_t adaptive_samples(A bin, int32_t side) {
  const int32_t most = 2 * side + 2;
  if (!(bin > A(0))) return 0;  // also NaN
  if (bin >= static_cast<A>(most)) return most;
  const int32_t truncated = static_cast<int32_t>(bin);
  return truncated + (static_cast<A>(truncated) < bin ? 1 : 0);
}

template <typename A>
EFFOPS_HD RoiAxis<A> roi_axis(A low, A high, A stride, int32_t bins, int32_t side, int32_t sampling_ratio,
                              bool aligned) {
  low = low / stride;
  high = high / stride;
  if (aligned) {
    low = low - A(0.5);
    high = high - A(0.5);
  }
  A size = high - low;
  if (!aligned && size < A(1)) size = A(1);  // NaN stays
  const A bin = size / static_cast<A>(bins);
  const int32_t samples = sampling_ratio > 0 ? sampling_ratio : adaptive_samples(bin, side);
  return {low, bin, A(1) / static_cast<A>(samples), samples, side};
}

// What one sample reads on one axis: pixel `index` with weight 1 - fraction and, if there is one, the next
// pixel with weight `fraction`. index < 0: nothing.
template <typename A>
struct AxisSample {
  int32_t index;
  bool has_next;
  A fraction;
};

template <typename A>
EFFOPS_HD AxisSample<A> sample_axis(const RoiAxis<A>& axis, int32_t bin, int32_t sample) {
  const A begin = axis.first + rounded_product(static_cast<A>(bin), axis.bin);
  const A within = divide_by_count(rounded_product(static_cast<A>(sample) + A(0.5), axis.bin),
                                   static_cast<A>(axis.samples), axis.reciprocal);
  A position = begin + within;
  const A side = static_cast<A>(axis.side);
  if (!(position >= A(-1) && position <= side && axis.side > 0)) return {-1, false, A(0)};
  position = position < A(0) ? A(0) : position;
  position = position > side - A(1) ? side - A(1) : position;
  const int32_t index = static_cast<int32_t>(position);
  return {index, index + 1 < axis.side, position - static_cast<A>(index)};
}

// Image of a RoI, or -1 if it is none of `batch` images.
template <typename A>
EFFOPS_HD int64_t roi_image(A value, int64_t batch) {
  return value >= A(0) && value < static_cast<A>(batch) ? static_cast<int64_t>(value) : -1;
}

}  // namespace effops::sampling
