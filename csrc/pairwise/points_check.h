// Checks that the ops on all pairs of points share.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../common/check.h"
#include "pairwise_math.h"

namespace effops::pairwise {

// The first tensor of an op: [B, N, D], matched already.
inline void check_points(const char* op, const char* argument, const Tensor& points) {
  if (points.scalar_type() != ScalarType::Float && points.scalar_type() != ScalarType::Double) {
    fail(op, ": expected ", argument, " of dtype float32 or float64, got ", dtype_name(points.scalar_type()));
  }
  if (points.size(2) < 1 || points.size(2) > kMaxChannels) {
    fail(op, ": expected ", argument, " of 1 to ", kMaxChannels, " channels, got shape ", shape_text(points));
  }
}

// A tensor beside x whose shape has been matched.
inline void check_beside_x(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                           const Tensor& x) {
  check_dtype(op, argument, tensor, dtype);
  check_same_device(op, argument, tensor, "x", x);
}

// A gradient, or a tensor that the forward op has saved.
inline void check_sized(const char* op, const char* argument, const Tensor& tensor,
                        const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& x) {
  const int64_t rank = static_cast<int64_t>(sizes.size());
  bool same = tensor.dim() == rank;
  std::string expected;
  for (int64_t i = 0; i < rank; ++i) {
    same = same && tensor.size(i) == sizes[static_cast<size_t>(i)];
    expected += (i ? ", " : "") + std::to_string(sizes[static_cast<size_t>(i)]);
  }
  if (!same) fail(op, ": expected ", argument, " of shape [", expected, "], got ", shape_text(tensor));
  check_beside_x(op, argument, tensor, dtype, x);
}

inline void check_option(const char* op, const char* argument, const char* names, int64_t value,
                         int64_t count) {
  if (value < 0 || value >= count) fail(op, ": expected ", argument, " ", names, ", got ", value);
}

inline void check_finite(const char* op, const char* argument, double value) {
  if (!std::isfinite(value)) fail(op, ": expected ", argument, " to be finite, got ", value);
}

}  // namespace effops::pairwise
