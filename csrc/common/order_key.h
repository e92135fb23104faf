// Integers that stand for floating numbers where only their order counts.
#pragma once

#include "dtype.h"

namespace effops {

template <typename A>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = int32_t;
  using Unsigned = uint32_t;
  static constexpr int32_t magnitude = 0x7fffffff, nan = 0x7fc00000;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
  using Unsigned = uint64_t;
  static constexpr int64_t magnitude = 0x7fffffffffffffff, nan = 0x7ff8000000000000;
};
// Integers in the order of the floating numbers: equal for -0 and 0, one largest key for all NaN. The
// smallest integer is no number's key.
template <typename A>
using key_t = typename KeyOf<A>::type;
template <typename A>
constexpr key_t<A> kNoKey = -KeyOf<A>::magnitude - 1;

template <typename A>
EFFOPS_HD key_t<A> key_of(A value) {
  const key_t<A> bits = bit_cast<key_t<A>>(value == A(0) ? A(0) : value);
  const key_t<A> key = bits < 0 ? bits ^ KeyOf<A>::magnitude : bits;
  return value == value ? key : KeyOf<A>::nan;
}

template <typename A>
EFFOPS_HD A value_of(key_t<A> key) {
  return bit_cast<A>(key < 0 ? key ^ KeyOf<A>::magnitude : key);
}

}  // namespace effops
