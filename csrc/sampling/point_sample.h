// Checks of point_sample that the CPU and the CUDA library share.
#pragma once

#include "pyramid.h"

namespace effops::sampling {

struct PointSampleShape {
  PyramidShape pyramid;
  int64_t points;  // N
};

// Checks everything that does not need the tensors' values.
inline PointSampleShape check_point_sample(const std::vector<Tensor>& pyramid,  // L x [B, C, H_l, W_l]
                                           const Tensor& batch,                 // [N]
                                           const Tensor& level,                 // [N]
                                           const Tensor& xy) {                  // [N, 2]
  constexpr const char* op = "point_sample";
  const PyramidShape shape = check_pyramid(op, pyramid);
  ShapeChecker sizes(op);
  sizes.match("batch", batch, "N");
  sizes.match("level", level, "N");
  sizes.match("xy", xy, "N2");
  check_dtype(op, "batch", batch, ScalarType::Long);
  check_dtype(op, "level", level, ScalarType::Long);
  check_dtype_or_float(op, "xy", xy, pyramid[0].scalar_type());
  check_same_device(op, "batch", batch, "pyramid[0]", pyramid[0]);
  check_same_device(op, "level", level, "pyramid[0]", pyramid[0]);
  check_same_device(op, "xy", xy, "pyramid[0]", pyramid[0]);
  return {shape, sizes['N']};
}

inline void check_point_sample_grad(const Tensor& grad_output,  // [N, C]
                                    const Tensor& map, const PointSampleShape& shape) {
  constexpr const char* op = "point_sample_backward";
  if (grad_output.dim() != 2 || grad_output.size(0) != shape.points ||
      grad_output.size(1) != shape.pyramid.channels) {
    fail(op, ": expected grad_output of shape [N=", shape.points, ", C=", shape.pyramid.channels, "], got ",
         shape_text(grad_output));
  }
  check_dtype(op, "grad_output", grad_output, map.scalar_type());
  check_same_device(op, "grad_output", grad_output, "pyramid[0]", map);
}

}  // namespace effops::sampling
