// Exponentials of numbers <= 0, as weights need them, and logarithms. Included by ISA files only.
#pragma once

#include "simd.h"

namespace effops::simd {
namespace {

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

// exp(x) for x <= 0, of weights that are stored as F: to a thousandth of the rounding of
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
    return _mm512_maskz_scalef_ps(0xffff, exp2_fraction<F, Exp2Above>(fraction), t);
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
}  // namespace effops::simd
