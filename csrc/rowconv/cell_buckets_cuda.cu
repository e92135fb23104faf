// Which cells have each id of a map, on CUDA: grids, launches.
#include "cell_buckets_cuda.cuh"
#include "cell_buckets_kernels.cuh"
#include "scan_cuda.cuh"

namespace effops::rowconv {

CellBuckets bucket_cells(const CudaScope& scope, const Tensor& map, int64_t first_id, int64_t buckets) {
  const int64_t cells = map.numel();
  if (cells == 0 || buckets == 0) {
    return {zeros_of(map, {buckets + 1}, ScalarType::Long), empty_of(map, {0}, ScalarType::Long)};
  }
  const BucketArguments arguments{
      {map.const_data_ptr(), map.scalar_type() == ScalarType::Long}, cells, first_id, buckets};
  const Tensor counts = zeros_of(map, {buckets}, ScalarType::Long);
  auto* count_data = reinterpret_cast<BucketCount*>(counts.mutable_data_ptr<int64_t>());
  scope.launch(&cell_buckets_count_kernel, cell_blocks(cells), kCellThreads, 0, arguments, count_data);
  const CellBuckets result{offsets_of(scope, counts), empty_of(map, {cells}, ScalarType::Long)};
  const int64_t* offsets = result.offsets.const_data_ptr<int64_t>();
  const Tensor unsorted = empty_of(map, {cells}, ScalarType::Long);
  scope.launch(&cell_buckets_fill_kernel, cell_blocks(cells), kCellThreads, 0, arguments, offsets, count_data,
               unsorted.mutable_data_ptr<int64_t>());
  scope.launch(&cell_buckets_sort_kernel, (buckets + kScanWarps - 1) / kScanWarps, kScanThreads, 0, arguments,
               offsets, unsorted.const_data_ptr<int64_t>(), result.cells.mutable_data_ptr<int64_t>());
  return result;
}

}  // namespace effops::rowconv
