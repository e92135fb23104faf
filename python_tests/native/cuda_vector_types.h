// CUDA's short vectors with their alignment, which UBSan checks at every access.
#pragma once

#include "fibers.h"  // uint3

#define EFFOPS_VECTOR2(name, type)                           \
  struct alignas(2 * sizeof(type)) name {                    \
    type x, y;                                               \
  };                                                         \
  inline name make_##name(type x, type y) { return {x, y}; }
#define EFFOPS_VECTOR3(name, type)                                      \
  struct name {                                                         \
    type x, y, z;                                                       \
  };                                                                    \
  inline name make_##name(type x, type y, type z) { return {x, y, z}; }
#define EFFOPS_VECTOR4(name, type)                                                 \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name {             \
    type x, y, z, w;                                                               \
  };                                                                               \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

EFFOPS_VECTOR2(char2, signed char)
EFFOPS_VECTOR2(uchar2, unsigned char)
EFFOPS_VECTOR2(short2, short)
EFFOPS_VECTOR2(ushort2, unsigned short)
EFFOPS_VECTOR2(int2, int)
EFFOPS_VECTOR2(uint2, unsigned)
EFFOPS_VECTOR2(longlong2, long long)
EFFOPS_VECTOR2(ulonglong2, unsigned long long)
EFFOPS_VECTOR2(float2, float)
EFFOPS_VECTOR2(double2, double)
EFFOPS_VECTOR3(int3, int)
EFFOPS_VECTOR3(float3, float)
EFFOPS_VECTOR4(char4, signed char)
EFFOPS_VECTOR4(uchar4, unsigned char)
EFFOPS_VECTOR4(short4, short)
EFFOPS_VECTOR4(ushort4, unsigned short)
EFFOPS_VECTOR4(int4, int)
EFFOPS_VECTOR4(uint4, unsigned)
EFFOPS_VECTOR4(float4, float)
EFFOPS_VECTOR4(double4, double)

#undef EFFOPS_VECTOR2
#undef EFFOPS_VECTOR3
#undef EFFOPS_VECTOR4

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
