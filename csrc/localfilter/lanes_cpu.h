// What the CPU kernels of this engine do to the lanes of a register. Included by ISA files only.
#pragma once

#include "../common/simd.h"

namespace effops::localfilter {
namespace {

using namespace effops::simd;

// ---------------------------------------------------------------------------------------- choice of lanes

template <typename A, size_t... I>
EFFOPS_INLINE typename Vec<A>::mask lane_numbers(std::index_sequence<I...>) {
  return typename Vec<A>::mask{static_cast<typename Vec<A>::integer>(I)...};
}

// Lanes i with first <= x + i < last. Rows are shorter than 2^31.
template <typename A>
EFFOPS_INLINE typename Vec<A>::mask lanes_within(int64_t x, int64_t first, int64_t last) {
  using Integer = typename Vec<A>::integer;
  const auto at = lane_numbers<A>(std::make_index_sequence<Vec<A>::lanes>{}) + static_cast<Integer>(x);
  return (at >= static_cast<Integer>(first)) & (at < static_cast<Integer>(last));
}

// What a running maximum starts with. Finite: the exponential of -Inf less it is 0, not NaN.
template <typename A>
constexpr A kLowest = std::is_same_v<A, double> ? A(-__DBL_MAX__) : A(-__FLT_MAX__);

// The larger of two; `a` where that is not a number. (A constant `b` would otherwise be forgotten.)
template <typename V>
EFFOPS_INLINE V larger(V a, V b) {
  return a < b ? b : a;
}

// ---------------------------------------------------------------------------------------- ends of rows

// The first `count` < lanes elements, and zeros.
template <typename F, typename A = accumulator_t<F>>
EFFOPS_INLINE typename Vec<A>::type load_part(const F* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<F, float>) {
    return _mm512_maskz_loadu_ps((1u << count) - 1, p);
  } else if constexpr (std::is_same_v<F, double>) {
    return _mm512_maskz_loadu_pd((1u << count) - 1, p);
  } else {
    const __m256i bits = _mm256_maskz_loadu_epi16((1u << count) - 1, p);
    if constexpr (std::is_same_v<F, f16>) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
#else
  F whole[Vec<A>::lanes] = {};
  for (int64_t i = 0; i < count; ++i) whole[i] = p[i];
  return load_wide(whole);
#endif
}

template <typename F, typename V>
EFFOPS_INLINE void store_part(F* p, V value, int64_t count) {
  F whole[Vec<accumulator_t<F>>::lanes];
  store_narrow(whole, value);
  for (int64_t i = 0; i < count; ++i) p[i] = whole[i];
}

// One register from element x of a row that ends at `count`.
template <bool Part, typename F>
EFFOPS_INLINE auto load_lanes(const F* row, int64_t x, int64_t count) {
  if constexpr (Part) return load_part(row + x, count - x);
  return load_wide(row + x);
}
template <bool Part, typename F, typename V>
EFFOPS_INLINE void store_lanes(F* row, int64_t x, int64_t count, V value) {
  if constexpr (Part) return store_part(row + x, value, count - x);
  store_narrow(row + x, value);
}

// Stores one register of a row of scratch; behind its end, up to whole registers of every instruction set,
// are 0.
template <bool Part, typename A, typename V>
EFFOPS_INLINE void store_scratch(A* row, int64_t x, int64_t count, V value) {
  if constexpr (Part) {
    for (int64_t i = x + Vec<A>::lanes; i < (count + 15) / 16 * 16; i += Vec<A>::lanes) store(row + i, V{});
    value = lanes_within<A>(x, 0, count) ? value : V{};
  } else if (Vec<A>::lanes < 16 && x + Vec<A>::lanes == count) {
    for (int64_t i = count; i < (count + 15) / 16 * 16; i += Vec<A>::lanes) store(row + i, V{});
  }
  store(row + x, value);
}

// Calls f(x, part) for all registers of a row; part is a constant: whether the row ends within the register.
template <typename A, typename F>
EFFOPS_INLINE void for_lanes(int64_t count, const F& f) {
  constexpr int lanes = Vec<A>::lanes;
  int64_t x = 0;
  for (; x + lanes <= count; x += lanes) f(x, std::false_type{});
  if (x < count) f(x, std::true_type{});
}

// ---------------------------------------------------------------------------------------- exp and log

// Horner coefficients of 2^f = 1 + f * polynomial(f), minimax in the relative error: exact at 0.
struct Exp2Above {  // on [0, 1): 1.4e-7 and, short, 2.9e-6
  static constexpr float full[] = {1.867130050e-3f, 9.017030708e-3f, 5.579991266e-2f, 2.401644439e-1f,
                                   6.931512952e-1f};
  static constexpr float brief[] = {1.342668477e-2f, 5.224247277e-2f, 2.412802130e-1f, 6.930448413e-1f};
};
struct Exp2Around {  // on [-1/2, 1/2]: 9.1e-8 and, short, 2.8e-6
  static constexpr float full[] = {1.326472382e-3f, 9.671512991e-3f, 5.550733581e-2f, 2.402224243e-1f,
                                   6.931470037e-1f};
  static constexpr float brief[] = {9.582851082e-3f, 5.590642989e-2f, 2.402409911e-1f, 6.931241751e-1f};
};

template <typename F, typename Polynomial>
EFFOPS_INLINE Vec<float>::type exp2_fraction(Vec<float>::type f) {
  const auto sum = [&](const auto& coefficients) {
    Vec<float>::type p = broadcast(coefficients[0]);
    for (size_t i = 1; i < sizeof(coefficients) / sizeof(float); ++i) p = p * f + coefficients[i];
    return p * f + 1.0f;
  };
  if constexpr (sizeof(F) == 2) return sum(Polynomial::brief);
  return sum(Polynomial::full);
}

// exp(x) for weights x <= 0 of filters that are stored as F: to a thousandth of the rounding of
// half-precision storage, else to 2 ulp. Results below the normal numbers may be 0; NaN stays NaN, exp(-Inf)
// is 0.
template <typename F>
EFFOPS_INLINE typename Vec<accumulator_t<F>>::type exp_weight(typename Vec<accumulator_t<F>>::type x) {
  if constexpr (std::is_same_v<F, double>) {
    return exp<double>(x);
  } else {
    const Vec<float>::type t = x * 1.44269504f;
#if defined(__AVX512F__)
    const Vec<float>::type fraction = _mm512_reduce_ps(t, 1);  // t - floor(t), 0 for infinite t
    return _mm512_scalef_ps(exp2_fraction<F, Exp2Above>(fraction), t);
#else
    const Vec<float>::type near = t < -127.0f ? broadcast(-127.0f) : t > 128.0f ? broadcast(128.0f) : t;
    const Vec<float>::type rounded = near + ExpOf<float>::round, n = rounded - ExpOf<float>::round;
    const auto exponent = reinterpret_cast<Vec<float>::mask>(rounded) -
                          reinterpret_cast<Vec<float>::mask>(broadcast(ExpOf<float>::round));
    // The exponents of -127 and 128 are those of 0 and Inf.
    return exp2_fraction<F, Exp2Around>(near - n) *
           reinterpret_cast<Vec<float>::type>((exponent + 127) << 23);
#endif
  }
}

// log of every lane: 0, Inf and NaN as they should be; negative numbers give NaN.
EFFOPS_INLINE Vec<double>::type log_lanes(Vec<double>::type x) {
  for (int i = 0; i < Vec<double>::lanes; ++i) x[i] = __builtin_log(x[i]);
  return x;
}
EFFOPS_INLINE Vec<float>::type log_lanes(Vec<float>::type x) {
  using V = Vec<float>::type;
  using Bits = Vec<float>::mask;
  // x = 2^n (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2); then the polynomial of Cephes.
  constexpr int32_t kRootHalf = 0x3f3504f3;
  const Bits shifted = reinterpret_cast<Bits>(x) - kRootHalf;
  const V n = __builtin_convertvector(shifted >> 23, V);
  const V f = reinterpret_cast<V>((shifted & 0x007fffff) + kRootHalf) - 1.0f;
  constexpr float kPolynomial[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                   -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                   2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  V p = broadcast(kPolynomial[0]);
  for (int i = 1; i < 9; ++i) p = p * f + kPolynomial[i];
  const V small = p * f * (f * f) - 0.5f * (f * f) + n * ExpOf<float>::ln2_low;
  const V result = n * ExpOf<float>::ln2_high + (f + small);
  constexpr float kInfinity = __builtin_inff();
  const V special = x == 0.0f  ? broadcast(-kInfinity)
                    : x > 0.0f ? broadcast(kInfinity)
                               : broadcast(__builtin_nanf(""));
  return (x > 0.0f) & (x < kInfinity) ? result : special;
}

}  // namespace
}  // namespace effops::localfilter
