// One switch from torch's dtypes to the kernels' storage types.
#pragma once

#include "check.h"
#include "dtype.h"
#include "torch.h"

namespace effops {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>{}) with the storage type T of a floating dtype.
template <typename F>
decltype(auto) dispatch_floating(const char* op, const char* argument, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(TypeTag<float>{});
    case ScalarType::Double: return f(TypeTag<double>{});
    case ScalarType::BFloat16: return f(TypeTag<bf16>{});
    case ScalarType::Half: return f(TypeTag<f16>{});
    default: fail(op, ": expected ", argument, " of a floating dtype, got ", dtype_name(dtype));
  }
}

inline FloatType float_type_of(ScalarType dtype) {
  return dispatch_floating("effops", "a tensor", dtype, [](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, float>) return FloatType::kFloat;
    if constexpr (std::is_same_v<T, double>) return FloatType::kDouble;
    if constexpr (std::is_same_v<T, bf16>) return FloatType::kBFloat16;
    return FloatType::kHalf;
  });
}

}  // namespace effops
