// Runs the CUDA kernels of pack_bits and unpack_bits in the simulator, with the launches of
// pack_bits_cuda.cu.
#include <algorithm>

#include "binary/pack_bits_kernels.cuh"
#include "simulate.h"

namespace {

using namespace effops;
using namespace effops::binary;

constexpr int64_t kMaxBlocks = 2;  // fewer than there is work, so that the kernels loop

template <typename Kernel, typename... Arguments>
void launch_few_blocks(Kernel kernel, int64_t works, const Arguments&... arguments) {
  simulator::launch(dim3(static_cast<unsigned>(std::min(works, kMaxBlocks))), dim3(kPackThreads), 0, kernel,
                    arguments...);
}

template <typename T>
void pack(simulator::Call& call) {
  const simulator::Tensor& x = call.tensor("x");  // [rows, bits]
  const int64_t rows = x.size(0), bits = x.size(1), words = (bits + 63) / 64;
  const simulator::Tensor& output = call.output("output", simulator::DType::kInt64, {rows, words});
  launch_few_blocks(&pack_bits_kernel<T>, pack_blocks(rows * words), static_cast<const T*>(x.raw()), rows,
                    bits, words, static_cast<uint64_t*>(output.raw()));
}

void pack_bits(simulator::Call& call) {
  const simulator::DType dtype = call.tensor("x").dtype();
  if (dtype == simulator::DType::kBool || dtype == simulator::DType::kUInt8) return pack<uint8_t>(call);
  simulator::dispatch<float, double, bf16, f16>(dtype,
                                                [&]<typename T>(std::type_identity<T>) { pack<T>(call); });
}

void unpack_bits(simulator::Call& call) {
  const simulator::Tensor& packed = call.tensor("packed");  // [rows, bytes]
  const int64_t rows = packed.size(0), bits = call.integer("num_bits");
  const simulator::Tensor& output = call.output("output", simulator::DType::kBool, {rows, bits});
  launch_few_blocks(bits % 8 == 0 ? &unpack_bits_kernel<true> : &unpack_bits_kernel<false>,
                    unpack_blocks(rows * ((bits + 7) / 8)), packed.data<const uint8_t>(), packed.size(1),
                    rows, bits, static_cast<uint8_t*>(output.raw()));
}

}  // namespace

EFFOPS_SIMULATE("pack_bits", pack_bits)
EFFOPS_SIMULATE("unpack_bits", unpack_bits)
