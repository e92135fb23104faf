// CUDA kernels that invert a map: which cells have each id, in ascending order. No torch, no launches.
//
// Bucket b holds the cells of id first_id + b, from offsets[b] to offsets[b + 1] of `cells`; other ids are
// left out. The order does not depend on the order of threads, so that sums over a bucket are deterministic.
//
//   counts [buckets] = 0; cell_buckets_count_kernel; offsets [buckets + 1] = exclusive scan of counts;
//   cell_buckets_fill_kernel; cell_buckets_sort_kernel
//
// Bytes: the map twice, about 40 B per cell in a bucket. Bound by atomics on counts where a bucket holds many
// cells, else by bandwidth.
#pragma once

#include "id_map_kernels.cuh"
#include "scan_kernels.cuh"

namespace effops::rowconv {

using BucketCount = unsigned long long;  // has atomics

constexpr int64_t kLongBucket = 512;  // cells from which on a block sorts a bucket

struct BucketArguments {
  IdMap map;
  int64_t cells, first_id, buckets;

  // -1: none.
  EFFOPS_DEVICE int64_t bucket_of(int64_t cell) const {
    const int64_t id = map.at(cell);
    return id >= first_id && id - first_id < buckets ? id - first_id : -1;
  }
};

// counts[b] += cells of bucket b. A thread per cell.
__global__ void __launch_bounds__(kCellThreads)
    cell_buckets_count_kernel(BucketArguments arguments, BucketCount* counts) {
  for_own_cells(arguments.cells, [&](int64_t cell) {
    const int64_t bucket = arguments.bucket_of(cell);
    if (bucket >= 0) atomicAdd(counts + bucket, BucketCount{1});
  });
}

// Puts each cell somewhere in its bucket; counts become 0. A thread per cell.
__global__ void __launch_bounds__(kCellThreads)
    cell_buckets_fill_kernel(BucketArguments arguments, const int64_t* offsets, BucketCount* counts,
                             int64_t* unsorted) {
  for_own_cells(arguments.cells, [&](int64_t cell) {
    const int64_t bucket = arguments.bucket_of(cell);
    if (bucket < 0) return;
    const BucketCount left = atomicAdd(counts + bucket, ~BucketCount{0});  // minus one
    unsorted[offsets[bucket] + static_cast<int64_t>(left) - 1] = cell;
  });
}

// The cells of one bucket.
struct BucketSource {
  const BucketArguments& arguments;
  int64_t bucket;

  EFFOPS_DEVICE int64_t count(int64_t cell) const { return arguments.bucket_of(cell) == bucket; }
};

// A warp per bucket: each cell goes where the number of smaller ones says, n^2 / 32 steps. A block finds the
// cells of a long bucket in the map instead, of which there are at most cells / kLongBucket.
__global__ void __launch_bounds__(kScanThreads)
    cell_buckets_sort_kernel(BucketArguments arguments, const int64_t* offsets, const int64_t* unsorted,
                             int64_t* cells) {
  EFFOPS_SHARED(int64_t, parts, kScanWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t step = int64_t{gridDim.x} * kScanWarps;
  for (int64_t group = int64_t{blockIdx.x} * kScanWarps; group < arguments.buckets; group += step) {
    if (group + warp < arguments.buckets) {
      const int64_t begin = offsets[group + warp], count = offsets[group + warp + 1] - begin;
      if (count < kLongBucket) {
        for (int64_t i = lane; i < count; i += kWarpSize) {
          const int64_t cell = unsorted[begin + i];
          int64_t rank = 0;
          for (int64_t j = 0; j < count; ++j) rank += unsorted[begin + j] < cell;
          cells[begin + rank] = cell;
        }
      }
    }
    for (int64_t bucket = group; bucket < min(group + kScanWarps, arguments.buckets); ++bucket) {
      const int64_t begin = offsets[bucket];
      if (offsets[bucket + 1] - begin < kLongBucket) continue;
      scan_run(BucketSource{arguments, bucket}, 0, arguments.cells, begin, parts,
               [&](int64_t cell, int64_t at, int64_t count) {
                 if (count != 0) cells[at] = cell;
               });
    }
  }
}

}  // namespace effops::rowconv
