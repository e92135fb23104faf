// Transposing blocks of 8 x 8 elements in registers. Included by ISA files only.
#pragma once

#include "simd.h"

namespace effops::simd {
namespace {

constexpr int kBlock = 8;  // elements of a side

template <int kBytes>
struct BlockRow;
template <>
struct BlockRow<2> {
  typedef uint16_t type __attribute__((vector_size(2 * kBlock)));
};
template <>
struct BlockRow<4> {
  typedef uint32_t type __attribute__((vector_size(4 * kBlock)));
};
template <>
struct BlockRow<8> {
  typedef uint64_t type __attribute__((vector_size(8 * kBlock)));
};

// Bits of an element's place (3 of the row, 3 of the column) move on by one; three times swap them.
template <typename V>
EFFOPS_INLINE void interleave_halves(const V (&from)[kBlock], V (&to)[kBlock]) {
  for (int i = 0; i < kBlock / 2; ++i) {
    to[2 * i] = __builtin_shufflevector(from[i], from[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
    to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
  }
}

// to(j)[i] = from(i)[j] for i, j < 8.
template <typename T, typename From, typename To>
EFFOPS_INLINE void transpose_lines(const From& from, const To& to) {
  using V = typename BlockRow<sizeof(T)>::type;
  V a[kBlock], b[kBlock];
  for (int i = 0; i < kBlock; ++i) a[i] = load<V>(from(i));
  interleave_halves(a, b);
  interleave_halves(b, a);
  interleave_halves(a, b);
  for (int i = 0; i < kBlock; ++i) store(to(i), b[i]);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < 8.
template <typename T>
EFFOPS_INLINE void transpose_block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  transpose_lines<T>([=](int i) { return from + i * from_stride; },
                     [=](int j) { return to + j * to_stride; });
}

}  // namespace
}  // namespace effops::simd
