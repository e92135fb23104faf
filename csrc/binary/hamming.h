// Checks of the Hamming ops that the CPU and the CUDA library share.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../common/check.h"
#include "../common/torch.h"
#include "hamming_math.h"

namespace effops::binary {

// Rows of one set: a neighbour's key holds its index in 32 bits.
constexpr int64_t kMaxRows = int64_t{1} << 32;

struct HammingShape {
  int64_t batch, rows_a, rows_b, bytes;
  bool batched;

  // Sizes of a result with `last` numbers per row of a.
  std::vector<int64_t> sizes(int64_t last) const {
    return batched ? std::vector<int64_t>{batch, rows_a, last} : std::vector<int64_t>{rows_a, last};
  }
};

inline HammingShape check_hamming(const char* op,
                                  const Tensor& a,    // [B, Na, W] or [Na, W]
                                  const Tensor& b) {  // [B, Nb, W] or [Nb, W]
  const bool batched = a.dim() == 3;
  ShapeChecker sizes(op);
  sizes.match("a", a, batched ? "BNW" : "NW");
  sizes.match("b", b, batched ? "BMW" : "MW");
  const ScalarType dtype = a.scalar_type();
  if (dtype != ScalarType::Long && dtype != ScalarType::Byte) {
    fail(op, ": expected a of dtype int64 or uint8, got ", dtype_name(dtype));
  }
  check_dtype(op, "b", b, dtype);
  check_same_device(op, "b", b, "a", a);
  const int64_t bytes = sizes['W'] * static_cast<int64_t>(a.element_size());
  if (8 * bytes > kMaxBits) {
    fail(op, ": expected a of at most ", kMaxBits, " bits per row, got shape ", shape_text(a));
  }
  if (sizes['N'] >= kMaxRows || sizes['M'] >= kMaxRows) {
    fail(op, ": expected sets of fewer than 2^32 rows, got ", shape_text(a), " and ", shape_text(b));
  }
  return {batched ? sizes['B'] : 1, sizes['N'], sizes['M'], bytes, batched};
}

inline void check_lengths(const char* op, const char* argument, const std::optional<Tensor>& lengths,
                          const Tensor& a, const HammingShape& shape) {
  if (!lengths.has_value()) return;
  if (lengths->dim() != (shape.batched ? 1 : 0) || (shape.batched && lengths->size(0) != shape.batch)) {
    fail(op, ": expected ", argument, " of shape [", shape.batched ? "B=" : "",
         shape.batched ? std::to_string(shape.batch) : "", "], got ", shape_text(*lengths));
  }
  check_dtype(op, argument, *lengths, ScalarType::Long);
  check_same_device(op, argument, *lengths, "a", a);
}

// mask: [B, Na, Nb] or, shared by the batch, [Na, Nb]
inline void check_mask(const char* op, const std::optional<Tensor>& mask, const Tensor& a,
                       const HammingShape& shape) {
  if (!mask.has_value()) return;
  const bool shared = mask->dim() == 2;
  const int64_t first = shared ? 0 : 1;
  if ((!shared && mask->dim() != 3) || (!shared && (!shape.batched || mask->size(0) != shape.batch)) ||
      mask->size(first) != shape.rows_a || mask->size(first + 1) != shape.rows_b) {
    fail(op, ": expected mask of shape [", shape.batched ? "B=" + std::to_string(shape.batch) + ", " : "",
         "N=", shape.rows_a, ", M=", shape.rows_b, "], got ", shape_text(*mask));
  }
  check_dtype(op, "mask", *mask, ScalarType::Bool);
  check_same_device(op, "mask", *mask, "a", a);
}

inline HammingShape check_hamming_knn(const Tensor& a,  // [B, Na, W] or [Na, W]
                                      const Tensor& b,  // [B, Nb, W] or [Nb, W]
                                      int64_t k, const std::optional<Tensor>& lengths_a,
                                      const std::optional<Tensor>& lengths_b,
                                      const std::optional<Tensor>& mask) {
  constexpr const char* op = "hamming_knn";
  const HammingShape shape = check_hamming(op, a, b);
  if (k < 0 || k >= kMaxRows) fail(op, ": expected k in [0, 2^32), got ", k);
  check_lengths(op, "lengths_a", lengths_a, a, shape);
  check_lengths(op, "lengths_b", lengths_b, a, shape);
  check_mask(op, mask, a, shape);
  return shape;
}

inline HammingShape check_hamming_match(const Tensor& a,  // [Na, W]
                                        const Tensor& b,  // [Nb, W]
                                        std::optional<double> ratio, std::optional<int64_t> max_distance,
                                        const std::optional<Tensor>& mask) {
  constexpr const char* op = "hamming_match";
  if (a.dim() != 2) fail(op, ": expected a of shape [N, W], got ", shape_text(a));
  const HammingShape shape = check_hamming(op, a, b);
  if (ratio.has_value() && !(*ratio > 0)) fail(op, ": expected ratio > 0, got ", *ratio);
  if (max_distance.has_value() && *max_distance < 0) {
    fail(op, ": expected max_distance >= 0, got ", *max_distance);
  }
  check_mask(op, mask, a, shape);
  return shape;
}

inline MatchRule make_match_rule(std::optional<double> ratio, std::optional<int64_t> max_distance) {
  return {ratio.has_value(), ratio.value_or(0), max_distance.value_or(kNoDistance)};
}

}  // namespace effops::binary
