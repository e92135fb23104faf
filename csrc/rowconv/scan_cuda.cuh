// Launches of the kernels in scan_kernels.cuh.
#pragma once

#include "../common/cuda_launch.cuh"
#include "scan_kernels.cuh"

namespace effops::rowconv {

// The sums of the blocks' runs, int64 [blocks] on the device of `like`: the first half of a scan.
template <typename Source>
Tensor scan_sums(const CudaScope& scope, const Tensor& like, const Source& source, int64_t items) {
  const ScanTiling tiling = make_scan_tiling(items, kMaxScanBlocks);
  const Tensor sums = empty_of(like, {tiling.blocks}, ScalarType::Long);
  scope.launch(&scan_sums_kernel<Source>, tiling.blocks, kScanThreads, 0, source, items, tiling,
               sums.mutable_data_ptr<int64_t>());
  return sums;
}

// The second half, with the sums of the first.
template <typename Source, typename Sink>
void scan_with_sums(const CudaScope& scope, const Tensor& sums, const Source& source, const Sink& sink,
                    int64_t items) {
  const ScanTiling tiling = make_scan_tiling(items, kMaxScanBlocks);
  scope.launch(&scan_kernel<Source, Sink>, tiling.blocks, kScanThreads, 0, source, sink, items, tiling,
               sums.const_data_ptr<int64_t>());
}

template <typename Source, typename Sink>
void scan(const CudaScope& scope, const Tensor& like, const Source& source, const Sink& sink, int64_t items) {
  scan_with_sums(scope, scan_sums(scope, like, source, items), source, sink, items);
}

// The total of a scan, for which the host waits.
inline int64_t total_on_host(const Tensor& sums) {
  const Tensor on_host = torch::stable::to(sums, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  int64_t total = 0;
  for (int64_t i = 0; i < on_host.numel(); ++i) total += on_host.const_data_ptr<int64_t>()[i];
  return total;
}

// offsets [items + 1] int64 of contiguous counts [items], int32 or int64: the plain exclusive scan.
Tensor offsets_of(const CudaScope& scope, const Tensor& counts);

}  // namespace effops::rowconv
