// plan_mask on CUDA, and the functions of mask_plan_cuda.cuh: arguments, grids, launches.
#include "mask_plan_cuda.cuh"

#include "mask_plan.h"
#include "mask_plan_kernels.cuh"
#include "scan_cuda.cuh"

namespace effops::rowconv {
namespace {

KeptSource source_of(const Tensor& mask) {
  return {{mask.const_data_ptr(), static_cast<int64_t>(mask.element_size())}};
}

std::vector<int64_t> sizes_of(const Tensor& mask) { return {mask.size(0), mask.size(1), mask.size(2)}; }

std::tuple<Tensor, Tensor> plan_mask(const Tensor& mask) {  // [N, Ho, Wo]
  check_mask("plan_mask", mask);
  const CudaScope scope(mask);
  const Tensor rows = empty_of(mask, sizes_of(mask), ScalarType::Long);
  if (mask.numel() == 0) return {empty_of(mask, {0}, ScalarType::Long), rows};
  const Tensor input = as_contiguous(mask);
  const KeptSource source = source_of(input);
  const Tensor sums = scan_sums(scope, input, source, input.numel());
  // The only time that the host waits for the device.
  const Tensor positions = empty_of(mask, {total_on_host(sums)}, ScalarType::Long);
  const PlanSink sink{positions.mutable_data_ptr<int64_t>(), rows.mutable_data_ptr<int64_t>(), nullptr};
  scan_with_sums(scope, sums, source, sink, input.numel());
  return {positions, rows};
}

}  // namespace

DevicePlan make_device_plan(const CudaScope& scope, const Tensor& mask) {
  const Tensor input = as_contiguous(mask);
  const DevicePlan plan{empty_of(mask, {mask.numel()}, ScalarType::Long),
                        empty_of(mask, sizes_of(mask), ScalarType::Long),
                        empty_of(mask, {1}, ScalarType::Long)};
  const PlanSink sink{plan.positions.mutable_data_ptr<int64_t>(), plan.rows.mutable_data_ptr<int64_t>(),
                      plan.kept.mutable_data_ptr<int64_t>()};
  scan(scope, input, source_of(input), sink, input.numel());
  return plan;
}

Tensor nearest_rows(const CudaScope& scope, const Tensor& rows) {
  const Tensor nearest = empty_of(rows, sizes_of(rows));
  if (rows.numel() == 0) return nearest;
  const Tensor input = as_contiguous(rows);
  const int64_t* data = input.const_data_ptr<int64_t>();
  const PlanShape shape{rows.size(0), rows.size(1), rows.size(2)};
  const Tensor column_nearest = empty_of(rows, sizes_of(rows), ScalarType::Int);
  scope.launch(&nearest_in_column_kernel, cell_blocks(shape.columns()), kCellThreads, 0, data, shape,
               column_nearest.mutable_data_ptr<int32_t>());
  scope.launch(&nearest_rows_kernel, cell_blocks(shape.positions()), kCellThreads, 0, data,
               column_nearest.const_data_ptr<int32_t>(), shape, nearest.mutable_data_ptr<int64_t>());
  return nearest;
}

}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) { m.impl("plan_mask", TORCH_BOX(&effops::rowconv::plan_mask)); }
