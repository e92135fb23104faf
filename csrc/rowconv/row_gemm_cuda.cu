// Launches of the kernels over sparse rows.
#include "row_gemm_cuda.cuh"

namespace effops::rowconv {
namespace {

constexpr int64_t kWaves = 4;  // of blocks, where the device alone knows how many rows there are

int device_attribute(cudaDeviceAttr attribute, const Tensor& tensor) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, tensor.get_device_index()));
  return value;
}

int64_t most_blocks(const Tensor& like, int64_t blocks_per_multiprocessor) {
  return kWaves * blocks_per_multiprocessor * device_attribute(cudaDevAttrMultiProcessorCount, like);
}

template <typename T, typename Engine>
void launch_gemm(const CudaScope& scope, const Tensor& like, const RowGemm<T>& gemm) {
  const GemmTiling tiling = make_gemm_tiling<Engine>(gemm.rows, gemm.groups, gemm.columns);
  if (tiling.works == 0) return;
  const int64_t most = gemm.count == nullptr ? INT32_MAX : most_blocks(like, Engine::kBlocks);
  scope.launch(&row_gemm_kernel<T, Engine>, std::min(tiling.works, most), Engine::kThreads,
               sizeof(GemmShared<T, Engine>), gemm, tiling);
}

template <typename T>
void launch_tiles(const CudaScope& scope, const Tensor& like, const RowGemm<T>& gemm) {
  if constexpr (sizeof(T) == 2) {
    if (device_attribute(cudaDevAttrComputeCapabilityMajor, like) >= 8) {
      if (gemm.columns <= 32) return launch_gemm<T, TensorEngine<1>>(scope, like, gemm);
      if (gemm.columns <= 64) return launch_gemm<T, TensorEngine<2>>(scope, like, gemm);
      return launch_gemm<T, TensorEngine<4>>(scope, like, gemm);
    }
  }
  launch_gemm<T, ScalarEngine<T>>(scope, like, gemm);
}

template <typename T>
void launch_direct(const CudaScope& scope, const Tensor& like, const RowGemm<T>& gemm) {
  constexpr int64_t kBlocks = 8;  // of a multiprocessor
  const int64_t octets = (gemm.channels() + kDirectChannels - 1) / kDirectChannels;
  const int64_t works = (gemm.rows * octets + kDirectThreads - 1) / kDirectThreads;
  if (works == 0) return;
  const int64_t most = gemm.count == nullptr ? INT32_MAX : most_blocks(like, kBlocks);
  scope.launch(&row_direct_kernel<T>, std::min(works, most), kDirectThreads, 0, gemm);
}

}  // namespace

template <typename T>
void run_row_gemm(const CudaScope& scope, const Tensor& like, RowGemm<T> gemm, WeightPack<T> pack) {
  pack.branches = gemm.branches;
  pack.groups = gemm.groups;
  gemm.depth = static_cast<int32_t>(pack.depth());
  gemm.columns = static_cast<int32_t>(pack.columns());
  const bool direct = takes_direct_kernel(gemm.groups, gemm.depth, gemm.columns);
  pack.padded_depth = padded_depth(gemm.depth, sizeof(T), direct);
  gemm.padded_depth = static_cast<int32_t>(pack.padded_depth);
  const Tensor packed = empty_of(like, {gemm.branches.taps * gemm.channels(), gemm.padded_depth});
  const Tensor flags = empty_of(like, {kFlagBlocks}, ScalarType::Int);
  gemm.weights = static_cast<T*>(packed.mutable_data_ptr());
  gemm.not_finite = flags.mutable_data_ptr<int32_t>();
  scope.launch(&pack_weights_kernel<T>, kFlagBlocks, kWeightThreads, 0, pack,
               static_cast<T*>(packed.mutable_data_ptr()), flags.mutable_data_ptr<int32_t>());
  if (direct) {
    launch_direct(scope, like, gemm);
  } else {
    launch_tiles(scope, like, gemm);
  }
}

template void run_row_gemm(const CudaScope&, const Tensor&, RowGemm<float>, WeightPack<float>);
template void run_row_gemm(const CudaScope&, const Tensor&, RowGemm<double>, WeightPack<double>);
template void run_row_gemm(const CudaScope&, const Tensor&, RowGemm<bf16>, WeightPack<bf16>);
template void run_row_gemm(const CudaScope&, const Tensor&, RowGemm<f16>, WeightPack<f16>);

}  // namespace effops::rowconv
