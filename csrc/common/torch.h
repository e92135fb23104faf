// The only file that includes torch's stable ABI. Everything else uses the names below.
#pragma once

#include <torch/csrc/stable/macros.h>  // not brought along by the others in torch 2.11

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

namespace effops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A new tensor like `like` in device, and in dtype unless another is named.
inline Tensor empty_of(const Tensor& like, const std::vector<int64_t>& sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor zeros_of(const Tensor& like, const std::vector<int64_t>& sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_zeros(like, sizes, dtype);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace effops
