// What the convolutions over the kept positions of a mask need on CUDA. Nothing here waits for the device.
#pragma once

#include "../common/cuda_launch.cuh"

namespace effops::rowconv {

// The kept positions of a mask where only the device knows how many they are.
struct DevicePlan {
  Tensor positions;  // [N * Ho * Wo] int64, of which the first `kept` are written
  Tensor rows;       // [N, Ho, Wo] int64, -1 where skipped
  Tensor kept;       // [1] int64
};

DevicePlan make_device_plan(const CudaScope& scope, const Tensor& mask);

// [N, Ho, Wo] int64: the row of the nearest kept position of the same image, the position's own row where it
// is kept, -1 where the image has none. `rows` as in a plan.
Tensor nearest_rows(const CudaScope& scope, const Tensor& rows);

}  // namespace effops::rowconv
