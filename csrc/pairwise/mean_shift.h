// Checks of mean_shift that the CPU and the CUDA library share.
#pragma once

#include "points_check.h"

namespace effops::pairwise {

struct MeanShiftShape {
  int64_t batch, points;  // B, N
  int64_t rows;           // M: the seeds, or N if all points move
  int64_t channels;       // D
  int64_t iterations;     // T
  bool seeds;             // whether there are any
  double kappa;           // the number; a kappa_tensor replaces it
  double eta;
  double tol;  // negative: none
  bool return_all, save;
  int64_t precision;  // a Precision
};

// What both directions have. A kappa_tensor may be on the CPU beside points on a GPU; its value is not
// looked at here.
inline MeanShiftShape check_mean_shift_inputs(const char* op,
                                              const Tensor& x,                            // [B, N, D]
                                              const std::optional<Tensor>& weights,       // [B, N]
                                              const std::optional<Tensor>& seeds,         // [B, M, D]
                                              const std::optional<Tensor>& kappa_tensor,  // [] or [1]
                                              double kappa, double eta, int64_t precision) {
  ShapeChecker sizes(op);
  sizes.match("x", x, "BND");
  check_points(op, "x", x);
  const ScalarType dtype = x.scalar_type();
  if (weights.has_value()) {
    sizes.match("weights", *weights, "BN");
    check_beside_x(op, "weights", *weights, dtype, x);
  }
  if (seeds.has_value()) {
    sizes.match("seeds", *seeds, "BMD");
    check_beside_x(op, "seeds", *seeds, dtype, x);
  }
  if (kappa_tensor.has_value()) {
    if (kappa_tensor->dim() > 1 || kappa_tensor->numel() != 1) {
      fail(op, ": expected kappa of shape [] or [1], got ", shape_text(*kappa_tensor));
    }
    check_dtype(op, "kappa", *kappa_tensor, dtype);
    if (!kappa_tensor->is_cpu()) check_same_device(op, "kappa", *kappa_tensor, "x", x);
  }
  if (!(kappa >= 0 && std::isfinite(kappa))) {
    fail(op, ": expected kappa >= 0 and finite, got ", kappa);
  }
  if (!(eta >= 0 && eta <= 1)) fail(op, ": expected eta in [0, 1], got ", eta);
  check_option(op, "precision", "0 (high) or 1 (medium)", precision, 2);
  MeanShiftShape shape{};
  shape.batch = sizes['B'];
  shape.points = sizes['N'];
  shape.rows = seeds.has_value() ? sizes['M'] : sizes['N'];
  shape.channels = sizes['D'];
  shape.seeds = seeds.has_value();
  shape.kappa = kappa;
  shape.eta = eta;
  shape.tol = -1;
  shape.precision = precision;
  return shape;
}

inline void check_iterations(const char* op, int64_t iterations) {
  if (iterations < 0) fail(op, ": expected iterations >= 0, got ", iterations);
}

// Checks everything that does not need the tensors' values.
inline MeanShiftShape check_mean_shift(const Tensor& x,                            // [B, N, D]
                                       const std::optional<Tensor>& weights,       // [B, N]
                                       const std::optional<Tensor>& seeds,         // [B, M, D]
                                       const std::optional<Tensor>& kappa_tensor,  // [] or [1]
                                       double kappa, double eta, int64_t iterations, double tol,
                                       int64_t precision, bool return_all, bool save) {
  constexpr const char* op = "mean_shift";
  MeanShiftShape shape = check_mean_shift_inputs(op, x, weights, seeds, kappa_tensor, kappa, eta, precision);
  check_iterations(op, iterations);
  if (!(tol < 0 || std::isfinite(tol))) {
    fail(op, ": expected tol >= 0 and finite, or negative for none, got ", tol);
  }
  shape.iterations = iterations;
  shape.tol = tol;
  shape.return_all = return_all;
  shape.save = save;
  return shape;
}

// `iterates` tells how many iterations there were. What the forward op saved may have any strides. The
// gradient of kappa_tensor has its shape and is on the device of x.
inline MeanShiftShape check_mean_shift_grad(const Tensor& grad_output,  // [B, M, D] or [T + 1, B, M, D]
                                            const Tensor& x,            // [B, N, D]
                                            const std::optional<Tensor>& weights,       // [B, N]
                                            const std::optional<Tensor>& seeds,         // [B, M, D]
                                            const std::optional<Tensor>& kappa_tensor,  // [] or [1]
                                            const Tensor& iterates,                     // [T + 1, B, M, D]
                                            const Tensor& sums,                         // [T, 2, B, M]
                                            const Tensor& steps,                        // [B]
                                            double kappa, double eta, int64_t precision, bool return_all,
                                            bool /*need_x*/, bool need_weights, bool need_seeds,
                                            bool need_kappa) {
  constexpr const char* op = "mean_shift_backward";
  MeanShiftShape shape = check_mean_shift_inputs(op, x, weights, seeds, kappa_tensor, kappa, eta, precision);
  const ScalarType dtype = x.scalar_type();
  const int64_t batch = shape.batch, rows = shape.rows, channels = shape.channels;
  const bool saved = iterates.dim() == 4 && iterates.size(0) >= 1;
  shape.iterations = saved ? iterates.size(0) - 1 : 0;
  shape.return_all = return_all;
  shape.save = true;
  check_sized(op, "iterates", iterates, {shape.iterations + 1, batch, rows, channels}, dtype, x);
  check_sized(op, "sums", sums, {shape.iterations, 2, batch, rows}, dtype, x);
  check_sized(op, "steps", steps, {batch}, ScalarType::Long, x);
  std::vector<int64_t> output_sizes{batch, rows, channels};
  if (return_all) output_sizes.insert(output_sizes.begin(), shape.iterations + 1);
  check_sized(op, "grad_output", grad_output, output_sizes, dtype, x);
  if (need_weights && !weights.has_value()) fail(op, ": expected weights beside need_weights, got none");
  if (need_seeds && !seeds.has_value()) fail(op, ": expected seeds beside need_seeds, got none");
  if (need_kappa && !kappa_tensor.has_value()) {
    fail(op, ": expected a kappa tensor beside need_kappa, got none");
  }
  return shape;
}

}  // namespace effops::pairwise
