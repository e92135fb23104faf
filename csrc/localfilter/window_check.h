// Checks that the ops on K x K windows share. They keep every sum of window_math.h below overflow.
#pragma once

#include <cmath>

#include "../common/check.h"
#include "window_math.h"

namespace effops::localfilter {

constexpr int64_t kSideEnd = int64_t{1} << 31;

inline ScalarType accumulator_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_sides(const char* op, const char* argument, const Tensor& maps) {  // [N, C, H, W]
  if (maps.size(2) >= kSideEnd || maps.size(3) >= kSideEnd) {
    fail(op, ": expected ", argument, " of fewer than 2^31 rows and columns, got ", shape_text(maps));
  }
}

inline void check_factor(const char* op, const char* argument, int64_t value) {
  if (value < 1 || value >= kSideEnd) {
    fail(op, ": expected ", argument, " from 1 to 2^31 - 1, got ", value);
  }
}

inline void check_dilation(const char* op, int64_t dilation, int64_t kernel) {
  check_factor(op, "dilation", dilation);
  if (kernel > 1 && dilation > (kSideEnd - 1) / (kernel - 1)) {
    fail(op, ": expected dilation times (window - 1) of less than 2^31, got ", dilation, " and ", kernel,
         " - 1");
  }
}

inline void check_kernel(const char* op, int64_t window, int64_t dilation) {
  check_factor(op, "window", window);
  check_dilation(op, dilation, window);
}

// K of maps with K * K channels per group.
inline int64_t kernel_of(const char* op, const char* argument, const Tensor& maps, int64_t groups) {
  const int64_t channels = maps.size(1), taps = channels / groups;
  const int64_t kernel = std::llround(std::sqrt(static_cast<double>(taps)));
  if (kernel < 1 || kernel >= kSideEnd || kernel * kernel != taps || taps * groups != channels) {
    fail(op, ": expected ", argument, " with groups=", groups, " times K * K channels, K >= 1, got ",
         shape_text(maps));
  }
  return kernel;
}

// A gradient or a result that was saved.
inline void check_maps(const char* op, const char* argument, const Tensor& maps, int64_t batch,
                       int64_t channels, int64_t height, int64_t width, ScalarType dtype,
                       const char* other_argument, const Tensor& other) {
  if (maps.dim() != 4 || maps.size(0) != batch || maps.size(1) != channels || maps.size(2) != height ||
      maps.size(3) != width) {
    fail(op, ": expected ", argument, " of shape [", batch, ", ", channels, ", ", height, ", ", width,
         "], got ", shape_text(maps));
  }
  check_dtype(op, argument, maps, dtype);
  check_same_device(op, argument, maps, other_argument, other);
}

}  // namespace effops::localfilter
