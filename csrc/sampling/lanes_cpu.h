// One register of channels, or one channel: kernels written once for packed and for strided maps.
// Included by ISA files only.
#pragma once

#include "../common/simd.h"

namespace effops::sampling {
namespace {

using namespace effops::simd;

// Registers of channels held at a time: one accumulator each, and as many for the corners' products.
constexpr int kMaxRegisters = 4;

// Channels lie next to each other, in whole registers.
template <typename T>
struct VectorLanes {
  using Storage = T;
  using A = accumulator_t<T>;
  using V = typename Vec<A>::type;
  static constexpr int lanes = Vec<A>::lanes;
  static EFFOPS_INLINE V load_storage(const T* p) { return load_wide(p); }
  static EFFOPS_INLINE V load_sums(const A* p) { return load<V>(p); }
  static EFFOPS_INLINE void store_sums(A* p, V v) { store(p, v); }
  static EFFOPS_INLINE V all(A value) { return broadcast(value); }
};

// One channel at a time, wherever it lies.
template <typename T>
struct ScalarLanes {
  using Storage = T;
  using A = accumulator_t<T>;
  using V = A;
  static constexpr int lanes = 1;
  static EFFOPS_INLINE V load_storage(const T* p) { return widen(*p); }
  static EFFOPS_INLINE V load_sums(const A* p) { return *p; }
  static EFFOPS_INLINE void store_sums(A* p, V v) { *p = v; }
  static EFFOPS_INLINE V all(A value) { return value; }
};

template <int N>
struct Registers {
  static constexpr int count = N;
};

// Calls f(Registers<N>, first channel) until all `padded` channels, whole registers, are done.
template <int kLanes, typename F>
EFFOPS_INLINE void for_registers(int64_t padded, const F& f) {
  int64_t channel = 0;
  for (; padded - channel >= kMaxRegisters * kLanes; channel += kMaxRegisters * kLanes) {
    f(Registers<kMaxRegisters>{}, channel);
  }
  switch ((padded - channel) / kLanes) {
    case 3: f(Registers<3>{}, channel); break;
    case 2: f(Registers<2>{}, channel); break;
    case 1: f(Registers<1>{}, channel); break;
    default: break;
  }
}

}  // namespace
}  // namespace effops::sampling
