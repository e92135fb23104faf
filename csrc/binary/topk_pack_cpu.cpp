// topk_pack on the CPU: checks, tasks. The kernels are in topk_pack_cpu_kernel.cpp.
#include "../common/dtype_switch.h"
#include "../common/parallel.h"
#include "topk_pack.h"
#include "topk_pack_cpu_kernel.h"

namespace effops::binary {
namespace {

constexpr int64_t kGrain = 8192;  // elements per task, at least

Tensor topk_pack(const Tensor& x,  // [..., M]
                 int64_t k) {
  check_topk_pack(x, k);
  const int64_t length = x.size(x.dim() - 1), words = words_of(length);
  Tensor output = empty_of(x, sizes_with_last(x, words), ScalarType::Long);
  if (output.numel() == 0) return output;
  const Tensor input = as_contiguous(x);
  const auto pack = topk_pack_kernels().pack[static_cast<int>(float_type_of(x.scalar_type()))];
  const auto* data = static_cast<const char*>(input.const_data_ptr());
  const int64_t row_bytes = length * static_cast<int64_t>(x.element_size());
  auto* out = static_cast<uint64_t*>(output.mutable_data_ptr());
  parallel_for(rows_of(x), kGrain / length + 1, [&](int64_t begin, int64_t end) {
    pack(data + begin * row_bytes, end - begin, length, k, out + begin * words);
  });
  return output;
}

}  // namespace
}  // namespace effops::binary

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) { m.impl("topk_pack", TORCH_BOX(&effops::binary::topk_pack)); }
