// Interface between binnorm_cpu.cpp (torch) and its kernels (one copy per instruction set).
#pragma once

#include "../common/cpu_capability.h"
#include "../common/dtype.h"

namespace effops::binary {

// Function pointers, indexed by FloatType. All arrays are [rows, length].
struct BinnormKernels {
  void (*forward[kNumFloatTypes])(const void* x, int64_t rows, int64_t length, int64_t k, void* y);
  void (*backward[kNumFloatTypes])(const void* grad_output, const void* y, int64_t rows, int64_t length,
                                   void* grad_x);
};

EFFOPS_DECLARE_KERNEL_TABLE(BinnormKernels, binnorm_kernels)

}  // namespace effops::binary
