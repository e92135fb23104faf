// Registers of unsigned bytes and of 16-bit numbers.
#pragma once

#include "../common/simd.h"

namespace effops::simd {
namespace {

constexpr int kByteLanes = kVectorBytes;
typedef uint8_t Bytes __attribute__((vector_size(kByteLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(kByteLanes)));
using LaneMask = uint64_t;  // bit i: lane i

// A 16-bit number for each byte lane: those of the even lanes, those of the odd ones. That is what one
// operation each takes out of bytes.
struct Words {
  HalfWords even, odd;
};
// Where the number of a lane is in an array of Words.
constexpr int64_t place_of_word(int64_t lane) { return lane % 2 * (kByteLanes / 2) + lane / 2; }

EFFOPS_INLINE Bytes splat(uint8_t value) { return Bytes{} + value; }
EFFOPS_INLINE HalfWords splat(uint16_t value) { return HalfWords{} + value; }

EFFOPS_INLINE void add(Words& sum, Bytes bytes) {
  const HalfWords pairs = reinterpret_cast<HalfWords>(bytes);
  sum.even += pairs & 255;
  sum.odd += pairs >> 8;
}

template <typename V>
EFFOPS_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
EFFOPS_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

#if defined(__AVX512BW__)
EFFOPS_INLINE Bytes add_saturated(Bytes a, Bytes b) {
  return reinterpret_cast<Bytes>(
      _mm512_adds_epu8(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
EFFOPS_INLINE LaneMask lanes_set(Bytes mask) { return _mm512_movepi8_mask(reinterpret_cast<__m512i>(mask)); }
#elif defined(__AVX2__)
EFFOPS_INLINE Bytes add_saturated(Bytes a, Bytes b) {
  return reinterpret_cast<Bytes>(
      _mm256_adds_epu8(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
EFFOPS_INLINE LaneMask lanes_set(Bytes mask) {
  return static_cast<uint32_t>(_mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)));
}
#elif defined(__SSE2__)
EFFOPS_INLINE Bytes add_saturated(Bytes a, Bytes b) {
  return reinterpret_cast<Bytes>(_mm_adds_epu8(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
}
EFFOPS_INLINE LaneMask lanes_set(Bytes mask) {
  return static_cast<LaneMask>(_mm_movemask_epi8(reinterpret_cast<__m128i>(mask)));
}
#else
EFFOPS_INLINE Bytes add_saturated(Bytes a, Bytes b) {
  const Bytes sum = a + b;
  return sum < a ? splat(uint8_t{255}) : sum;
}
EFFOPS_INLINE LaneMask lanes_set(Bytes mask) {
  LaneMask result = 0;
  for (int i = 0; i < kByteLanes; ++i) result |= static_cast<LaneMask>(mask[i] != 0) << i;
  return result;
}
#endif

EFFOPS_INLINE Bytes below(Bytes a, Bytes bound) { return reinterpret_cast<Bytes>(a < bound); }
EFFOPS_INLINE Bytes below(const Words& a, const Words& bound) {
  const HalfWords even = reinterpret_cast<HalfWords>(a.even < bound.even);
  const HalfWords odd = reinterpret_cast<HalfWords>(a.odd < bound.odd);
  return reinterpret_cast<Bytes>((even & 0x00ff) | (odd & 0xff00));
}

#if defined(__AVX2__)
// result[i] = table[i / 16 * 16 + places[i]], places below 16.
EFFOPS_INLINE Bytes look_up(Bytes table, Bytes places) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Bytes>(
      _mm512_shuffle_epi8(reinterpret_cast<__m512i>(table), reinterpret_cast<__m512i>(places)));
#else
  return reinterpret_cast<Bytes>(
      _mm256_shuffle_epi8(reinterpret_cast<__m256i>(table), reinterpret_cast<__m256i>(places)));
#endif
}
#endif

// Per byte the number of ones.
#if defined(__AVX512BITALG__)
EFFOPS_INLINE Bytes count_ones(Bytes x) {
  return reinterpret_cast<Bytes>(_mm512_popcnt_epi8(reinterpret_cast<__m512i>(x)));
}
#else
EFFOPS_INLINE Bytes count_ones(Bytes x) {
  x -= x >> 1 & 0x55;
  x = (x & 0x33) + (x >> 2 & 0x33);
  return (x + (x >> 4)) & 0x0f;
}
#endif

EFFOPS_INLINE int32_t count_ones(uint64_t x) {
#if defined(__POPCNT__) || !defined(__x86_64__)
  return __builtin_popcountll(x);
#else
  x -= x >> 1 & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<int32_t>(x * 0x0101010101010101u >> 56);
#endif
}

}  // namespace
}  // namespace effops::simd
