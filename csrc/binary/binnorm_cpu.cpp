// binnorm on the CPU: checks, tasks. The kernels are in binnorm_cpu_kernel.cpp.
#include "../common/dtype_switch.h"
#include "../common/parallel.h"
#include "binnorm.h"
#include "binnorm_cpu_kernel.h"

namespace effops::binary {
namespace {

constexpr int64_t kGrain = 4096;  // elements per task, at least

// Calls f(byte offset of the first row, rows) on pieces of the rows of a tensor that is not empty.
template <typename F>
void for_rows(const Tensor& tensor, const F& f) {
  const int64_t length = tensor.size(tensor.dim() - 1);
  const int64_t row_bytes = length * static_cast<int64_t>(tensor.element_size());
  parallel_for(rows_of(tensor), kGrain / length + 1,
               [&](int64_t begin, int64_t end) { f(begin * row_bytes, end - begin); });
}

Tensor binnorm(const Tensor& x,  // [..., M]
               int64_t k) {
  check_binnorm(x, k);
  const int64_t length = x.size(x.dim() - 1);
  Tensor output = empty_of(x, sizes_with_last(x, length));
  if (output.numel() == 0) return output;
  const Tensor input = as_contiguous(x);
  const auto forward = binnorm_kernels().forward[static_cast<int>(float_type_of(x.scalar_type()))];
  const auto* data = static_cast<const char*>(input.const_data_ptr());
  auto* out = static_cast<char*>(output.mutable_data_ptr());
  for_rows(output,
           [&](int64_t offset, int64_t rows) { forward(data + offset, rows, length, k, out + offset); });
  return output;
}

Tensor binnorm_backward(const Tensor& grad_output,  // [..., M]
                        const Tensor& output) {     // [..., M]
  check_binnorm_grad(grad_output, output);
  const int64_t length = output.size(output.dim() - 1);
  Tensor grad_x = empty_of(output, sizes_with_last(output, length));
  if (grad_x.numel() == 0) return grad_x;
  const Tensor gradient = as_contiguous(grad_output), y = as_contiguous(output);
  const auto backward = binnorm_kernels().backward[static_cast<int>(float_type_of(y.scalar_type()))];
  const auto* grad = static_cast<const char*>(gradient.const_data_ptr());
  const auto* values = static_cast<const char*>(y.const_data_ptr());
  auto* out = static_cast<char*>(grad_x.mutable_data_ptr());
  for_rows(grad_x, [&](int64_t offset, int64_t rows) {
    backward(grad + offset, values + offset, rows, length, out + offset);
  });
  return grad_x;
}

}  // namespace
}  // namespace effops::binary

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("binnorm", TORCH_BOX(&effops::binary::binnorm));
  m.impl("binnorm_backward", TORCH_BOX(&effops::binary::binnorm_backward));
}
