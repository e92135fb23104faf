// Lets one source file serve nvcc, the plain host compiler and the CUDA host simulator.
//
//   EFFOPS_HD       a function that host and device code share (scalar maths in *_math.h)
//   EFFOPS_DEVICE   a function that only kernels call (it may use warp intrinsics)
//
// Kernel bodies (*_kernels.cuh) include this header and nothing from CUDA, so that the simulator
// (python_tests/native/cuda_on_host.h) can run them under g++ with the sanitizers.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define EFFOPS_HD __host__ __device__ __forceinline__
#define EFFOPS_DEVICE __device__ __forceinline__
// Dynamic shared memory of a kernel, as an array of `type` aligned to 16 bytes.
#define EFFOPS_DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char effops_shared_bytes[]; \
  type* name = reinterpret_cast<type*>(effops_shared_bytes)
// A shared array `type name[count]` aligned to 16 bytes, at the start of a block's scope. For more
// dimensions let `type` be an alias of an array type.
#define EFFOPS_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#else
#define EFFOPS_HD __attribute__((always_inline)) inline
#if defined(EFFOPS_SIMULATOR_LARGE)
// Of a driver whose kernels would take minutes to compile. The race detector does not see that shared memory
// takes what such a function returns: kernels put it into a variable first.
#define EFFOPS_DEVICE inline
#else
#define EFFOPS_DEVICE __attribute__((always_inline)) inline
#endif
#if defined(EFFOPS_SIMULATOR)
#include "cuda_on_host.h"  // defines EFFOPS_DYNAMIC_SHARED, EFFOPS_SHARED and the CUDA keywords
#endif
#endif
