// What the CPU kernels of this engine do to the lanes of a register. Included by ISA files only.
#pragma once

#include "../common/exp_lanes.h"

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

}  // namespace
}  // namespace effops::localfilter
