// Checks of pack_bits and unpack_bits that the CPU and the CUDA library share, and the shape of packed rows.
#pragma once

#include <vector>

#include "../common/check.h"
#include "../common/torch.h"

namespace effops::binary {

constexpr int64_t kWordBits = 64;

constexpr int64_t words_of(int64_t bits) { return (bits + kWordBits - 1) / kWordBits; }

// The sizes of a tensor with another last one.
inline std::vector<int64_t> sizes_with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes(static_cast<size_t>(tensor.dim()));
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = tensor.size(static_cast<int64_t>(i));
  sizes.back() = last;
  return sizes;
}

inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

inline void check_rows(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.dim() < 1) fail(op, ": expected ", argument, " of at least 1 dimension, got shape []");
}

// How many elements of a row become ones (topk_pack) or sum to (binnorm).
inline void check_ones(const char* op, int64_t k, const Tensor& x) {
  const int64_t length = x.size(x.dim() - 1);
  if (k < 0 || k > length) fail(op, ": expected k in [0, ", length, "], got ", k);
}

// Rows of bits, and of words that hold them. Rows without padding are one long row: tasks are cut by words.
struct BitRows {
  int64_t rows, bits;  // per row
  int64_t words;       // per row

  static BitRows of(int64_t rows, int64_t bits) {
    if (bits % kWordBits == 0) return {1, rows * bits, rows * words_of(bits)};
    return {rows, bits, words_of(bits)};
  }
};

inline void check_pack_bits(const Tensor& x) {  // [..., M]
  constexpr const char* op = "pack_bits";
  check_rows(op, "x", x);
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Bool && dtype != ScalarType::Byte && !is_floating(dtype)) {
    fail(op, ": expected x of dtype bool, uint8, float32, float64, bfloat16 or float16, got ",
         dtype_name(dtype));
  }
}

inline void check_unpack_bits(const Tensor& packed,  // [..., W]
                              int64_t num_bits) {
  constexpr const char* op = "unpack_bits";
  check_rows(op, "packed", packed);
  const ScalarType dtype = packed.scalar_type();
  if (dtype != ScalarType::Long && dtype != ScalarType::Byte) {
    fail(op, ": expected packed of dtype int64 or uint8, got ", dtype_name(dtype));
  }
  const int64_t bits = packed.size(packed.dim() - 1) * static_cast<int64_t>(packed.element_size()) * 8;
  if (num_bits < 0 || num_bits > bits) {
    fail(op, ": expected num_bits in [0, ", bits, "], got ", num_bits);
  }
}

}  // namespace effops::binary
