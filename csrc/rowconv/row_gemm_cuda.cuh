// Launches of the kernels over sparse rows, compiled once for all ops (row_gemm_cuda.cu).
#pragma once

#include "../common/check.h"
#include "../common/cuda_launch.cuh"
#include "row_gemm_kernels.cuh"
#include "row_outer_kernels.cuh"
#include "row_setup.h"
#include "row_weights_kernels.cuh"

namespace effops::rowconv {

// What fits the kernels' 32-bit numbers and their parameters.
inline void check_kernel_limits(const char* op, int64_t branches, int64_t taps, int64_t outputs,
                                int64_t inputs) {
  constexpr int64_t kMostProducts = int64_t{1} << 31;
  if (branches > kMaxBranches) {
    fail(op, ": expected at most ", kMaxBranches, " branches on CUDA, got ", branches);
  }
  const int64_t channels = std::max<int64_t>({outputs, inputs, 1});
  if (taps >= kMostProducts / channels) {
    fail(op, ": expected fewer than 2^31 channels times kernel elements on CUDA, got ", channels, " times ",
         taps);
  }
}

// Contiguous rows of `channels`, in groups; all of one matrix.
template <typename T>
OperandRows<T> operand_rows(const Tensor& rows, int64_t channels, int64_t groups) {
  // Depthwise kernels read across groups.
  const int64_t together = groups == channels ? channels : channels / groups;
  return {static_cast<const T*>(rows.const_data_ptr()),
          nullptr,
          INT64_MAX,
          channels,
          0,
          is_aligned(rows, 16) && together * static_cast<int64_t>(sizeof(T)) % 16 == 0};
}

// Fills in the weights and the flags of `gemm` from `pack` and runs it. gemm.branches, groups and all that
// does not come from the weights is set. The weights are contiguous.
template <typename T>
void run_row_gemm(const CudaScope& scope, const Tensor& like, RowGemm<T> gemm, WeightPack<T> pack);

// Where the gradients of the weights and biases of each branch go; null pointers: they are not needed.
template <typename T>
struct WeightGradients {
  T* weight[kMaxBranches];  // all or none
  T* bias[kMaxBranches];
};

// outer.splits and the parts are filled in.
template <typename T>
void run_row_outer(const CudaScope& scope, const Tensor& like, RowOuter<T> outer,
                   const WeightGradients<T>& gradients);

}  // namespace effops::rowconv
