// Storage types of the kernels and their conversion to the type that sums are kept in.
//
// float16 and bfloat16 are plain bit holders: kernels never compute in them. A value is widened to
// float, and rounded to nearest even once, when it is stored.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#elif defined(__F16C__)
#include <immintrin.h>
#endif

namespace effops {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The storage types by number, for interfaces that cannot be templates.
enum class FloatType : int { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3 };
constexpr int kNumFloatTypes = 4;

// The type a storage type is accumulated in: float, and double for double.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename AccumulatorOf<T>::type;

template <typename To, typename From>
EFFOPS_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To result;
  memcpy(static_cast<void*>(&result), &value, sizeof(To));
  return result;
}

EFFOPS_HD float widen(float value) { return value; }
EFFOPS_HD double widen(double value) { return value; }
EFFOPS_HD float widen(bf16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
EFFOPS_HD float widen(f16 value) {
#if defined(__CUDACC__)
  return __half2float(bit_cast<__half>(value));
#elif defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  // By hand: the compiler's _Float16 would need a newer libgcc than many systems have.
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = (value.bits & 0x7fffu) << 13;
  constexpr uint32_t kSmallest = 113u << 23;  // 2^-14, the smallest normal float16
  const float normal = bit_cast<float>(magnitude + (112u << 23));
  const float subnormal = bit_cast<float>(magnitude + kSmallest) - bit_cast<float>(kSmallest);
  const float special = bit_cast<float>(magnitude | 0x7f800000u);
  const uint32_t exponent = value.bits & 0x7c00u;
  const float result = exponent == 0x7c00u ? special : exponent == 0 ? subnormal : normal;
  return bit_cast<float>(bit_cast<uint32_t>(result) | sign);
#endif
}

template <typename T>
struct Narrow {
  static EFFOPS_HD T from(accumulator_t<T> value) { return static_cast<T>(value); }
};
template <>
struct Narrow<bf16> {
  static EFFOPS_HD bf16 from(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
  }
};
template <>
struct Narrow<f16> {
  static EFFOPS_HD f16 from(float value) {
#if defined(__CUDACC__)
    return bit_cast<f16>(__float2half_rn(value));
#elif defined(__F16C__)
    return {static_cast<uint16_t>(_cvtss_sh(value, 0))};  // 0: to nearest even
#else
    const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
    constexpr uint32_t kAligner = 126u << 23;  // 0.5: adding it leaves a subnormal's bits at the end
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(kAligner)) -
                               kAligner;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t rounded = magnitude >= (143u << 23)  ? special
                             : magnitude < (113u << 23) ? subnormal
                                                        : normal;
    return {static_cast<uint16_t>(rounded | ((bits >> 16) & 0x8000u))};
#endif
  }
};

// Rounds an accumulator to the storage type T.
template <typename T>
EFFOPS_HD T narrow(accumulator_t<T> value) {
  return Narrow<T>::from(value);
}

}  // namespace effops
