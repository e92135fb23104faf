// Checks of plan_mask, and of the plans that perforated_conv2d takes, shared by the CPU and the CUDA library.
#pragma once

#include <optional>

#include "../common/check.h"
#include "../common/torch.h"

namespace effops::rowconv {

inline void check_mask(const char* op, const Tensor& mask) {  // [N, Ho, Wo]
  if (mask.dim() != 3) fail(op, ": expected mask of shape [N, Ho, Wo], got ", shape_text(mask));
  if (mask.scalar_type() != ScalarType::Bool && !is_floating(mask.scalar_type())) {
    fail(op, ": expected mask of dtype bool, float32, float64, bfloat16 or float16, got ",
         dtype_name(mask.scalar_type()));
  }
}

// The positions' values are checked by the CPU kernel.
inline void check_plan(const char* op, const Tensor& mask,  // [N, Ho, Wo]
                       const std::optional<Tensor>& positions,  // [K]
                       const std::optional<Tensor>& rows) {  // [N, Ho, Wo]
  if (positions.has_value() != rows.has_value()) {
    fail(op, ": expected positions and rows of one plan, got only ", positions ? "positions" : "rows");
  }
  if (!positions) return;
  if (positions->dim() != 1) fail(op, ": expected positions of shape [K], got ", shape_text(*positions));
  if (rows->dim() != 3 || rows->size(0) != mask.size(0) || rows->size(1) != mask.size(1) ||
      rows->size(2) != mask.size(2)) {
    fail(op, ": expected rows of mask's shape ", shape_text(mask), ", got ", shape_text(*rows));
  }
  check_dtype(op, "positions", *positions, ScalarType::Long);
  check_dtype(op, "rows", *rows, ScalarType::Long);
  check_same_device(op, "positions", *positions, "mask", mask);
  check_same_device(op, "rows", *rows, "mask", mask);
}

}  // namespace effops::rowconv
