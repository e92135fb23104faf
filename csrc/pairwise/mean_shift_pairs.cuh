// What the kernels on pairs of mean_shift share: their work, arguments and the kernel weight. No torch, no
// launches.
//
//   forward   d_m = sum_j w_j K_mj,  V_m = sum_j w_j K_mj x_j          K_mj = exp(kappa (x_m . x_j - 1))
//   backward  see PairGradient
//
// A block owns a tile of rows m and walks over tiles of columns j, or over a part of them where there are few
// rows: the sums of the parts are added, in a fixed order, by the kernels on rows
// (mean_shift_advance_kernels.cuh and .._retreat_..). Three engines: small (up to 3 channels, in registers),
// tensor (float32, up to 128 channels), scalar (all).
#pragma once

#include "points_kernels.cuh"

namespace effops::pairwise {

constexpr int kWeightThreads = 256;

// What one block does.
struct PairWork {
  int64_t image, row_tile, split;
  int slice;  // of the channels
  int64_t first_tile, end_tile;  // of the columns
};

struct PairTiling {
  int64_t batch, row_tiles, slices, splits;
  int64_t tiles, tiles_each;  // of columns; of a split

  EFFOPS_HD int64_t works() const { return batch * row_tiles * slices * splits; }

  // The row tiles of an image and split are neighbours, so that they find the columns in the caches.
  EFFOPS_DEVICE PairWork work(int64_t index) const {
    PairWork result;
    result.row_tile = index % row_tiles;
    index /= row_tiles;
    result.slice = static_cast<int>(index % slices);
    index /= slices;
    result.split = index % splits;
    result.image = index / splits;
    result.first_tile = result.split * tiles_each;
    result.end_tile = result.first_tile + tiles_each < tiles ? result.first_tile + tiles_each : tiles;
    return result;
  }
};

// A number per padded point: [B, rows], `stride` apart.
template <typename T>
struct PointScalars {
  T* data;
  int64_t rows, stride;

  EFFOPS_DEVICE T& at(int64_t image, int64_t row) const { return data[(image * rows + row) * stride]; }
};

// K of a similarity, which is at most 1. Below the smallest normal number it is 0; NaN stays NaN.
template <typename T>
struct KernelWeight {
  T kappa;
  T scale;  // float: kappa log2(e)

  // tensor: the number on the device, or null. A kappa that is no kappa makes NaN.
  EFFOPS_DEVICE KernelWeight(const T* tensor, double number) {
    const double value = tensor != nullptr ? static_cast<double>(*tensor) : number;
    const bool valid = value >= 0 && is_finite(value);
    kappa = valid ? static_cast<T>(value) : not_a_number<T>();
    scale = kappa;
    if constexpr (sizeof(T) == 4) {
      constexpr float kLog2E = 1.44269504f, kLargest = 3.4028235e38f;
      scale = kappa * kLog2E > kLargest ? kLargest : kappa * kLog2E;
    }
  }

  EFFOPS_DEVICE T operator()(T similarity) const {
    if constexpr (sizeof(T) == 4) {
      return power_of_2(at_most_0(fmaf(similarity, scale, -scale)));
    } else {
      const T weight = exp(similarity > T(1) ? T(0) : kappa * (similarity - T(1)));
      return weight < 2.2250738585072014e-308 ? T(0) : weight;
    }
  }

 private:
  EFFOPS_DEVICE static float at_most_0(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float result;
    asm("min.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(value));
    return result;
#else
    return value > 0 ? 0.0f : value;
#endif
  }

  EFFOPS_DEVICE static float power_of_2(float value) {
#if defined(__CUDACC__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
#else
    const float result = exp2f(value);
    return result < 1.17549435e-38f ? 0.0f : result;
#endif
  }
};

template <typename T>
struct PairArguments {
  PairTiling tiling;
  PaddedPoints<T> rows, columns;
  PointScalars<T> column_weights;  // zeros where there is no point
  const T* kappa_tensor;  // on the device, or null
  double kappa;
  T* sums;  // [splits, B, rows, channels]

  EFFOPS_DEVICE KernelWeight<T> kernel() const { return {kappa_tensor, kappa}; }
  EFFOPS_DEVICE int64_t row_index(const PairWork& work, int64_t row) const {
    return (work.split * tiling.batch + work.image) * rows.rows + row;
  }
};

// An image stops when no row moved further than tol. moved: [B], the bits of the distances.
struct StopRule {
  const unsigned long long* moved;  // null: it goes on
  double tol;

  EFFOPS_DEVICE bool stops(int64_t image) const {
    return moved != nullptr && bit_cast<double>(moved[image]) <= tol;
  }
};

template <typename T>
struct ShiftArguments : PairArguments<T> {
  T* totals;  // d, [splits, B, rows]
  StopRule stop;  // in the iteration before
};

// The gradient of an iteration. Rows, columns or both have moved; those have h and tau (see Retreat).
template <typename T>
struct ShiftGradArguments : PairArguments<T> {
  PaddedPoints<T> row_h, column_h;  // absent where they stood still
  PointScalars<T> row_tau, column_tau, row_weights;  // zeros where absent
  T* weight_sums;  // [splits, B, rows], added to; or null
  double* kappa_sums;  // [works], added to; or null
  bool adds;  // to what the sums hold
  const int64_t* steps;  // [B]: iterations that an image took
  int64_t iteration;

  EFFOPS_DEVICE bool skips(int64_t image) const { return iteration >= steps[image]; }
};

// What a pair passes back to its row i:
//   R = w_i (x_i . h_j - tau_j) + w_j (x_j . h_i - tau_i),  C = kappa K R
//   grad x_i += w_i K h_j + C x_j,  grad w_i += K (x_i . h_j - tau_j),  grad kappa += (S - 1) K R
template <typename T>
struct PairGradient {
  T of_h;  // w_i K
  T of_x;  // C
  T weight, kappa;

  EFFOPS_DEVICE PairGradient(const KernelWeight<T>& kernel, T similarity, T from_column, T from_row,
                             T row_weight, T column_weight) {
    const T value = kernel(similarity);
    const T slope = value * (row_weight * from_column + column_weight * from_row);
    of_h = row_weight * value;
    of_x = kernel.kappa * slope;
    weight = value * from_column;
    kappa = (similarity > T(1) ? T(0) : similarity - T(1)) * slope;
  }
};

// Adds the numbers of all threads, in a fixed order, to *sum. For whole blocks of kThreads.
template <int kThreads>
EFFOPS_DEVICE void add_block(double value, double* sum) {
  EFFOPS_SHARED(double, parts, kThreads / kWarpSize);
  value = add_lanes(value);
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < kThreads / kWarpSize; ++i) total += parts[i];
  *sum += total;
}

// Copies the weights [B, points] (null: ones) of image blockIdx.x, whose padding is zeros. An image whose
// weights have no finite sum is lost. lost: or null.
template <typename T>
__global__ void __launch_bounds__(kWeightThreads)
    copy_weights_kernel(const T* weights, int64_t points, PointScalars<T> padded, int32_t* lost) {
  const int64_t image = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < points; i += kWeightThreads) {
    const T weight = weights != nullptr ? weights[image * points + i] : T(1);
    padded.at(image, i) = weight;
    sum += fabs(static_cast<double>(weight));
  }
  EFFOPS_SHARED(double, parts, kWeightThreads / kWarpSize);
  sum = add_lanes(sum);
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < kWeightThreads / kWarpSize; ++i) total += parts[i];
  if (lost != nullptr && !is_finite(static_cast<T>(total))) atomicOr(lost + image, 1);
}

}  // namespace effops::pairwise
