// Runs the CUDA kernels of plan_mask, of the prefix sums and of the cells of each id in the simulator, with
// the launches of mask_plan_cuda.cu, scan_cuda.cuh and cell_buckets_cuda.cu.
#include "rowconv/mask_plan_kernels.cuh"
#include "simulate_scan.h"

namespace {

using namespace effops;
using namespace effops::rowconv;
using simulator::DType;

// Outputs the positions to the capacity, with their number, as make_device_plan does.
void plan_mask(simulator::Call& call) {
  const simulator::Tensor& mask = call.tensor("mask");  // [N, Ho, Wo]
  const int64_t items = mask.numel();
  const KeptSource source{{mask.raw(), static_cast<int64_t>(simulator::size_of(mask.dtype()))}};
  int64_t* positions = call.scratch("all_positions", DType::kInt64, {items}).data<int64_t>();
  int64_t* rows = call.output("rows", DType::kInt64, mask.sizes()).data<int64_t>();
  int64_t* kept = call.output("kept", DType::kInt64, {1}).data<int64_t>();
  const simulator::Scan scan(call, items);
  const int64_t total = scan.sums(source);
  scan.run(source, PlanSink{positions, rows, kept});
  std::copy_n(positions, total, call.output("positions", DType::kInt64, {total}).data<int64_t>());
  // The plan of a known size.
  int64_t* exact = call.output("exact_positions", DType::kInt64, {total}).data<int64_t>();
  scan.run(source, PlanSink{exact, rows, nullptr});
}

void nearest_rows(simulator::Call& call) {
  const simulator::Tensor& rows = call.tensor("rows");  // [N, Ho, Wo]
  const PlanShape shape{rows.size(0), rows.size(1), rows.size(2)};
  const auto* data = rows.data<const int64_t>();
  int32_t* column_nearest = call.scratch("column_nearest", DType::kInt32, rows.sizes()).data<int32_t>();
  int64_t* nearest = call.output("nearest", DType::kInt64, rows.sizes()).data<int64_t>();
  simulator::launch_few_blocks(&nearest_in_column_kernel, cell_blocks(shape.columns()), kCellThreads, data,
                               shape, column_nearest);
  simulator::launch_few_blocks(&nearest_rows_kernel, cell_blocks(shape.positions()), kCellThreads, data,
                               static_cast<const int32_t*>(column_nearest), shape, nearest);
}

// The scan of counts, int32 or int64; int64 ones in place.
void offsets(simulator::Call& call) {
  const simulator::Tensor& counts = call.tensor("counts");
  const int64_t items = counts.numel();
  int64_t* offsets =
      call.output("offsets", DType::kInt64, {items + 1}, simulator::Fill::kZeros).data<int64_t>();
  const OffsetSink sink{offsets, items};
  const simulator::Scan scan(call, items, call.integer("max_blocks"));
  const auto run = [&](const auto& source) {
    scan.sums(source);
    scan.run(source, sink);
  };
  if (counts.dtype() == DType::kInt32) {
    run(CountSource<int32_t>{counts.data<const int32_t>()});
  } else {
    std::copy_n(counts.data<const int64_t>(), items, offsets);
    run(CountSource<int64_t>{offsets});
  }
}

void cell_buckets(simulator::Call& call) {
  const simulator::Tensor& map = call.tensor("map");
  const BucketArguments arguments{{map.raw(), map.dtype() == DType::kInt64},
                                  map.numel(),
                                  call.integer("first_id"),
                                  call.integer("buckets")};
  simulator::bucket_cells(call, arguments, /*output=*/true);
}

}  // namespace

EFFOPS_SIMULATE("plan_mask", plan_mask)
EFFOPS_SIMULATE("nearest_rows", nearest_rows)
EFFOPS_SIMULATE("scan_offsets", offsets)
EFFOPS_SIMULATE("cell_buckets", cell_buckets)
