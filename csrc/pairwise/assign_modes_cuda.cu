// assign_modes on CUDA: arguments, launches.
#include "assign_modes.h"

#include "../common/cuda_launch.cuh"
#include "../common/dtype_switch.h"
#include "assign_modes_kernels.cuh"

namespace effops::pairwise {
namespace {

template <typename A>
void run(const CudaScope& scope, const ModesShape& shape, const Tensor& modes, double threshold,
         int64_t min_size, const Tensor& labels) {
  const int64_t all = shape.batch * shape.points;
  ModeRows<A> unit = ModeRows<A>::sizes(shape.points, shape.channels);
  const int64_t rows = shape.batch * unit.image_rows(), pairs = shape.batch * tile_pairs(unit.tiles);
  const Tensor row_memory = empty_of(modes, {rows, unit.pitch});
  const Tensor trees = empty_of(modes, {2 * all + shape.batch}, ScalarType::Int);
  const Tensor keys = empty_of(modes, {all}, ScalarType::Long);
  unit.rows = static_cast<A*>(row_memory.mutable_data_ptr());
  auto* parents = trees.mutable_data_ptr<int32_t>();
  const Components components{shape.batch,       shape.points,
                              parents,           parents + all,
                              parents + 2 * all, static_cast<uint64_t*>(keys.mutable_data_ptr())};
  scope.launch(&begin_modes_kernel<A>, point_blocks(rows), kPointThreads, 0,
               static_cast<const A*>(modes.const_data_ptr()), unit, components);
  // No cosine is above 1, but one of rounded numbers may be.
  const double least = threshold < 1 ? 2 * threshold - 1 : 2;
  scope.launch(&join_modes_kernel<A>, pairs, ScalarEngine<A>::kThreads, 0, unit, components,
               static_cast<A>(least));
  const int64_t blocks = divide_up(all, kPointThreads);
  scope.launch(&count_members_kernel, blocks, kPointThreads, 0, components);
  scope.launch(&list_components_kernel, blocks, kPointThreads, 0, components, min_size);
  scope.launch(&label_modes_kernel, blocks, kPointThreads, 0, components, min_size,
               labels.mutable_data_ptr<int64_t>());
}

Tensor assign_modes(const Tensor& modes,  // [B, N, D]
                    double threshold, int64_t min_size) {
  const ModesShape shape = check_assign_modes(modes, threshold, min_size);
  if (shape.points > INT32_MAX) {
    fail("assign_modes: expected at most ", INT32_MAX, " points on CUDA, got ", shape.points);
  }
  const CudaScope scope(modes);
  const Tensor labels = empty_of(modes, {shape.batch, shape.points}, ScalarType::Long);
  if (labels.numel() == 0) return labels;
  const Tensor input = as_contiguous(modes);
  if (modes.scalar_type() == ScalarType::Double) {
    run<double>(scope, shape, input, threshold, min_size, labels);
  } else {
    run<float>(scope, shape, input, threshold, min_size, labels);
  }
  return labels;
}

}  // namespace
}  // namespace effops::pairwise

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("assign_modes", TORCH_BOX(&effops::pairwise::assign_modes));
}
