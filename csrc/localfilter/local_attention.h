// Checks of local_attention that the CPU and the CUDA library share.
#pragma once

#include "window_check.h"

namespace effops::localfilter {

struct AttentionShape {
  int64_t batch, key_channels, value_channels;  // N, C, Cv
  Window window;                                // its padding: kRenormalize ("mask") or kZeros ("zero")
  double scale;
};

// All arguments that both directions have.
inline AttentionShape check_attention(const char* op,
                                      const Tensor& q,  // [N, C, H, W]
                                      const Tensor& k,  // [N, C, H, W]
                                      const Tensor& v,  // [N, Cv, H, W]
                                      int64_t window, int64_t dilation, double scale, int64_t border) {
  ShapeChecker sizes(op);
  sizes.match("q", q, "NCHW");
  sizes.match("k", k, "NCHW");
  sizes.match("v", v, "NVHW");
  check_floating(op, "q", q);
  check_dtype(op, "k", k, q.scalar_type());
  check_dtype(op, "v", v, q.scalar_type());
  check_same_device(op, "k", k, "q", q);
  check_same_device(op, "v", v, "q", q);
  check_sides(op, "q", q);
  check_kernel(op, window, dilation);
  if (border != kZeros && border != kRenormalize) {
    fail(op, ": expected border 0 (zero) or 3 (mask), got ", border);
  }
  const Window same = same_window(sizes['H'], sizes['W'], window, dilation, static_cast<int>(border));
  return {sizes['N'], sizes['C'], sizes['V'], same, scale};
}

// Checks everything that does not need the tensors' values.
inline AttentionShape check_local_attention(const Tensor& q,  // [N, C, H, W]
                                            const Tensor& k,  // [N, C, H, W]
                                            const Tensor& v,  // [N, Cv, H, W]
                                            int64_t window, int64_t dilation, double scale, int64_t border) {
  return check_attention("local_attention", q, k, v, window, dilation, scale, border);
}

// What the forward op saved may have any strides.
inline AttentionShape check_local_attention_grad(const Tensor& grad_output,  // [N, Cv, H, W]
                                                 const Tensor& q,            // [N, C, H, W]
                                                 const Tensor& k,            // [N, C, H, W]
                                                 const Tensor& v,            // [N, Cv, H, W]
                                                 const Tensor& output,       // [N, Cv, H, W]
                                                 const Tensor& log_sum_exp,  // [N, H, W]
                                                 int64_t window, int64_t dilation, double scale,
                                                 int64_t border) {
  constexpr const char* op = "local_attention_backward";
  const AttentionShape shape = check_attention(op, q, k, v, window, dilation, scale, border);
  const int64_t height = shape.window.height, width = shape.window.width;
  check_maps(op, "grad_output", grad_output, shape.batch, shape.value_channels, height, width,
             q.scalar_type(), "q", q);
  check_maps(op, "output", output, shape.batch, shape.value_channels, height, width, q.scalar_type(), "q", q);
  if (log_sum_exp.dim() != 3 || log_sum_exp.size(0) != shape.batch || log_sum_exp.size(1) != height ||
      log_sum_exp.size(2) != width) {
    fail(op, ": expected log_sum_exp of shape [N=", shape.batch, ", H=", height, ", W=", width, "], got ",
         shape_text(log_sum_exp));
  }
  check_dtype(op, "log_sum_exp", log_sum_exp, accumulator_dtype(q));
  check_same_device(op, "log_sum_exp", log_sum_exp, "q", q);
  return shape;
}

}  // namespace effops::localfilter
