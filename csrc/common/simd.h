// Vectors of the widest registers of the instruction set a file is compiled for, by the compiler's
// vector extensions: + - * / comparisons, `mask ? a : b` and int/float conversion work as written.
//
// Everything is in an unnamed namespace and always inlined: files compiled with different -m flags must
// not share an inline function, or the linker could pick the AVX-512 copy for every processor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <type_traits>
#include <utility>

#include "dtype.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace effops::simd {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Vec<T>: one register of T (float or double), its lanes and the integer vector of the same width, which
// comparisons give (all bits of a lane set = true).
template <typename T>
struct Vec;
template <>
struct Vec<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
  using integer = int32_t;
  static constexpr int lanes = kVectorBytes / 4;
};
template <>
struct Vec<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
  using integer = int64_t;
  static constexpr int lanes = kVectorBytes / 8;
};

#define EFFOPS_INLINE __attribute__((always_inline)) inline

template <typename V, typename T>
EFFOPS_INLINE V load(const T* pointer) {
  V result;
  memcpy(&result, pointer, sizeof(V));
  return result;
}

// Asks for the two cache lines from element `offset` on. Strided reads need it: hardware prefetchers stop
// at page borders. An address past the end is harmless.
template <typename T>
EFFOPS_INLINE void prefetch(const T* pointer, int64_t offset) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer) + offset * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const void*>(address));
  __builtin_prefetch(reinterpret_cast<const void*>(address + 64));
}

template <typename V, typename T>
EFFOPS_INLINE void store(T* pointer, V value) {
  memcpy(pointer, &value, sizeof(V));
}

template <typename T>
EFFOPS_INLINE typename Vec<T>::type broadcast(T value) {
  return value - typename Vec<T>::type{};  // x - 0 is x for every x, so that no subtraction is left
}

// Loads one register of accumulators from storage of any floating type.
EFFOPS_INLINE Vec<float>::type load_wide(const float* p) { return load<Vec<float>::type>(p); }
EFFOPS_INLINE Vec<double>::type load_wide(const double* p) { return load<Vec<double>::type>(p); }
#if defined(__AVX512F__)
EFFOPS_INLINE Vec<float>::type load_wide(const bf16* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
EFFOPS_INLINE Vec<float>::type load_wide(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif defined(__AVX2__)
EFFOPS_INLINE Vec<float>::type load_wide(const bf16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
EFFOPS_INLINE Vec<float>::type load_wide(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#else
template <typename T>
EFFOPS_INLINE Vec<float>::type load_wide(const T* p) {
  Vec<float>::type result;
  for (int i = 0; i < Vec<float>::lanes; ++i) result[i] = widen(p[i]);
  return result;
}
#endif

// The first four lanes of a sum over groups of four neighbouring lanes.
template <typename T, int Lanes, typename V, size_t... I>
EFFOPS_INLINE auto half_of(V v, int, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, I...) + __builtin_shufflevector(v, v, (I + Lanes / 2)...);
}
template <typename T, int Lanes, typename V>
EFFOPS_INLINE auto fold_to_four(V v) {
  if constexpr (Lanes <= 4) {
    return v;
  } else {
    return fold_to_four<T, Lanes / 2>(half_of<T, Lanes>(v, 0, std::make_index_sequence<Lanes / 2>{}));
  }
}

// total[i] += sum of the lanes of the i-th vector, for four vectors at once (a transposing reduction).
template <size_t... I>
EFFOPS_INLINE void add_sums(Vec<float>::type a, Vec<float>::type b, Vec<float>::type c, Vec<float>::type d,
                            float* total, std::index_sequence<I...>) {
  constexpr int n = Vec<float>::lanes;
  // Within each group of four lanes: (a0 b0 a1 b1) + (a2 b2 a3 b3), then (a b c d).
  constexpr auto interleave = [](int i, int high) { return i / 4 * 4 + i % 4 / 2 + 2 * high + (i % 2) * n; };
  constexpr auto join = [](int i, int high) { return i / 4 * 4 + i % 2 + 2 * high + (i % 4 / 2) * n; };
  const auto ab = __builtin_shufflevector(a, b, interleave(I, 0)...) +
                  __builtin_shufflevector(a, b, interleave(I, 1)...);
  const auto cd = __builtin_shufflevector(c, d, interleave(I, 0)...) +
                  __builtin_shufflevector(c, d, interleave(I, 1)...);
  const auto abcd = __builtin_shufflevector(ab, cd, join(I, 0)...) +
                    __builtin_shufflevector(ab, cd, join(I, 1)...);
  auto sums = fold_to_four<float, n>(abcd);
  sums += load<decltype(sums)>(total);
  store(total, sums);
}
EFFOPS_INLINE void add_sums(Vec<float>::type a, Vec<float>::type b, Vec<float>::type c, Vec<float>::type d,
                            float* total) {
  add_sums(a, b, c, d, total, std::make_index_sequence<Vec<float>::lanes>{});
}
EFFOPS_INLINE void add_sums(Vec<double>::type a, Vec<double>::type b, Vec<double>::type c,
                            Vec<double>::type d, double* total) {
  const Vec<double>::type all[4] = {a, b, c, d};
  for (int k = 0; k < 4; ++k) {
    double sum = 0;
    for (int i = 0; i < Vec<double>::lanes; ++i) sum += all[k][i];
    total[k] += sum;
  }
}

// Every second lane of two neighbouring registers: lanes 0, 2, 4, ... or, with Odd = 1, lanes 1, 3, 5, ...
template <int Odd, typename V, size_t... I>
EFFOPS_INLINE V every_second(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + Odd)...);
}
template <int Odd, typename T, typename V>
EFFOPS_INLINE V every_second(V a, V b) {
  return every_second<Odd>(a, b, std::make_index_sequence<Vec<T>::lanes>{});
}

// Splits (x0 y0 x1 y1 ...) into x and y, one register each.
template <typename T, typename V>
EFFOPS_INLINE void split_pairs(const T* pairs, V& x, V& y) {
  const V a = load<V>(pairs), b = load<V>(pairs + Vec<T>::lanes);
  x = every_second<0, T>(a, b);
  y = every_second<1, T>(a, b);
}

// Splits (a0 b0 c0 d0 a1 b1 ...) into four registers.
template <typename T, typename V>
EFFOPS_INLINE void split_quads(const T* quads, V (&out)[4]) {
  V even[2], odd[2];
  for (int half = 0; half < 2; ++half) split_pairs(quads + half * 2 * Vec<T>::lanes, even[half], odd[half]);
  out[0] = every_second<0, T>(even[0], even[1]);
  out[1] = every_second<0, T>(odd[0], odd[1]);
  out[2] = every_second<1, T>(even[0], even[1]);
  out[3] = every_second<1, T>(odd[0], odd[1]);
}

// Stores one register of accumulators as N = lanes elements of any floating type.
EFFOPS_INLINE void store_narrow(float* p, Vec<float>::type v) { store(p, v); }
EFFOPS_INLINE void store_narrow(double* p, Vec<double>::type v) { store(p, v); }
template <typename T>
EFFOPS_INLINE void store_narrow(T* p, Vec<float>::type v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, f16>) {
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));  // 0: to nearest even
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, f16>) {
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
  }
#endif
  for (int i = 0; i < Vec<float>::lanes; ++i) p[i] = narrow<T>(v[i]);
}

// Bit i of the result is the sign bit of lane i.
EFFOPS_INLINE uint32_t sign_bits(Vec<float>::mask v) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(v)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(v)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Vec<float>::lanes; ++i) bits |= (v[i] < 0 ? 1u : 0u) << i;
  return bits;
#endif
}
EFFOPS_INLINE uint32_t sign_bits(Vec<double>::mask v) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask(reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(v)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_pd(reinterpret_cast<__m128d>(v)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Vec<double>::lanes; ++i) bits |= (v[i] < 0 ? 1u : 0u) << i;
  return bits;
#endif
}

// One number of all lanes, combined by a commutative and associative operation.
template <int Lanes, typename V, typename F, size_t... I>
EFFOPS_INLINE auto join_halves(V v, const F& f, std::index_sequence<I...>) {
  return f(__builtin_shufflevector(v, v, I...), __builtin_shufflevector(v, v, (I + Lanes / 2)...));
}
template <int Lanes, typename V, typename F>
EFFOPS_INLINE auto combine_lanes(V v, const F& f) {
  if constexpr (Lanes == 2) {
    return f(v[0], v[1]);
  } else {
    return combine_lanes<Lanes / 2>(join_halves<Lanes>(v, f, std::make_index_sequence<Lanes / 2>{}), f);
  }
}
template <typename T, typename V>
EFFOPS_INLINE auto sum_of_lanes(V v) {
  return combine_lanes<Vec<T>::lanes>(v, [](auto a, auto b) { return a + b; });
}
template <typename T, typename V>
EFFOPS_INLINE auto min_of_lanes(V v) {
  return combine_lanes<Vec<T>::lanes>(v, [](auto a, auto b) { return a < b ? a : b; });
}
template <typename T, typename V>
EFFOPS_INLINE auto max_of_lanes(V v) {
  return combine_lanes<Vec<T>::lanes>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Constants of exp: Horner coefficients of a polynomial on |r| <= ln(2) / 2, from the highest power down
// to that of r^2; 1 + r is added at the end.
template <typename T>
struct ExpOf;
template <>
struct ExpOf<float> {  // of Cephes
  static constexpr float lowest = -104, highest = 89;  // exp is 0 below and infinite above
  static constexpr float round = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int32_t bias = 127, mantissa_bits = 23;
  static constexpr float polynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};
template <>
struct ExpOf<double> {  // Taylor: r^14 / 14! < 2^-57
  static constexpr double lowest = -746, highest = 710;
  static constexpr double round = 6755399441055744;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr int64_t bias = 1023, mantissa_bits = 52;
  static constexpr double polynomial[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0,
                                          1 / 362880.0,     1 / 40320.0,     1 / 5040.0,     1 / 720.0,
                                          1 / 120.0,        1 / 24.0,        1 / 6.0,        1 / 2.0};
};

// exp of every lane, to about 1 ulp: subnormal results, 0, Inf and NaN as they should be.
template <typename T>
EFFOPS_INLINE typename Vec<T>::type exp(typename Vec<T>::type x) {
  using V = typename Vec<T>::type;
  using Bits = typename Vec<T>::mask;
  using Exp = ExpOf<T>;
  x = x < Exp::lowest ? broadcast(Exp::lowest) : x;  // NaN stays
  x = x > Exp::highest ? broadcast(Exp::highest) : x;
  const V rounded = x * T(1.44269504088896340736) + Exp::round;
  const V n = rounded - Exp::round;
  const V r = x - n * Exp::ln2_high - n * Exp::ln2_low;
  V p = broadcast(Exp::polynomial[0]);
  for (size_t i = 1; i < sizeof(Exp::polynomial) / sizeof(T); ++i) p = p * r + Exp::polynomial[i];
  p = p * (r * r) + r + T(1);
  // 2^n in two factors: n reaches beyond the exponents of normal numbers.
  const Bits exponent = reinterpret_cast<Bits>(rounded) - reinterpret_cast<Bits>(broadcast(Exp::round));
  const Bits half = exponent >> 1;
  p *= reinterpret_cast<V>((half + Exp::bias) << Exp::mantissa_bits);
  return p * reinterpret_cast<V>((exponent - half + Exp::bias) << Exp::mantissa_bits);
}

}  // namespace
}  // namespace effops::simd
