// Checks of pairwise_embedding_loss that the CPU and the CUDA library share.
#pragma once

#include "points_check.h"

namespace effops::pairwise {

struct LossShape {
  int64_t batch, points, channels;  // B, N, D
  double alpha;
  int64_t normalize;  // a Normalize
};

// What both directions have.
inline LossShape check_loss_inputs(const char* op,
                                   const Tensor& x,         // [B, N, D]
                                   const Tensor& order,     // [B, N]
                                   const Tensor& segments,  // [B, N]
                                   const Tensor& weights,   // [B, N]
                                   double alpha, int64_t normalize) {
  ShapeChecker sizes(op);
  sizes.match("x", x, "BND");
  check_points(op, "x", x);
  sizes.match("order", order, "BN");
  check_beside_x(op, "order", order, ScalarType::Long, x);
  sizes.match("segments", segments, "BN");
  check_beside_x(op, "segments", segments, ScalarType::Long, x);
  sizes.match("weights", weights, "BN");
  check_beside_x(op, "weights", weights, x.scalar_type(), x);
  check_finite(op, "alpha", alpha);
  check_option(op, "normalize", "0 (sum_w), 1 (thesis) or 2 (none)", normalize, 3);
  return {sizes['B'], sizes['N'], sizes['D'], alpha, normalize};
}

// Checks everything that does not need the tensors' values.
inline LossShape check_pairwise_embedding_loss(const Tensor& x,         // [B, N, D]
                                               const Tensor& order,     // [B, N]
                                               const Tensor& segments,  // [B, N]
                                               const Tensor& weights,   // [B, N]
                                               double alpha, int64_t normalize) {
  return check_loss_inputs("pairwise_embedding_loss", x, order, segments, weights, alpha, normalize);
}

inline LossShape check_pairwise_embedding_loss_grad(const Tensor& grad_loss,  // []
                                                    const Tensor& x,          // [B, N, D]
                                                    const Tensor& order,      // [B, N]
                                                    const Tensor& segments,   // [B, N]
                                                    const Tensor& weights,    // [B, N]
                                                    const Tensor& costs,      // [B, N]
                                                    double alpha, int64_t normalize) {
  constexpr const char* op = "pairwise_embedding_loss_backward";
  const LossShape shape = check_loss_inputs(op, x, order, segments, weights, alpha, normalize);
  check_sized(op, "grad_loss", grad_loss, {}, x.scalar_type(), x);
  check_sized(op, "costs", costs, {shape.batch, shape.points}, x.scalar_type(), x);
  return shape;
}

}  // namespace effops::pairwise
