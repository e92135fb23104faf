// What the drivers of the rowconv kernels share: small grids, scans, the cells of each id.
#pragma once

#include <algorithm>

#include "rowconv/cell_buckets_kernels.cuh"
#include "rowconv/scan_kernels.cuh"
#include "simulate.h"

namespace simulator {

// Fewer blocks than there is work, so that the kernels loop over the rest.
template <typename Kernel, typename... Arguments>
void launch_few_blocks(Kernel kernel, int64_t works, int threads, const Arguments&... arguments) {
  constexpr int64_t kMaxBlocks = 2;
  if (works == 0) return;
  launch(dim3(static_cast<unsigned>(std::min(works, kMaxBlocks))), dim3(static_cast<unsigned>(threads)), 0,
         kernel, arguments...);
}

// The launches of scan_cuda.cuh, with a block per tile and more blocks for few items.
class Scan {
 public:
  Scan(Call& call, int64_t items, int64_t max_blocks = 3)
      : items_(items),
        tiling_(effops::rowconv::make_scan_tiling(items, max_blocks)),
        sums_(call.scratch("sums", DType::kInt64, {tiling_.blocks}).data<int64_t>()) {}

  template <typename Source>
  int64_t sums(const Source& source) const {
    launch(blocks(), dim3(effops::rowconv::kScanThreads), 0, &effops::rowconv::scan_sums_kernel<Source>,
           source, items_, tiling_, sums_);
    int64_t total = 0;
    for (int64_t b = 0; b < tiling_.blocks; ++b) total += sums_[b];
    return total;
  }

  template <typename Source, typename Sink>
  void run(const Source& source, const Sink& sink) const {
    launch(blocks(), dim3(effops::rowconv::kScanThreads), 0, &effops::rowconv::scan_kernel<Source, Sink>,
           source, sink, items_, tiling_, static_cast<const int64_t*>(sums_));
  }

 private:
  dim3 blocks() const { return dim3(static_cast<unsigned>(tiling_.blocks)); }

  int64_t items_;
  effops::rowconv::ScanTiling tiling_;
  int64_t* sums_;
};

struct CellBuckets {
  const int64_t *offsets, *cells;
};

// The launches of bucket_cells of cell_buckets_cuda.cu. Outputs `offsets` and `cells`, or scratch.
inline CellBuckets bucket_cells(Call& call, const effops::rowconv::BucketArguments& arguments, bool output) {
  using namespace effops::rowconv;
  const auto make = [&](const char* name, int64_t size) {
    return (output ? call.output(name, DType::kInt64, {size}) : call.scratch(name, DType::kInt64, {size}))
        .data<int64_t>();
  };
  int64_t* counts = call.scratch("counts", DType::kInt64, {arguments.buckets}, Fill::kZeros).data<int64_t>();
  auto* atomics = reinterpret_cast<BucketCount*>(counts);
  launch_few_blocks(&cell_buckets_count_kernel, cell_blocks(arguments.cells), kCellThreads, arguments,
                    atomics);
  int64_t* offsets = make("offsets", arguments.buckets + 1);
  const Scan scan(call, arguments.buckets);
  const CountSource<int64_t> source{counts};
  scan.sums(source);
  scan.run(source, OffsetSink{offsets, arguments.buckets});
  int64_t* unsorted = call.scratch("unsorted", DType::kInt64, {arguments.cells}).data<int64_t>();
  launch_few_blocks(&cell_buckets_fill_kernel, cell_blocks(arguments.cells), kCellThreads, arguments,
                    static_cast<const int64_t*>(offsets), atomics, unsorted);
  int64_t* cells = make("cells", arguments.cells);
  launch_few_blocks(&cell_buckets_sort_kernel, (arguments.buckets + kScanWarps - 1) / kScanWarps,
                    kScanThreads, arguments, static_cast<const int64_t*>(offsets),
                    static_cast<const int64_t*>(unsorted), cells);
  return {offsets, cells};
}

}  // namespace simulator
