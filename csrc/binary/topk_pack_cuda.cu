// topk_pack on CUDA: arguments, grids, launches.
#include "../common/cuda_launch.cuh"
#include "../common/dtype_switch.h"
#include "topk_pack.h"
#include "topk_pack_kernels.cuh"

namespace effops::binary {
namespace {

template <typename T>
void run(const Tensor& x, int64_t k, const Tensor& output) {
  const CudaScope scope(x);
  const int64_t rows = rows_of(x), length = x.size(x.dim() - 1);
  const auto* data = static_cast<const T*>(x.const_data_ptr());
  auto* out = static_cast<uint32_t*>(output.mutable_data_ptr());
  choose_row_threads(length, [&](auto group, auto per_thread) {
    using Group = decltype(group);
    if constexpr (Group::threads == kWarpSize) {
      scope.launch(&topk_pack_warp_kernel<T, decltype(per_thread)::value>, row_blocks<Group>(rows),
                   kRowThreads, 0, data, rows, static_cast<int32_t>(length), static_cast<int32_t>(k), out);
    } else {
      scope.launch(&topk_pack_block_kernel<T>, row_blocks<Group>(rows), kRowThreads, 0, data, rows, length, k,
                   out);
    }
  });
}

Tensor topk_pack(const Tensor& x,  // [..., M]
                 int64_t k) {
  check_topk_pack(x, k);
  const Tensor output = empty_of(x, sizes_with_last(x, words_of(x.size(x.dim() - 1))), ScalarType::Long);
  if (output.numel() == 0) return output;
  const Tensor input = as_contiguous(x);
  dispatch_floating("topk_pack", "x", x.scalar_type(),
                    [&](auto tag) { run<typename decltype(tag)::type>(input, k, output); });
  return output;
}

}  // namespace
}  // namespace effops::binary

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) { m.impl("topk_pack", TORCH_BOX(&effops::binary::topk_pack)); }
