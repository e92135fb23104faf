// pack_bits and unpack_bits on the CPU: checks, tasks. The kernels are in pack_bits_cpu_kernel.cpp.
#include "../common/dtype_switch.h"
#include "../common/parallel.h"
#include "pack_bits.h"
#include "pack_bits_cpu_kernel.h"

namespace effops::binary {
namespace {

constexpr int64_t kGrain = 512;  // words per task, at least

Tensor pack_bits(const Tensor& x) {  // [..., M]
  check_pack_bits(x);
  const ScalarType dtype = x.scalar_type();
  const int64_t length = x.size(x.dim() - 1);
  const BitRows shape = BitRows::of(rows_of(x), length);
  Tensor output = empty_of(x, sizes_with_last(x, words_of(length)), ScalarType::Long);
  if (output.numel() == 0) return output;
  const Tensor input = as_contiguous(x);
  const auto pack =
      pack_bits_kernels().pack[is_floating(dtype) ? static_cast<int>(float_type_of(dtype)) : kByteType];
  const void* data = input.const_data_ptr();
  auto* out = static_cast<uint64_t*>(output.mutable_data_ptr());
  parallel_for(output.numel(), kGrain,
               [&](int64_t begin, int64_t end) { pack(data, shape.bits, shape.words, begin, end, out); });
  return output;
}

Tensor unpack_bits(const Tensor& packed,  // [..., W]
                   int64_t num_bits) {
  check_unpack_bits(packed, num_bits);
  Tensor output = empty_of(packed, sizes_with_last(packed, num_bits), ScalarType::Bool);
  if (output.numel() == 0) return output;
  const int64_t stride = packed.size(packed.dim() - 1) * static_cast<int64_t>(packed.element_size());
  const int64_t rows = rows_of(packed);
  const BitRows shape = stride * 8 == num_bits ? BitRows::of(rows, num_bits)
                                               : BitRows{rows, num_bits, words_of(num_bits)};
  const Tensor input = as_contiguous(packed);
  const auto* data = static_cast<const uint8_t*>(input.const_data_ptr());
  auto* out = static_cast<uint8_t*>(output.mutable_data_ptr());
  parallel_for(shape.rows * shape.words, kGrain, [&](int64_t begin, int64_t end) {
    pack_bits_kernels().unpack(data, stride, shape.bits, shape.words, begin, end, out);
  });
  return output;
}

}  // namespace
}  // namespace effops::binary

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&effops::binary::pack_bits));
  m.impl("unpack_bits", TORCH_BOX(&effops::binary::unpack_bits));
}
