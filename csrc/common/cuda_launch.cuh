// Launching kernels from torch ops: device, stream, grid, checks.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "torch.h"

namespace effops {

// Makes the device of a tensor current while it lives, and knows torch's current stream there.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Runs `works` pieces of work, one per block; kernels loop over the rest where a grid is too small.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t works, int threads, int64_t shared_bytes,
              const Arguments&... arguments) const {
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(works, INT32_MAX));
    constexpr int64_t kSharedWithoutAsking = 48 * 1024;
    if (shared_bytes > kSharedWithoutAsking) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)));
    }
    kernel<<<blocks, threads, static_cast<size_t>(shared_bytes), stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline bool is_aligned(const Tensor& tensor, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// Contiguous, beginning at a multiple of `bytes`. New tensors begin at multiples of 256.
inline Tensor as_aligned(const Tensor& tensor, uintptr_t bytes) {
  const Tensor result = as_contiguous(tensor);
  return is_aligned(result, bytes) ? result : torch::stable::clone(result);
}

// On the device of `like`, without waiting for it.
inline Tensor on_device_of(const Tensor& like, const Tensor& tensor) {
  if (!tensor.is_cpu()) return tensor;
  return torch::stable::to(tensor, like.device(), /*non_blocking=*/true);
}

}  // namespace effops
