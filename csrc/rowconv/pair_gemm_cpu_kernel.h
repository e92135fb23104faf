// Products of bfloat16 rows by the AVX512-BF16 instructions, which multiply and add pairs of elements: twice
// the rate of float32. For processors that have them.
#pragma once

#include <cstdint>

#include "row_gemm_cpu_kernel.h"

namespace effops::rowconv {

// As RowGemmKernels::multiply, with bfloat16 rows and float32 sums. weights: in panels as there, but of
// pairs, [ceil(depth / 2)][panel][2], with a zero where the depth is odd. Subnormal numbers count as zeros.
using MultiplyPairs = void (*)(const RowPair* pairs, int64_t count, int64_t row_offset, int64_t sum_offset,
                               int64_t depth, const void* weights, int64_t columns);

// Null where the processor or this build has no such instructions, or EFFOPS_CPU_CAPABILITY forbids them.
MultiplyPairs multiply_pairs();

}  // namespace effops::rowconv
