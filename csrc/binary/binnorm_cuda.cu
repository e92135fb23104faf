// binnorm on CUDA: arguments, grids, launches.
#include "../common/cuda_launch.cuh"
#include "../common/dtype_switch.h"
#include "binnorm.h"
#include "binnorm_kernels.cuh"

namespace effops::binary {
namespace {

template <typename T>
void run_forward(const Tensor& x, int64_t k, const Tensor& output) {
  const CudaScope scope(x);
  const int64_t rows = rows_of(x), length = x.size(x.dim() - 1);
  choose_row_threads(length, [&](auto group, auto per_thread) {
    using Group = decltype(group);
    scope.launch(&binnorm_kernel<T, Group, decltype(per_thread)::value>, row_blocks<Group>(rows), kRowThreads,
                 0, static_cast<const T*>(x.const_data_ptr()), rows, length, k,
                 static_cast<T*>(output.mutable_data_ptr()));
  });
}

template <typename T>
void run_backward(const Tensor& grad_output, const Tensor& output, const Tensor& grad_x) {
  const CudaScope scope(output);
  const int64_t rows = rows_of(output), length = output.size(output.dim() - 1);
  choose_row_threads(length, [&](auto group, auto per_thread) {
    using Group = decltype(group);
    scope.launch(&binnorm_backward_kernel<T, Group, decltype(per_thread)::value>, row_blocks<Group>(rows),
                 kRowThreads, 0, static_cast<const T*>(grad_output.const_data_ptr()),
                 static_cast<const T*>(output.const_data_ptr()), rows, length,
                 static_cast<T*>(grad_x.mutable_data_ptr()));
  });
}

Tensor binnorm(const Tensor& x,  // [..., M]
               int64_t k) {
  check_binnorm(x, k);
  const Tensor output = empty_of(x, sizes_with_last(x, x.size(x.dim() - 1)));
  if (output.numel() == 0) return output;
  const Tensor input = as_contiguous(x);
  dispatch_floating("binnorm", "x", x.scalar_type(),
                    [&](auto tag) { run_forward<typename decltype(tag)::type>(input, k, output); });
  return output;
}

Tensor binnorm_backward(const Tensor& grad_output,  // [..., M]
                        const Tensor& output) {     // [..., M]
  check_binnorm_grad(grad_output, output);
  const Tensor grad_x = empty_of(output, sizes_with_last(output, output.size(output.dim() - 1)));
  if (grad_x.numel() == 0) return grad_x;
  const Tensor gradient = as_contiguous(grad_output), y = as_contiguous(output);
  dispatch_floating("binnorm_backward", "output", output.scalar_type(),
                    [&](auto tag) { run_backward<typename decltype(tag)::type>(gradient, y, grad_x); });
  return grad_x;
}

}  // namespace
}  // namespace effops::binary

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("binnorm", TORCH_BOX(&effops::binary::binnorm));
  m.impl("binnorm_backward", TORCH_BOX(&effops::binary::binnorm_backward));
}
