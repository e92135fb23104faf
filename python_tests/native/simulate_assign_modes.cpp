// Runs the CUDA kernels of assign_modes in the simulator, with the launches of assign_modes_cuda.cu.
#include <algorithm>

#include "pairwise/assign_modes_kernels.cuh"
#include "simulate.h"

namespace {

using namespace effops;
using namespace effops::pairwise;
using simulator::DType;

constexpr int64_t kMaxBlocks = 3;  // fewer than there is work, so that the kernels loop

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int64_t works, int threads, const Arguments&... arguments) {
  simulator::launch(dim3(static_cast<unsigned>(std::min(works, kMaxBlocks))),
                    dim3(static_cast<unsigned>(threads)), 0, kernel, arguments...);
}

// modes [B, N, D], threshold, min_size. Output labels [B, N].
template <typename A>
void run(simulator::Call& call) {
  const auto& modes = call.tensor("modes");
  const int64_t batch = modes.size(0), points = modes.size(1), all = batch * points;
  const int64_t min_size = call.integer("min_size");
  ModeRows<A> unit = ModeRows<A>::sizes(points, modes.size(2));
  const int64_t rows = batch * unit.image_rows();
  unit.rows = call.scratch("unit", simulator::kDTypeOf<A>, {rows, unit.pitch}).template data<A>();
  const auto integers = [&](const char* name, DType dtype, int64_t size) {
    return call.scratch(name, dtype, {size}).raw();
  };
  const Components components{batch,
                              points,
                              static_cast<int32_t*>(integers("parents", DType::kInt32, all)),
                              static_cast<int32_t*>(integers("sizes", DType::kInt32, all)),
                              static_cast<int32_t*>(integers("counts", DType::kInt32, batch)),
                              static_cast<uint64_t*>(integers("keys", DType::kInt64, all))};
  auto* labels = call.output("labels", DType::kInt64, {batch, points}).template data<int64_t>();
  launch(&begin_modes_kernel<A>, point_blocks(rows), kPointThreads, modes.template data<const A>(), unit,
         components);
  launch(&join_modes_kernel<A>, batch * tile_pairs(unit.tiles), ScalarEngine<A>::kThreads, unit, components,
         static_cast<A>(2 * call.real("threshold") - 1));
  const int64_t blocks = divide_up(all, kPointThreads);
  launch(&count_members_kernel, blocks, kPointThreads, components);
  launch(&list_components_kernel, blocks, kPointThreads, components, min_size);
  launch(&label_modes_kernel, blocks, kPointThreads, components, min_size, labels);
}

void assign_modes(simulator::Call& call) {
  simulator::dispatch<float, double>(call.tensor("modes").dtype(),
                                     [&]<typename A>(std::type_identity<A>) { run<A>(call); });
}

}  // namespace

EFFOPS_SIMULATE("assign_modes", assign_modes)
