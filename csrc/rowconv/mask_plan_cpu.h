// Plans of the kept positions of a mask on the CPU, for the ops that compute at them.
#pragma once

#include "mask_plan.h"

namespace effops::rowconv {

struct MaskPlan {
  Tensor positions;  // [K] int64: n * Ho * Wo + y * Wo + x of the positions where mask != 0, ascending
  Tensor rows;       // [N, Ho, Wo] int64: the row in `positions`, or -1
};

MaskPlan make_mask_plan(const Tensor& mask);  // [N, Ho, Wo]

// A plan from outside, contiguous. Raises unless `rows` says of each position which row it is.
MaskPlan checked_mask_plan(const char* op, const Tensor& positions,  // [K]
                           const Tensor& rows);                      // [N, Ho, Wo]

// The row of the kept position of the same image that is nearest to each position, -1 if the image has none.
// Distances are Euclidean and exact, ties go to the lowest position. rows: as in a plan.
Tensor nearest_rows(const Tensor& rows);  // [N, Ho, Wo]

}  // namespace effops::rowconv
