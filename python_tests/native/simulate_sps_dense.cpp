// Runs the CUDA kernels of sps_from_dense and sps_to_dense in the simulator, with the launches of
// sps_dense_cuda.cu.
#include "rowconv/sps_dense_kernels.cuh"
#include "simulate_scan.h"

namespace {

using namespace effops;
using namespace effops::rowconv;
using simulator::DType;

DenseLayout layout_of(const simulator::Tensor& dense) {  // [R, F, H, W]
  return {{dense.size(0), dense.size(2), dense.size(3)},
          dense.size(1),
          dense.stride(0),
          dense.stride(1),
          dense.stride(2),
          dense.stride(3)};
}

IdMap id_map_of(const simulator::Tensor& map) { return {map.raw(), map.dtype() == DType::kInt64}; }

// Rows of the ids in `map` or, without one, active rows at roi and xy.
template <bool kToRows>
void move(const simulator::Tensor& dense, const simulator::Tensor& active, const simulator::Tensor* passive,
          const simulator::Tensor* map, const simulator::Tensor* roi, const simulator::Tensor* xy) {
  const auto run = [&]<typename Word>(std::type_identity<Word>) {
    MoveArguments<Word> arguments{};
    arguments.layout = layout_of(dense);
    arguments.dense = static_cast<Word*>(dense.raw());
    arguments.active_rows = static_cast<Word*>(active.raw());
    arguments.active = active.size(0);
    if (map != nullptr) {
      arguments.passive_rows = static_cast<Word*>(passive->raw());
      arguments.passive = passive->size(0);
      arguments.map = id_map_of(*map);
    } else {
      arguments.roi = roi->data<const int32_t>();
      arguments.xy = xy->data<const int32_t>();
    }
    simulator::launch_few_blocks(&sps_move_kernel<Word, kToRows>, arguments.works(), kMoveThreads, arguments);
  };
  switch (simulator::size_of(dense.dtype())) {
    case 2: return run(std::type_identity<uint16_t>());
    case 4: return run(std::type_identity<uint32_t>());
    default: return run(std::type_identity<uint64_t>());
  }
}

void sps_from_dense(simulator::Call& call) {
  const simulator::Tensor &x = call.tensor("x"), &mask = call.tensor("mask");
  const int64_t cells = mask.numel(), features = x.size(1);
  const ActiveSource source{static_cast<const uint8_t*>(mask.raw())};
  const simulator::Scan scan(call, cells);
  const int64_t num_active = scan.sums(source);
  const auto& active = call.output("active", x.dtype(), {num_active, features});
  const auto& passive = call.output("passive", x.dtype(), {cells - num_active, features});
  const bool wide = call.flag("wide");
  const auto& map = call.output("index_map", wide ? DType::kInt64 : DType::kInt32, mask.sizes());
  const FromDenseSink sink{{mask.size(0), mask.size(1), mask.size(2)},
                           num_active,
                           map.raw(),
                           wide,
                           call.output("roi", DType::kInt32, {num_active}).data<int32_t>(),
                           call.output("xy", DType::kInt32, {num_active, 2}).data<int32_t>()};
  scan.run(source, sink);
  move</*kToRows=*/true>(x, active, &passive, &map, nullptr, nullptr);
}

void sps_to_dense(simulator::Call& call) {
  const simulator::Tensor &active = call.tensor("active"), &map = call.tensor("index_map");
  const std::vector<int64_t> sizes{map.size(0), active.size(1), map.size(1), map.size(2)};
  move</*kToRows=*/false>(call.output("output", active.dtype(), sizes), active, &call.tensor("passive"), &map,
                          nullptr, nullptr);
}

void sps_to_dense_backward(simulator::Call& call) {
  const simulator::Tensor &grad_output = call.tensor("grad_output"), &map = call.tensor("index_map");
  const simulator::Tensor &roi = call.tensor("roi"), &xy = call.tensor("xy");
  const int64_t features = grad_output.size(1), passive = call.integer("passive");
  const auto& grad_active = call.output("grad_active", grad_output.dtype(), {roi.size(0), features});
  move</*kToRows=*/true>(grad_output, grad_active, nullptr, nullptr, &roi, &xy);
  const auto buckets =
      simulator::bucket_cells(call, {id_map_of(map), map.numel(), roi.size(0), passive}, /*output=*/false);
  const auto& grad_passive = call.output("grad_passive", grad_output.dtype(), {passive, features});
  simulator::dispatch<float, double, bf16, f16>(grad_output.dtype(), [&]<typename T>(std::type_identity<T>) {
    simulator::launch_few_blocks(&sps_passive_gradient_kernel<T>, passive * features, kScanThreads,
                                 layout_of(grad_output),
                                 PassiveCells{buckets.offsets, buckets.cells, passive},
                                 grad_output.data<const T>(), grad_passive.data<T>());
  });
}

}  // namespace

EFFOPS_SIMULATE("sps_from_dense", sps_from_dense)
EFFOPS_SIMULATE("sps_to_dense", sps_to_dense)
EFFOPS_SIMULATE("sps_to_dense_backward", sps_to_dense_backward)
