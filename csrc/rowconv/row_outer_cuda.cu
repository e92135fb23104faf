// Launches of the kernels for gradients of weights and biases.
#include "row_gemm_cuda.cuh"

namespace effops::rowconv {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool has_tensor_cores(const Tensor& tensor) {
  int major = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device_index()));
  return major >= 8;
}

template <typename T>
Tensor new_parts(const Tensor& like, int64_t elements) {
  return empty_of(like, {elements}, sizeof(accumulator_t<T>) == 8 ? ScalarType::Double : ScalarType::Float);
}

template <typename T, typename Engine>
void launch_outer(const CudaScope& scope, const RowOuter<T>& outer) {
  const OuterTiling tiling =
      make_outer_tiling<Engine>(outer.branches.taps, outer.groups, outer.outputs, outer.inputs, outer.splits);
  scope.launch(&row_outer_kernel<T, Engine>, tiling.works, Engine::kThreads, sizeof(OuterShared<T, Engine>),
               outer, tiling);
}

template <typename T>
void launch_weights(const CudaScope& scope, const Tensor& like, const RowOuter<T>& outer, bool wide) {
  if (takes_direct_kernel(outer.groups, outer.inputs, outer.outputs)) {
    const int64_t weights = int64_t{outer.groups} * outer.outputs * outer.inputs;
    scope.launch(&row_outer_direct_kernel<T>,
                 divide_up(outer.splits * outer.branches.taps * weights, kOuterThreads), kOuterThreads, 0,
                 outer);
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (has_tensor_cores(like)) {
      if (wide) return launch_outer<T, TensorOuter<4>>(scope, outer);
      return launch_outer<T, TensorOuter<2>>(scope, outer);
    }
  }
  launch_outer<T, ScalarOuter<T>>(scope, outer);
}

template <typename T>
void sum_weights(const CudaScope& scope, const Tensor& like, RowOuter<T> outer,
                 const WeightGradients<T>& gradients) {
  const bool wide = outer.outputs > 64 || outer.inputs > 64;
  const int64_t tile = wide && sizeof(T) == 2 ? 128 : 64;
  const int64_t tiles = divide_up(outer.outputs, tile) * divide_up(outer.inputs, tile) * outer.groups;
  outer.splits = outer_splits(outer.rows, tiles * outer.branches.taps);
  const int64_t outputs = int64_t{outer.groups} * outer.outputs;
  const int64_t elements = outer.branches.taps * outputs * outer.inputs;
  if (elements == 0) return;
  const Tensor parts = new_parts<T>(like, outer.splits * elements);
  outer.parts = static_cast<accumulator_t<T>*>(parts.mutable_data_ptr());
  launch_weights(scope, like, outer, wide);
  WeightSums<T> sums{};
  sums.branches = outer.branches;
  std::copy(gradients.weight, gradients.weight + kMaxBranches, sums.weight);
  sums.outputs = outputs;
  sums.inputs = outer.inputs;
  sums.splits = outer.splits;
  sums.parts = outer.parts;
  scope.launch(&sum_weights_kernel<T>, divide_up(elements, kWeightThreads), kWeightThreads, 0, sums);
}

template <typename T>
void sum_biases(const CudaScope& scope, const Tensor& like, RowOuter<T> outer,
                const WeightGradients<T>& gradients) {
  const int64_t outputs = int64_t{outer.groups} * outer.outputs, branches = outer.branches.count;
  const int64_t strips = divide_up(outputs, kWarpSize);
  if (outputs == 0) return;
  outer.splits = outer_splits(outer.rows, branches * strips);
  const Tensor parts = new_parts<T>(like, outer.splits * branches * outputs);
  outer.bias_parts = static_cast<accumulator_t<T>*>(parts.mutable_data_ptr());
  scope.launch(&row_bias_kernel<T>, outer.splits * branches * strips, kOuterThreads, 0, outer);
  BiasSums<T> sums{};
  std::copy(gradients.bias, gradients.bias + kMaxBranches, sums.bias);
  sums.branches = outer.branches.count;
  sums.outputs = outputs;
  sums.splits = outer.splits;
  sums.parts = outer.bias_parts;
  scope.launch(&sum_biases_kernel<T>, divide_up(branches * outputs, kWeightThreads), kWeightThreads, 0, sums);
}

}  // namespace

template <typename T>
void run_row_outer(const CudaScope& scope, const Tensor& like, RowOuter<T> outer,
                   const WeightGradients<T>& gradients) {
  if (gradients.weight[0] != nullptr) sum_weights(scope, like, outer, gradients);
  if (gradients.bias[0] != nullptr) sum_biases(scope, like, outer, gradients);
}

template void run_row_outer(const CudaScope&, const Tensor&, RowOuter<float>, const WeightGradients<float>&);
template void run_row_outer(const CudaScope&, const Tensor&, RowOuter<double>,
                            const WeightGradients<double>&);
template void run_row_outer(const CudaScope&, const Tensor&, RowOuter<bf16>, const WeightGradients<bf16>&);
template void run_row_outer(const CudaScope&, const Tensor&, RowOuter<f16>, const WeightGradients<f16>&);

}  // namespace effops::rowconv
