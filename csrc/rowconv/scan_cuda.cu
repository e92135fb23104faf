// The plain exclusive scan on CUDA.
#include "scan_cuda.cuh"

namespace effops::rowconv {

Tensor offsets_of(const CudaScope& scope, const Tensor& counts) {
  const int64_t items = counts.numel();
  const Tensor offsets = empty_of(counts, {items + 1}, ScalarType::Long);
  const OffsetSink sink{offsets.mutable_data_ptr<int64_t>(), items};
  if (counts.scalar_type() == ScalarType::Int) {
    scan(scope, counts, CountSource<int32_t>{counts.const_data_ptr<int32_t>()}, sink, items);
  } else {
    scan(scope, counts, CountSource<int64_t>{counts.const_data_ptr<int64_t>()}, sink, items);
  }
  return offsets;
}

}  // namespace effops::rowconv
