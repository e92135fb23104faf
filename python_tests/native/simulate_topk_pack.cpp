// Runs the CUDA kernels of topk_pack in the simulator, with the launches of topk_pack_cuda.cu.
#include "binary/topk_pack_kernels.cuh"
#include "simulate_rows.h"

namespace {

using namespace effops;
using namespace effops::binary;

template <typename T>
void run(simulator::Call& call) {
  const simulator::Tensor& x = call.tensor("x");  // [rows, length]
  const int64_t rows = x.size(0), length = x.size(1), k = call.integer("k");
  auto* out = static_cast<uint32_t*>(
      call.output("output", simulator::DType::kInt64, {rows, (length + 63) / 64}).raw());
  choose_row_threads(length, [&](auto group, auto per_thread) {
    using Group = decltype(group);
    if constexpr (Group::threads == kWarpSize) {
      simulator::launch_rows<Group>(&topk_pack_warp_kernel<T, decltype(per_thread)::value>, rows,
                                    x.data<const T>(), rows, static_cast<int32_t>(length),
                                    static_cast<int32_t>(k), out);
    } else {
      simulator::launch_rows<Group>(&topk_pack_block_kernel<T>, rows, x.data<const T>(), rows, length, k,
                                    out);
    }
  });
}

void topk_pack(simulator::Call& call) {
  simulator::dispatch<float, double, bf16, f16>(call.tensor("x").dtype(),
                                                [&]<typename T>(std::type_identity<T>) { run<T>(call); });
}

}  // namespace

EFFOPS_SIMULATE("topk_pack", topk_pack)
