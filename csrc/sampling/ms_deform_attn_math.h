// Sizes of multi-scale deformable attention, free of torch: shared by the CPU kernels, the CUDA
// kernels and the simulator. The sampling maths itself is in bilinear_math.h.
#pragma once

#include <cstdint>

#include "bilinear_math.h"

namespace effops::sampling {

struct MsDeformAttnShape {
  int64_t batch;     // B
  int64_t rows;      // S, rows of value: all pixels of all levels
  int64_t heads;     // M
  int64_t channels;  // D, per head
  int64_t queries;   // Q
  int64_t levels;    // L
  int64_t points;    // P, per level
};

// A level that can be sampled without leaving `rows`; the sizes come from user tensors.
EFFOPS_HD bool is_valid_level(int64_t start, int64_t height, int64_t width, int64_t rows) {
  constexpr int64_t kMaxSide = INT64_C(1) << 24;  // up to here float holds every pixel coordinate exactly
  return height > 0 && width > 0 && height < kMaxSide && width < kMaxSide && start >= 0 && start <= rows &&
         height <= (rows - start) / width;
}

}  // namespace effops::sampling
