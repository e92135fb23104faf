// From tensors to the numbers of the CPU kernels.
#pragma once

#include <optional>

#include "../common/dtype_switch.h"

namespace effops::pairwise {

// Calls f(TypeTag<T>{}) with the type of the points, float or double.
template <typename F>
void dispatch_points(const Tensor& points, const F& f) {
  if (points.scalar_type() == ScalarType::Double)
    f(TypeTag<double>{});
  else
    f(TypeTag<float>{});
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return effops::as_contiguous(*tensor);
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data_of<T>(*tensor) : nullptr;
}
template <typename T>
T* new_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace effops::pairwise
