// What both directions of mean_shift on CUDA share: from tensors to a call, and where it runs.
#pragma once

#include <vector>

#include "../common/cuda_launch.cuh"
#include "mean_shift.h"
#include "mean_shift_plan.cuh"

namespace effops::pairwise {

// See mean_shift_plan.cuh. Memory lives as long as this.
class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& like) : scope_(like), like_(like) {
    multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    has_tensor_cores = attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
  }

  template <typename U>
  U* allocate(int64_t count, bool zeros) {
    const std::vector<int64_t> sizes{count * static_cast<int64_t>(sizeof(U))};
    memory_.push_back(zeros ? zeros_of(like_, sizes, ScalarType::Byte)
                            : empty_of(like_, sizes, ScalarType::Byte));
    return static_cast<U*>(memory_.back().mutable_data_ptr());
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t works, int threads, int64_t shared_bytes,
              const Arguments&... arguments) const {
    scope_.launch(kernel, works, threads, shared_bytes, arguments...);
  }

  int64_t multiprocessors = 0;
  bool has_tensor_cores = false;

 private:
  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, like_.get_device_index()));
    return value;
  }

  CudaScope scope_;
  Tensor like_;
  std::vector<Tensor> memory_;
};

// Contiguous inputs of either direction.
struct MeanShiftInputs {
  MeanShiftShape shape;
  Tensor x;
  std::optional<Tensor> weights, seeds, kappa;

  template <typename T>
  MeanShiftCall<T> call() const {
    MeanShiftCall<T> call{};
    call.batch = shape.batch;
    call.points = shape.points;
    call.rows = shape.rows;
    call.channels = shape.channels;
    call.iterations = shape.iterations;
    call.x = static_cast<const T*>(x.const_data_ptr());
    call.weights = data<T>(weights);
    call.seeds = data<T>(seeds);
    call.kappa = shape.kappa;
    if (kappa.has_value() && kappa->is_cpu()) {
      call.kappa = *data<T>(kappa);
    } else {
      call.kappa_tensor = data<T>(kappa);
    }
    call.eta = shape.eta;
    call.tol = shape.tol;
    call.precision = shape.precision;
    return call;
  }

 private:
  template <typename T>
  static const T* data(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
  }
};

inline MeanShiftInputs make_inputs(const MeanShiftShape& shape, const Tensor& x,
                                   const std::optional<Tensor>& weights, const std::optional<Tensor>& seeds,
                                   const std::optional<Tensor>& kappa) {
  const auto contiguous = [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional<Tensor>(as_contiguous(*tensor)) : tensor;
  };
  return {shape, as_contiguous(x), contiguous(weights), contiguous(seeds), contiguous(kappa)};
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

}  // namespace effops::pairwise
