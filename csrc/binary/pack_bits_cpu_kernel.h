// Interface between pack_bits_cpu.cpp (torch) and its kernels (one copy per instruction set).
#pragma once

#include "../common/cpu_capability.h"
#include "../common/dtype.h"

namespace effops::binary {

constexpr int kByteType = kNumFloatTypes;  // bool and uint8, beside the FloatTypes
constexpr int kNumBitTypes = kNumFloatTypes + 1;

// Tasks are words [begin, end), counted over all rows of `words` each; a row has `bits` bits.
struct PackBitsKernels {
  // out[word], bit j = x[row, 64 * word + j] > 0; x is of one type of FloatType or kByteType
  void (*pack[kNumBitTypes])(const void* x, int64_t bits, int64_t words, int64_t begin, int64_t end,
                             uint64_t* out);
  // out[row, j] = bit j of the row that begins at byte row * stride
  void (*unpack)(const uint8_t* packed, int64_t stride, int64_t bits, int64_t words, int64_t begin,
                 int64_t end, uint8_t* out);
};

EFFOPS_DECLARE_KERNEL_TABLE(PackBitsKernels, pack_bits_kernels)

}  // namespace effops::binary
