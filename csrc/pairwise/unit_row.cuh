// Rows on the unit sphere. No torch, no launches.
#pragma once

#include "../common/warp.h"
#include "pairwise_math.h"

namespace effops::pairwise {

// The sum over the lanes of a warp, in an order that does not depend on anything.
template <typename A>
EFFOPS_DEVICE A warp_sum(A value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// The norm of a row, by one warp. Squares of float32 do not overflow in double.
template <typename T>
EFFOPS_DEVICE double row_norm(const T* row, int32_t channels, int lane) {
  double sum = 0;
  for (int32_t d = lane; d < channels; d += kWarpSize) {
    const double value = row[d];
    sum += value * value;
  }
  return sqrt(warp_sum(sum));
}

// What a row of this norm is multiplied by. NaN stays.
EFFOPS_DEVICE double unit_scale(double norm) { return 1 / (norm < kSmallestNorm ? kSmallestNorm : norm); }

}  // namespace effops::pairwise
