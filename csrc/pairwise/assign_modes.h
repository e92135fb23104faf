// Checks of assign_modes that the CPU and the CUDA library share.
#pragma once

#include "points_check.h"

namespace effops::pairwise {

struct ModesShape {
  int64_t batch, points, channels;  // B, N, D
};

inline void check_labelling(const char* op, double threshold, int64_t min_size) {
  check_finite(op, "threshold", threshold);
  if (min_size < 1) fail(op, ": expected min_size >= 1, got ", min_size);
}

// Checks everything that does not need the tensors' values.
inline ModesShape check_assign_modes(const Tensor& modes,  // [B, N, D]
                                     double threshold, int64_t min_size) {
  constexpr const char* op = "assign_modes";
  ShapeChecker sizes(op);
  sizes.match("modes", modes, "BND");
  check_points(op, "modes", modes);
  check_labelling(op, threshold, min_size);
  return {sizes['B'], sizes['N'], sizes['D']};
}

}  // namespace effops::pairwise
