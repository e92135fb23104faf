// pack_bits and unpack_bits on CUDA: arguments, grids, launches.
#include "../common/cuda_launch.cuh"
#include "../common/dtype_switch.h"
#include "pack_bits.h"
#include "pack_bits_kernels.cuh"

namespace effops::binary {
namespace {

template <typename T>
void run_pack(const Tensor& x, const BitRows& shape, const Tensor& output) {
  const CudaScope scope(x);
  scope.launch(&pack_bits_kernel<T>, pack_blocks(shape.rows * shape.words), kPackThreads, 0,
               static_cast<const T*>(x.const_data_ptr()), shape.rows, shape.bits, shape.words,
               static_cast<uint64_t*>(output.mutable_data_ptr()));
}

Tensor pack_bits(const Tensor& x) {  // [..., M]
  check_pack_bits(x);
  const int64_t length = x.size(x.dim() - 1);
  const Tensor output = empty_of(x, sizes_with_last(x, words_of(length)), ScalarType::Long);
  if (output.numel() == 0) return output;
  const Tensor input = as_contiguous(x);
  const BitRows shape = BitRows::of(rows_of(x), length);
  if (!is_floating(x.scalar_type())) {
    run_pack<uint8_t>(input, shape, output);
  } else {
    dispatch_floating("pack_bits", "x", x.scalar_type(),
                      [&](auto tag) { run_pack<typename decltype(tag)::type>(input, shape, output); });
  }
  return output;
}

Tensor unpack_bits(const Tensor& packed,  // [..., W]
                   int64_t num_bits) {
  check_unpack_bits(packed, num_bits);
  const Tensor output = empty_of(packed, sizes_with_last(packed, num_bits), ScalarType::Bool);
  if (output.numel() == 0) return output;
  const Tensor input = as_contiguous(packed);
  const CudaScope scope(input);
  const int64_t stride = input.size(input.dim() - 1) * static_cast<int64_t>(input.element_size());
  const int64_t rows = rows_of(packed);
  scope.launch(num_bits % 8 == 0 ? &unpack_bits_kernel<true> : &unpack_bits_kernel<false>,
               unpack_blocks(rows * ((num_bits + 7) / 8)), kPackThreads, 0,
               static_cast<const uint8_t*>(input.const_data_ptr()), stride, rows, num_bits,
               static_cast<uint8_t*>(output.mutable_data_ptr()));
  return output;
}

}  // namespace
}  // namespace effops::binary

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("pack_bits", TORCH_BOX(&effops::binary::pack_bits));
  m.impl("unpack_bits", TORCH_BOX(&effops::binary::unpack_bits));
}
