// Checks of topk_pack that the CPU and the CUDA library share.
#pragma once

#include "pack_bits.h"

namespace effops::binary {

inline void check_topk_pack(const Tensor& x,  // [..., M]
                            int64_t k) {
  constexpr const char* op = "topk_pack";
  check_rows(op, "x", x);
  check_floating(op, "x", x);
  check_ones(op, k, x);
}

}  // namespace effops::binary
