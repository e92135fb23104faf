// Checks of ms_deform_attn that the CPU and the CUDA library share.
#pragma once

#include "../common/check.h"
#include "../common/torch.h"
#include "ms_deform_attn_math.h"

namespace effops::sampling {

// Checks everything that does not need the tensors' values.
inline MsDeformAttnShape check_ms_deform_attn(const Tensor& value,               // [B, S, M, D]
                                              const Tensor& spatial_shapes,      // [L, 2]
                                              const std::optional<Tensor>& level_start_index,  // [L]
                                              const Tensor& sampling_locations,  // [B, Q, M, L, P, 2]
                                              const Tensor& attention_weights) { // [B, Q, M, L, P]
  constexpr const char* op = "ms_deform_attn";
  ShapeChecker sizes(op);
  sizes.match("value", value, "BSMD");
  sizes.match("spatial_shapes", spatial_shapes, "L2");
  if (level_start_index) sizes.match("level_start_index", *level_start_index, "L");
  sizes.match("sampling_locations", sampling_locations, "BQMLP2");
  sizes.match("attention_weights", attention_weights, "BQMLP");
  check_floating(op, "value", value);
  check_dtype(op, "spatial_shapes", spatial_shapes, ScalarType::Long);
  if (level_start_index) check_dtype(op, "level_start_index", *level_start_index, ScalarType::Long);
  check_dtype_or_float(op, "sampling_locations", sampling_locations, value.scalar_type());
  check_dtype_or_float(op, "attention_weights", attention_weights, value.scalar_type());
  check_same_device(op, "sampling_locations", sampling_locations, "value", value);
  check_same_device(op, "attention_weights", attention_weights, "value", value);
  // Level metadata may stay on the CPU beside CUDA values.
  if (!spatial_shapes.is_cpu()) check_same_device(op, "spatial_shapes", spatial_shapes, "value", value);
  if (level_start_index && !level_start_index->is_cpu()) {
    check_same_device(op, "level_start_index", *level_start_index, "value", value);
  }
  return {sizes['B'], sizes['S'], sizes['M'], sizes['D'], sizes['Q'], sizes['L'], sizes['P']};
}

inline void check_ms_deform_attn_grad(const Tensor& grad_output,  // [B, Q, M * D]
                                      const Tensor& value, const MsDeformAttnShape& s) {
  constexpr const char* op = "ms_deform_attn_backward";
  if (grad_output.dim() != 3 || grad_output.size(0) != s.batch || grad_output.size(1) != s.queries ||
      grad_output.size(2) != s.heads * s.channels) {
    fail(op, ": expected grad_output of shape [", s.batch, ", ", s.queries, ", ", s.heads * s.channels,
         "], got ", shape_text(grad_output));
  }
  check_dtype(op, "grad_output", grad_output, value.scalar_type());
  check_same_device(op, "grad_output", grad_output, "value", value);
}

// Reads level metadata that lie on the CPU, and checks that every level stays within the S rows of value.
inline std::vector<Level> read_levels(const Tensor& spatial_shapes,
                                      const std::optional<Tensor>& level_start_index, int64_t rows) {
  const Tensor shapes = as_contiguous(spatial_shapes);
  const int64_t* sizes = shapes.const_data_ptr<int64_t>();
  const std::optional<Tensor> starts =
      level_start_index ? std::optional<Tensor>(as_contiguous(*level_start_index)) : std::nullopt;
  std::vector<Level> levels(shapes.size(0));
  int64_t next = 0;
  for (size_t l = 0; l < levels.size(); ++l) {
    const int64_t height = sizes[2 * l], width = sizes[2 * l + 1];
    const int64_t start = starts ? starts->const_data_ptr<int64_t>()[l] : next;
    if (!is_valid_level(start, height, width, rows)) {
      fail("ms_deform_attn: expected spatial_shapes and level_start_index to name levels within the S=", rows,
           " rows of value (0 < H, W < 2^24, start >= 0, start + H * W <= S), got level ", l,
           " with H=", height, ", W=", width, ", start=", start);
    }
    levels[l] = {start, static_cast<int32_t>(height), static_cast<int32_t>(width)};
    next = start + height * width;
  }
  return levels;
}

}  // namespace effops::sampling
