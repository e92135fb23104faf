// Interface between hamming_cpu.cpp (torch) and its kernels (one copy per instruction set).
#pragma once

#include "../common/cpu_capability.h"
#include "hamming_math.h"

namespace effops::binary {

// Rows of a against rows of b, packed bits in `bytes` bytes each, contiguous.
struct HammingTask {
  const uint8_t* a;
  int64_t rows_a;
  const uint8_t* b;
  int64_t begin_b, end_b;  // the task's rows of b
  int64_t bytes;
};

struct SearchTask : HammingTask {
  const uint8_t* mask;  // of the task's first row of a, or null: pairs that count, one byte each
  int64_t mask_stride;
  int64_t k;
  NeighbourKey* neighbours;  // [rows_a, k] out, ascending, padded with kNoNeighbour
  // For each row of b the nearest row of a, or null: not wanted. The task lowers what is there already.
  NeighbourKey* columns;  // [rows of b]
  int64_t first_a;        // index of the task's first row of a
};

struct HammingKernels {
  int64_t (*scratch_bytes)(int64_t bytes);
  void (*search)(const SearchTask& task, void* scratch);
  // out[i, j] = distance of row i of a and row j of b, for the task's rows.
  void (*distances)(const HammingTask& task, int32_t* out, int64_t out_stride, void* scratch);
};

namespace isa_avx512_popcount { extern const HammingKernels hamming_kernels; }
EFFOPS_DECLARE_KERNEL_TABLE(HammingKernels, hamming_kernels)

}  // namespace effops::binary
