// Checks of neighborhood_dot and neighborhood_mix that the CPU and the CUDA library share.
#pragma once

#include "window_check.h"

namespace effops::localfilter {

struct NeighborhoodShape {
  int64_t batch, channels;  // N, C
  Window window;
};

inline NeighborhoodShape check_dot(const char* op,
                                   const Tensor& q,  // [N, C, H, W]
                                   const Tensor& k,  // [N, C, H, W]
                                   int64_t window, int64_t dilation) {
  ShapeChecker sizes(op);
  sizes.match("q", q, "NCHW");
  sizes.match("k", k, "NCHW");
  check_floating(op, "q", q);
  check_dtype(op, "k", k, q.scalar_type());
  check_same_device(op, "k", k, "q", q);
  check_sides(op, "q", q);
  check_kernel(op, window, dilation);
  return {sizes['N'], sizes['C'], same_window(sizes['H'], sizes['W'], window, dilation, kZeros)};
}

// Checks everything that does not need the tensors' values.
inline NeighborhoodShape check_neighborhood_dot(const Tensor& q,  // [N, C, H, W]
                                                const Tensor& k,  // [N, C, H, W]
                                                int64_t window, int64_t dilation) {
  return check_dot("neighborhood_dot", q, k, window, dilation);
}

inline NeighborhoodShape check_neighborhood_dot_grad(const Tensor& grad_output,  // [N, K * K, H, W]
                                                     const Tensor& q,            // [N, C, H, W]
                                                     const Tensor& k,            // [N, C, H, W]
                                                     int64_t window, int64_t dilation) {
  constexpr const char* op = "neighborhood_dot_backward";
  const NeighborhoodShape shape = check_dot(op, q, k, window, dilation);
  const Window& w = shape.window;
  check_maps(op, "grad_output", grad_output, shape.batch, w.taps(), w.height, w.width, q.scalar_type(), "q",
             q);
  return shape;
}

inline NeighborhoodShape check_mix(const char* op,
                                   const Tensor& weights,  // [N, K * K, H, W]
                                   const Tensor& v,        // [N, C, H, W]
                                   int64_t dilation) {
  ShapeChecker sizes(op);
  sizes.match("weights", weights, "NKHW");
  sizes.match("v", v, "NCHW");
  check_floating(op, "weights", weights);
  check_dtype(op, "v", v, weights.scalar_type());
  check_same_device(op, "v", v, "weights", weights);
  check_sides(op, "v", v);
  const int64_t kernel = kernel_of(op, "weights", weights, 1);
  check_dilation(op, dilation, kernel);
  return {sizes['N'], sizes['C'], same_window(sizes['H'], sizes['W'], kernel, dilation, kZeros)};
}

// Checks everything that does not need the tensors' values.
inline NeighborhoodShape check_neighborhood_mix(const Tensor& weights,  // [N, K * K, H, W]
                                                const Tensor& v,        // [N, C, H, W]
                                                int64_t dilation) {
  return check_mix("neighborhood_mix", weights, v, dilation);
}

inline NeighborhoodShape check_neighborhood_mix_grad(const Tensor& grad_output,  // [N, C, H, W]
                                                     const Tensor& weights,      // [N, K * K, H, W]
                                                     const Tensor& v,            // [N, C, H, W]
                                                     int64_t dilation) {
  constexpr const char* op = "neighborhood_mix_backward";
  const NeighborhoodShape shape = check_mix(op, weights, v, dilation);
  const Window& w = shape.window;
  check_maps(op, "grad_output", grad_output, shape.batch, shape.channels, w.height, w.width, v.scalar_type(),
             "v", v);
  return shape;
}

}  // namespace effops::localfilter
