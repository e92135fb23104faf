// Checks of select_conv2d that the CPU and the CUDA library share.
#pragma once

#include <optional>
#include <vector>

#include "perforated_conv2d.h"

namespace effops::rowconv {

struct SelectShape {
  int64_t batch, in_channels, out_channels, height, width;  // N, Ci, Co, H, W
  int64_t branches;                                         // P
  int64_t kernel;                                           // k
};

inline SelectShape check_select(const char* op, const Tensor& x, const Tensor& weights, const Tensor& choice,
                                const std::optional<Tensor>& bias, const std::vector<int64_t>& dilations) {
  ShapeChecker sizes(op);
  sizes.match("x", x, "NCHW");
  sizes.match("weights", weights, "POCKK");
  sizes.match("choice", choice, "NHW");
  if (bias) sizes.match("bias", *bias, "PO");
  check_floating(op, "x", x);
  check_dtype(op, "weights", weights, x.scalar_type());
  check_int32_or_int64(op, "choice", choice);
  if (bias) check_dtype(op, "bias", *bias, x.scalar_type());
  check_same_device(op, "weights", weights, "x", x);
  check_same_device(op, "choice", choice, "x", x);
  if (bias) check_same_device(op, "bias", *bias, "x", x);
  check_sides(op, "x", sizes['H'], sizes['W'], kSideEnd);
  if (sizes['K'] % 2 == 0) fail(op, ": expected weights with an odd kernel size, got ", shape_text(weights));
  if (static_cast<int64_t>(dilations.size()) != sizes['P']) {
    fail(op, ": expected dilations of length ", sizes['P'], ", one per branch, got ", dilations.size());
  }
  for (const int64_t dilation : dilations) {
    if (dilation < 0) fail(op, ": expected dilations >= 0, got ", dilation);
    if (dilation == 0 && sizes['O'] != sizes['C']) {
      fail(op,
           ": expected dilations > 0 (0, the identity, needs as many output as input channels), got 0 with ",
           shape_text(weights));
    }
    check_dilation(op, "dilations", dilation, sizes['K']);
  }
  return {sizes['N'], sizes['C'], sizes['O'], sizes['H'], sizes['W'], sizes['P'], sizes['K']};
}

// Checks everything that does not need the tensors' values.
inline SelectShape check_select_conv2d(const Tensor& x,                    // [N, Ci, H, W]
                                       const Tensor& weights,              // [P, Co, Ci, k, k]
                                       const Tensor& choice,               // [N, H, W]
                                       const std::optional<Tensor>& bias,  // [P, Co]
                                       const std::vector<int64_t>& dilations) {
  return check_select("select_conv2d", x, weights, choice, bias, dilations);
}

inline SelectShape check_select_conv2d_grad(const Tensor& grad_output,  // [N, Co, H, W]
                                            const Tensor& x,            // [N, Ci, H, W]
                                            const Tensor& weights,      // [P, Co, Ci, k, k]
                                            const Tensor& choice,       // [N, H, W]
                                            const std::vector<int64_t>& dilations) {
  constexpr const char* op = "select_conv2d_backward";
  const SelectShape shape = check_select(op, x, weights, choice, std::nullopt, dilations);
  if (grad_output.dim() != 4 || grad_output.size(0) != shape.batch ||
      grad_output.size(1) != shape.out_channels || grad_output.size(2) != shape.height ||
      grad_output.size(3) != shape.width) {
    fail(op, ": expected grad_output of shape [N=", shape.batch, ", O=", shape.out_channels,
         ", H=", shape.height, ", W=", shape.width, "], got ", shape_text(grad_output));
  }
  check_dtype(op, "grad_output", grad_output, x.scalar_type());
  check_same_device(op, "grad_output", grad_output, "x", x);
  return shape;
}

}  // namespace effops::rowconv
