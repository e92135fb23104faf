// Checks of sps_refine that the CPU and the CUDA library share.
#pragma once

#include <algorithm>
#include <limits>

#include "sps.h"

namespace effops::rowconv {

struct SpsRefineShape {
  SpsShape sps;
  int64_t kept;         // rows that stay active
  int64_t children;     // rows that each of them becomes: 4, or 1 without upsampling
  int64_t new_active;   // NA' = children * kept
  int64_t new_passive;  // NP' = NP + NA - kept
  bool wide_new_map;    // the new index_map is int64
};

// Checks everything that does not need the tensors' values.
inline SpsRefineShape check_sps_refine(const Tensor& active,     // [NA, F]
                                       const Tensor& passive,    // [NP, F]
                                       const Tensor& index_map,  // [R, H, W]
                                       const Tensor& roi,        // [NA]
                                       const Tensor& xy,         // [NA, 2]
                                       const Tensor& scores,     // [NA]
                                       int64_t num_refine, bool upsample) {
  constexpr const char* op = "sps_refine";
  const SpsShape sps = check_sps(op, active, passive, index_map, roi, xy);
  if (scores.dim() != 1 || scores.size(0) != sps.active) {
    fail(op, ": expected scores of shape [A=", sps.active, "], got ", shape_text(scores));
  }
  check_floating(op, "scores", scores);
  check_same_device(op, "scores", scores, "active", active);
  if (num_refine < 0) fail(op, ": expected num_refine >= 0, got ", num_refine);
  if (upsample) check_sides(op, "index_map", sps.height, sps.width, kSideEnd / 2);
  const int64_t kept = std::min(num_refine, sps.active), children = upsample ? 4 : 1;
  const int64_t new_active = children * kept, new_passive = sps.passive + sps.active - kept;
  const bool many_rows = new_active + new_passive > std::numeric_limits<int32_t>::max();
  return {sps, kept, children, new_active, new_passive, sps.wide_map || many_rows};
}

struct SpsRefineGradShape {
  int64_t active, passive;          // NA, NP
  int64_t features;                 // F
  int64_t kept, children;           // as in SpsRefineShape
  int64_t new_active, new_passive;  // NA', NP'
};

inline SpsRefineGradShape check_sps_refine_grad(const Tensor& grad_active,   // [NA', F]
                                                const Tensor& grad_passive,  // [NP', F]
                                                const Tensor& new_ids,       // [NA]
                                                int64_t num_passive, bool upsample) {
  constexpr const char* op = "sps_refine_backward";
  ShapeChecker sizes(op);
  sizes.match("grad_active", grad_active, "AF");
  sizes.match("grad_passive", grad_passive, "PF");
  sizes.match("new_ids", new_ids, "N");
  check_floating(op, "grad_active", grad_active);
  check_dtype(op, "grad_passive", grad_passive, grad_active.scalar_type());
  check_dtype(op, "new_ids", new_ids, ScalarType::Long);
  check_same_device(op, "grad_passive", grad_passive, "grad_active", grad_active);
  check_same_device(op, "new_ids", new_ids, "grad_active", grad_active);
  const int64_t active = sizes['N'], new_active = sizes['A'], new_passive = sizes['P'];
  if (num_passive < 0 || num_passive > new_passive) {
    fail(op, ": expected num_passive from 0 to ", new_passive, ", got ", num_passive);
  }
  const int64_t children = upsample ? 4 : 1, kept = num_passive + active - new_passive;
  if (kept < 0 || new_active != children * kept) {
    fail(op, ": expected grad_active of ", children, " rows per kept row of new_ids, got ", new_active,
         " and ", active, " - ", new_passive - num_passive);
  }
  return {active, num_passive, sizes['F'], kept, children, new_active, new_passive};
}

}  // namespace effops::rowconv
