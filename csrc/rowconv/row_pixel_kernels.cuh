// What the convolutions of chosen pixels do beside the products: fills, copies, gradients of masks. No torch,
// no launches.
//
// The kernels go over all elements of maps, or of rows, a thread each, in the order of the map's memory.
#pragma once

#include "../common/warp.h"
#include "row_gemm.cuh"

namespace effops::rowconv {

constexpr int kElementThreads = 256;

inline int64_t element_blocks(int64_t elements) { return (elements + kElementThreads - 1) / kElementThreads; }

// Calls f(row, channel) for all elements, by all threads of a grid of any size; neighbours in memory follow
// each other where the rows are cells of the layout.
template <typename F>
EFFOPS_DEVICE void for_own_elements(const MapLayout& layout, int64_t rows, int64_t channels, const F& f) {
  const int64_t step = int64_t{gridDim.x} * kElementThreads;
  for (int64_t i = int64_t{blockIdx.x} * kElementThreads + threadIdx.x; i < rows * channels; i += step) {
    if (layout.channel_stride == 1) {
      f(i / channels, i % channels);
    } else {
      // Image after image, channel after channel: rows of several images are close enough to that.
      f(i % rows, i / rows);
    }
  }
}

template <typename T>
EFFOPS_DEVICE accumulator_t<T> factor_at(const void* scale, bool is_float, int64_t cell) {
  if (is_float) return static_cast<accumulator_t<T>>(static_cast<const float*>(scale)[cell]);
  return widen(static_cast<const T*>(scale)[cell]);
}

// ------------------------------------------------------------------------------------------- filling

template <typename T>
struct FillArguments {
  const int64_t* rows;  // [cells]: negative where the cell is skipped
  int64_t cells, channels;
  T* output;
  MapLayout layout;
  bool clears_kept;  // kept cells get 0
  const void* scale;  // kept cells are multiplied by it, or null
  bool scale_is_float;
  bool fills_skipped;  // else they stay
  const T* base;  // what skipped cells get, or null: 0
  MapLayout base_layout;
  const int64_t* nearest;  // row of the kept cell that a skipped one copies, or null
  const int64_t* positions;  // [capacity]: cell of each row
  int64_t capacity;

  // The kept cell that a skipped one copies, -1: none, or a plan that does not fit.
  EFFOPS_DEVICE int64_t nearest_cell(int64_t cell) const {
    const int64_t row = nearest == nullptr ? -1 : nearest[cell];
    if (row < 0 || row >= capacity) return -1;
    return positions[row] >= 0 && positions[row] < cells ? positions[row] : -1;
  }
};

// Bytes: 8 B per element of `rows`, from the caches, and the elements that are written; bound by bandwidth.
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    fill_pixels_kernel(const __grid_constant__ FillArguments<T> fill) {
  for_own_elements(fill.layout, fill.cells, fill.channels, [&](int64_t cell, int64_t channel) {
    T& element = fill.output[fill.layout.offset(cell) + channel * fill.layout.channel_stride];
    if (fill.rows[cell] >= 0) {
      if (fill.clears_kept) element = T{};
      if (fill.scale != nullptr) {
        element = narrow<T>(widen(element) * factor_at<T>(fill.scale, fill.scale_is_float, cell));
      }
      return;
    }
    if (!fill.fills_skipped) return;
    T value{};
    if (fill.base != nullptr) {
      value = fill.base[fill.base_layout.offset(cell) + channel * fill.base_layout.channel_stride];
    }
    if (const int64_t source = fill.nearest_cell(cell); source >= 0) {
      value = fill.output[fill.layout.offset(source) + channel * fill.layout.channel_stride];
    }
    element = value;
  });
}

// ------------------------------------------------------------------------------------------ gradients

// The gradient that reaches kept positions.
template <typename T>
struct ReachingGradient {
  const T* grad;  // [N, Co, Ho, Wo]
  MapLayout layout;
  int64_t cells;  // of all maps
  const int64_t* positions;  // cell of each row; those beyond the cells have no gradient
  int64_t rows, channels;
  const int64_t* count;  // rows that exist, or null
  const int64_t* copy_offsets;  // [rows + 1], or null: nothing copies a position
  const int64_t* copies;  // the cells that are copies of each row, and its own, ascending

  EFFOPS_DEVICE int64_t existing_rows() const { return count == nullptr ? rows : min(*count, rows); }
  EFFOPS_DEVICE bool exists(int64_t row) const { return positions[row] >= 0 && positions[row] < cells; }

  EFFOPS_DEVICE accumulator_t<T> at(int64_t row, int64_t channel) const {
    const auto of_cell = [&](int64_t cell) {
      return widen(grad[layout.offset(cell) + channel * layout.channel_stride]);
    };
    if (!exists(row)) return 0;
    if (copy_offsets == nullptr) return of_cell(positions[row]);
    accumulator_t<T> sum = 0;
    for (int64_t i = copy_offsets[row]; i < copy_offsets[row + 1]; ++i) sum += of_cell(copies[i]);
    return sum;
  }
};

// result[row][channel] = the gradient that reaches the row, times its mask. Bytes: the gradient of kept
// positions and of their copies, and the rows; bound by bandwidth, from NCHW by whole sectors per element.
template <typename T>
__global__ void __launch_bounds__(kElementThreads, 4)
    reaching_gradient_kernel(const __grid_constant__ ReachingGradient<T> reaching, const void* scale,
                             bool scale_is_float, T* result) {
  const int64_t rows = reaching.existing_rows();
  for_own_elements(reaching.layout, rows, reaching.channels, [&](int64_t row, int64_t channel) {
    accumulator_t<T> value = reaching.at(row, channel);
    if (scale != nullptr && reaching.exists(row))
      value *= factor_at<T>(scale, scale_is_float, reaching.positions[row]);
    result[row * reaching.channels + channel] = narrow<T>(value);
  });
}

// grad_mask[positions[row]] = sum over channels of product[row] * the gradient that reaches the row. A warp
// per row. Bytes: as reaching_gradient_kernel, and the products.
template <typename T>
__global__ void __launch_bounds__(kElementThreads, 4)
    mask_gradient_kernel(const __grid_constant__ ReachingGradient<T> reaching,
                         const accumulator_t<T>* products, void* grad_mask, bool mask_is_float) {
  constexpr int kWarps = kElementThreads / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t rows = reaching.existing_rows(), step = int64_t{gridDim.x} * kWarps;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize; row < rows; row += step) {
    accumulator_t<T> sum = 0;
    for (int64_t channel = lane; channel < reaching.channels; channel += kWarpSize) {
      sum += products[row * reaching.channels + channel] * reaching.at(row, channel);
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
    if (lane != 0 || !reaching.exists(row)) continue;
    if (mask_is_float) {
      static_cast<float*>(grad_mask)[reaching.positions[row]] = static_cast<float>(sum);
    } else {
      static_cast<T*>(grad_mask)[reaching.positions[row]] = narrow<T>(sum);
    }
  }
}

// -------------------------------------------------------------------------------------------- choices

// The cells of one branch, ascending, and their number: a scan (scan_kernels.cuh).
struct ChoiceSource {
  IdMap choice;
  int64_t branch;

  EFFOPS_DEVICE int64_t count(int64_t cell) const { return choice.at(cell) == branch; }
};

struct ChoiceSink {
  int64_t* positions;
  int64_t* kept;

  EFFOPS_DEVICE void put(int64_t cell, int64_t before, int64_t count) const {
    if (count != 0) positions[before] = cell;
  }
  EFFOPS_DEVICE void finish(int64_t total) const { *kept = total; }
};

template <typename T>
struct CopyArguments {
  IdMap choice;  // [cells]
  int64_t cells, channels;
  uint32_t identity, convolved;  // bit per branch
  const T* input;
  MapLayout input_layout;
  T* output;
  MapLayout layout;
  bool clears_convolved;  // else they stay
};

// Cells of identity branches become copies of the input, those of no branch 0. Bytes: the input and the
// output once, the choices from the caches; bound by bandwidth.
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    copy_identity_kernel(const __grid_constant__ CopyArguments<T> copy) {
  for_own_elements(copy.layout, copy.cells, copy.channels, [&](int64_t cell, int64_t channel) {
    const int64_t branch = copy.choice.at(cell);
    const uint32_t bit = branch >= 0 && branch < kMaxBranches ? 1u << branch : 0u;
    T value{};
    if ((copy.identity & bit) != 0) {
      value = copy.input[copy.input_layout.offset(cell) + channel * copy.input_layout.channel_stride];
    } else if ((copy.convolved & bit) != 0 && !copy.clears_convolved) {
      return;
    }
    copy.output[copy.layout.offset(cell) + channel * copy.layout.channel_stride] = value;
  });
}

}  // namespace effops::rowconv
