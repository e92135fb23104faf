// Checks of binnorm that the CPU and the CUDA library share.
#pragma once

#include "pack_bits.h"

namespace effops::binary {

inline void check_binnorm(const Tensor& x,  // [..., M]
                          int64_t k) {
  constexpr const char* op = "binnorm";
  check_rows(op, "x", x);
  check_floating(op, "x", x);
  check_ones(op, k, x);
}

inline void check_binnorm_grad(const Tensor& grad_output,  // [..., M]
                               const Tensor& output) {     // [..., M]
  constexpr const char* op = "binnorm_backward";
  check_rows(op, "output", output);
  check_floating(op, "output", output);
  bool same = grad_output.dim() == output.dim();
  for (int64_t i = 0; same && i < output.dim(); ++i) same = grad_output.size(i) == output.size(i);
  if (!same) {
    fail(op, ": expected grad_output of shape ", shape_text(output), ", got ", shape_text(grad_output));
  }
  check_dtype(op, "grad_output", grad_output, output.scalar_type());
  check_same_device(op, "grad_output", grad_output, "output", output);
}

}  // namespace effops::binary
