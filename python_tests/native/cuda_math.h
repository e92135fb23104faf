// CUDA's intrinsic functions on single numbers. The fast ones are as exact as the others here.
#pragma once

#include <math.h>

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>

// ------------------------------------------------------------------------------------------- integers

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __clzll(long long value) { return std::countl_zero(static_cast<unsigned long long>(value)); }
// Position of the lowest set bit, from 1 on; 0 if there is none.
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline unsigned __brev(unsigned value) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (value >> bit & 1) << (31 - bit);
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

// -------------------------------------------------------------------------------------- memory, bits

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline double __longlong_as_double(long long value) { return std::bit_cast<double>(value); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }

// ---------------------------------------------------------------------------------------------- floats

namespace simulator {

// On the device out-of-range values saturate and NaN becomes 0, by definition of the instruction.
inline int to_int(float value) {
  if (!(value == value)) return 0;
  if (value >= 2147483648.0f) return INT32_MAX;
  return value < -2147483648.0f ? INT32_MIN : static_cast<int>(value);
}

}  // namespace simulator

inline int __float2int_rz(float value) { return simulator::to_int(truncf(value)); }
inline int __float2int_rd(float value) { return simulator::to_int(floorf(value)); }
inline int __float2int_ru(float value) { return simulator::to_int(ceilf(value)); }
inline int __float2int_rn(float value) { return simulator::to_int(rintf(value)); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fsqrt_rn(float value) { return sqrtf(value); }
inline float __saturatef(float value) { return value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f; }

// Macros: <math.h> declares functions of these names, or will, with other linkage.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define rsqrtf(x) (1.0f / sqrtf(x))
template <std::floating_point T>
T rsqrt(T value) {
  return T(1) / sqrt(value);
}

// CUDA's overloads, also the mixed ones. Of a number and NaN both choose the number.
#define EFFOPS_MIN_MAX(A, B, Result)                                                 \
  inline Result min(A a, B b) {                                                      \
    return static_cast<Result>(a) < static_cast<Result>(b) ? static_cast<Result>(a)  \
                                                           : static_cast<Result>(b); \
  }                                                                                  \
  inline Result max(A a, B b) {                                                      \
    return static_cast<Result>(a) < static_cast<Result>(b) ? static_cast<Result>(b)  \
                                                           : static_cast<Result>(a); \
  }
EFFOPS_MIN_MAX(int, int, int)
EFFOPS_MIN_MAX(unsigned, unsigned, unsigned)
EFFOPS_MIN_MAX(int, unsigned, unsigned)
EFFOPS_MIN_MAX(unsigned, int, unsigned)
EFFOPS_MIN_MAX(long, long, long)
EFFOPS_MIN_MAX(unsigned long, unsigned long, unsigned long)
EFFOPS_MIN_MAX(long, unsigned long, unsigned long)
EFFOPS_MIN_MAX(unsigned long, long, unsigned long)
EFFOPS_MIN_MAX(long long, long long, long long)
EFFOPS_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
EFFOPS_MIN_MAX(long long, unsigned long long, unsigned long long)
EFFOPS_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef EFFOPS_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }
