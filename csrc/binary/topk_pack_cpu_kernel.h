// Interface between topk_pack_cpu.cpp (torch) and its kernels (one copy per instruction set).
#pragma once

#include "../common/cpu_capability.h"
#include "../common/dtype.h"

namespace effops::binary {

// Function pointers, indexed by FloatType of x.
struct TopkPackKernels {
  // out[row, ceil(length / 64)] = bits of the k largest of x[row, length], for `rows` rows
  void (*pack[kNumFloatTypes])(const void* x, int64_t rows, int64_t length, int64_t k, uint64_t* out);
};

EFFOPS_DECLARE_KERNEL_TABLE(TopkPackKernels, topk_pack_kernels)

}  // namespace effops::binary
