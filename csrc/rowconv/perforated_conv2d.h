// Checks of perforated_conv2d that the CPU and the CUDA library share.
#pragma once

#include <optional>
#include <vector>

#include "../common/maps.h"
#include "geometry_math.h"
#include "mask_plan.h"
#include "sps_conv2d.h"

namespace effops::rowconv {

enum Fill : int { kFillZero = 0, kFillKeep = 1, kFillNearest = 2 };

struct PerforatedShape {
  int64_t batch, in_channels, out_channels, groups;  // N, Ci, Co
  Geometry geometry;
  int fill;         // a Fill
  bool float_mask;  // the mask multiplies the output
};

// The stride, padding and dilation lists hold (vertical, horizontal).
inline Geometry check_geometry(const char* op, const Tensor& x,  // [N, Ci, H, W]
                               const Tensor& weight,             // [Co, Ci / groups, kh, kw]
                               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& dilation) {
  const auto check_pair = [op](const char* argument, const std::vector<int64_t>& pair, int64_t least) {
    if (pair.size() != 2) fail(op, ": expected ", argument, " of 2 numbers, got ", pair.size());
    for (const int64_t value : pair) {
      if (value < least || value >= kSideEnd) {
        fail(op, ": expected ", argument, " from ", least, " to 2^31 - 1, got ", value);
      }
    }
  };
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  check_sides(op, "x", x.size(2), x.size(3), kSideEnd);
  int64_t out[2];
  for (const int axis : {0, 1}) {
    const int64_t kernel = weight.size(2 + axis);
    if (kernel < 1) fail(op, ": expected weight with a kernel of at least 1 x 1, got ", shape_text(weight));
    check_dilation(op, "dilation", dilation[axis], kernel);
    const int64_t covered = (kernel - 1) * dilation[axis] + 1, needed = covered - 2 * padding[axis];
    if (x.size(2 + axis) < needed) {
      fail(op, ": expected x of at least ", needed, axis == 0 ? " rows" : " columns",
           " under this kernel, padding and dilation, got ", shape_text(x));
    }
    out[axis] = (x.size(2 + axis) - needed) / stride[axis] + 1;
    if (out[axis] >= kSideEnd)
      fail(op, ": expected padding for an output of fewer than 2^31 rows and columns, got ", padding[axis]);
  }
  return {x.size(2), x.size(3), out[0],     out[1],     weight.size(2), weight.size(3),
          stride[0], stride[1], padding[0], padding[1], dilation[0],    dilation[1]};
}

// All arguments that both directions have.
inline PerforatedShape check_perforated(const char* op, const Tensor& x, const Tensor& weight,
                                        const Tensor& mask, const std::optional<Tensor>& bias,
                                        const std::vector<int64_t>& stride,
                                        const std::vector<int64_t>& padding,
                                        const std::vector<int64_t>& dilation, int64_t groups, int64_t fill,
                                        const std::optional<Tensor>& positions,
                                        const std::optional<Tensor>& rows) {
  if (x.dim() != 4) fail(op, ": expected x of shape [N, C, H, W], got ", shape_text(x));
  if (weight.dim() != 4)
    fail(op, ": expected weight of shape [O, C / groups, kh, kw], got ", shape_text(weight));
  const int64_t batch = x.size(0), channels = x.size(1), outputs = weight.size(0);
  check_floating(op, "x", x);
  check_dtype(op, "weight", weight, x.scalar_type());
  check_same_device(op, "weight", weight, "x", x);
  check_groups(op, groups, channels, outputs);
  if (weight.size(1) != channels / groups) {
    fail(op, ": expected weight of shape [O, C / groups=", channels / groups, ", kh, kw], got ",
         shape_text(weight));
  }
  const Geometry geometry = check_geometry(op, x, weight, stride, padding, dilation);
  check_mask(op, mask);
  if (mask.size(0) != batch || mask.size(1) != geometry.out_height || mask.size(2) != geometry.out_width) {
    fail(op, ": expected mask of shape [N=", batch, ", Ho=", geometry.out_height, ", Wo=", geometry.out_width,
         "], got ", shape_text(mask));
  }
  const bool float_mask = mask.scalar_type() != ScalarType::Bool;
  if (float_mask && mask.scalar_type() != ScalarType::Float && mask.scalar_type() != x.scalar_type()) {
    fail(op, ": expected mask of dtype bool, float32 or ", dtype_name(x.scalar_type()), ", got ",
         dtype_name(mask.scalar_type()));
  }
  check_same_device(op, "mask", mask, "x", x);
  if (bias) {
    if (bias->dim() != 1 || bias->size(0) != outputs) {
      fail(op, ": expected bias of shape [O=", outputs, "], got ", shape_text(*bias));
    }
    check_dtype(op, "bias", *bias, x.scalar_type());
    check_same_device(op, "bias", *bias, "x", x);
  }
  if (fill < kFillZero || fill > kFillNearest) {
    fail(op, ": expected fill 0 (zero), 1 (keep) or 2 (nearest), got ", fill);
  }
  check_plan(op, mask, positions, rows);
  return {batch, channels, outputs, groups, geometry, static_cast<int>(fill), float_mask};
}

inline void check_result(const char* op, const char* argument, const Tensor& tensor,  // [N, Co, Ho, Wo]
                         const Tensor& x, const PerforatedShape& shape) {
  const Geometry& g = shape.geometry;
  if (tensor.dim() != 4 || tensor.size(0) != shape.batch || tensor.size(1) != shape.out_channels ||
      tensor.size(2) != g.out_height || tensor.size(3) != g.out_width) {
    fail(op, ": expected ", argument, " of shape [N=", shape.batch, ", O=", shape.out_channels,
         ", Ho=", g.out_height, ", Wo=", g.out_width, "], got ", shape_text(tensor));
  }
  check_dtype(op, argument, tensor, x.scalar_type());
  check_same_device(op, argument, tensor, "x", x);
}

// Checks everything that does not need the tensors' values.
inline PerforatedShape check_perforated_conv2d(const Tensor& x,                    // [N, Ci, H, W]
                                               const Tensor& weight,  // [Co, Ci / groups, kh, kw]
                                               const Tensor& mask,  // [N, Ho, Wo]
                                               const std::optional<Tensor>& bias,  // [Co]
                                               const std::optional<Tensor>& base,  // [N, Co, Ho, Wo]
                                               const std::vector<int64_t>& stride,
                                               const std::vector<int64_t>& padding,
                                               const std::vector<int64_t>& dilation, int64_t groups,
                                               int64_t fill,
                                               const std::optional<Tensor>& positions,  // [K]
                                               const std::optional<Tensor>& rows) {  // [N, Ho, Wo]
  constexpr const char* op = "perforated_conv2d";
  const PerforatedShape shape =
      check_perforated(op, x, weight, mask, bias, stride, padding, dilation, groups, fill, positions, rows);
  if (base.has_value() != (fill == kFillKeep)) {
    fail(op, ": expected base exactly with fill 1 (keep), got ", base ? "one" : "none", " with fill ", fill);
  }
  if (base) check_result(op, "base", *base, x, shape);
  return shape;
}

inline PerforatedShape check_perforated_conv2d_grad(const Tensor& grad_output,  // [N, Co, Ho, Wo]
                                                    const Tensor& x,  // [N, Ci, H, W]
                                                    const Tensor& weight,  // [Co, Ci / groups, kh, kw]
                                                    const Tensor& mask,  // [N, Ho, Wo]
                                                    const std::optional<Tensor>& bias,  // [Co]
                                                    const std::vector<int64_t>& stride,
                                                    const std::vector<int64_t>& padding,
                                                    const std::vector<int64_t>& dilation, int64_t groups,
                                                    int64_t fill,
                                                    const std::optional<Tensor>& positions,  // [K]
                                                    const std::optional<Tensor>& rows) {  // [N, Ho, Wo]
  constexpr const char* op = "perforated_conv2d_backward";
  const PerforatedShape shape =
      check_perforated(op, x, weight, mask, bias, stride, padding, dilation, groups, fill, positions, rows);
  check_result(op, "grad_output", grad_output, x, shape);
  return shape;
}

}  // namespace effops::rowconv
