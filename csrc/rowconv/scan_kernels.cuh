// Prefix sums over any number of items, and whatever is written at the places that they give. No torch, no
// launches.
//
//   before(i) = sum over j < i of source.count(j);  sink.put(i, before(i), count(i)), once per item
//                                                   sink.finish(before(items)), once
//
// A source has `int64_t count(int64_t item) const`, a sink has `void put(int64_t item, int64_t before,
// int64_t count) const` and `void finish(int64_t total) const`, all EFFOPS_DEVICE. CountSource and OffsetSink
// make the plain exclusive scan offsets[0 .. items], the total at the end; counts and offsets may be the same
// memory.
//
//   const ScanTiling tiling = make_scan_tiling(items, kMaxScanBlocks);
//   scan_sums_kernel<<<tiling.blocks, kScanThreads>>>(source, items, tiling, sums);         // sums [blocks]
//   scan_kernel<<<tiling.blocks, kScanThreads>>>(source, sink, items, tiling, sums);
//
// The grid has to be of exactly tiling.blocks blocks; scan_cuda.cuh does it. With no items there is one block
// that calls sink.finish(0). The sums add up to the total, for those who need it on the host in between.
//
// Parallelism: a block per run of items, in tiles of 1024; the sums of the runs before are added up by every
// block, which spares a launch and limits their number. Bytes: the source twice, the sink once. Bound by
// bandwidth. Limits: sums below 2^63.
#pragma once

#include "../common/host_device.h"
#include "../common/warp.h"

namespace effops::rowconv {

constexpr int kScanThreads = 256;
constexpr int kScanWarps = kScanThreads / kWarpSize;
constexpr int kScanItems = 4;  // of a thread in a tile
constexpr int64_t kScanTile = int64_t{kScanThreads} * kScanItems;
constexpr int64_t kMaxScanBlocks = 1024;

struct ScanTiling {
  int64_t blocks, items_per_block;  // the latter a multiple of kScanTile
};

inline ScanTiling make_scan_tiling(int64_t items, int64_t max_blocks) {
  const int64_t tiles = items > 0 ? (items + kScanTile - 1) / kScanTile : 1;
  const int64_t tiles_each = (tiles + max_blocks - 1) / max_blocks;
  return {(tiles + tiles_each - 1) / tiles_each, tiles_each * kScanTile};
}

// Counts in memory.
template <typename Count>
struct CountSource {
  const Count* counts;

  EFFOPS_DEVICE int64_t count(int64_t item) const { return static_cast<int64_t>(counts[item]); }
};

// offsets [items + 1]
struct OffsetSink {
  int64_t* offsets;
  int64_t items;

  EFFOPS_DEVICE void put(int64_t item, int64_t before, int64_t) const { offsets[item] = before; }
  EFFOPS_DEVICE void finish(int64_t total) const { offsets[items] = total; }
};

// The sum over the threads of a block of kScanThreads, in all of them. `parts` [kScanWarps]: shared memory
// that no thread reads or writes until the next barrier.
EFFOPS_DEVICE int64_t sum_of_block(int64_t value, int64_t* parts) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  int64_t sum = 0;
#pragma unroll
  for (int w = 0; w < kScanWarps; ++w) sum += parts[w];
  return sum;
}

// Calls put(item, before + counts of the items from `first` on, count) for the items from `first` to `end`,
// by all threads of a block of kScanThreads; returns `before` + all counts. `parts` [kScanWarps]: shared
// memory that no thread reads or writes until the next barrier, as it is left.
template <typename Source, typename Put>
EFFOPS_DEVICE int64_t scan_run(const Source& source, int64_t first, int64_t end, int64_t before,
                               int64_t* parts, const Put& put) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int64_t tile = first; tile < end; tile += kScanTile) {
    // A warp has kScanItems times 32 neighbours; sums[k]: those up to the lane's own.
    const int64_t own = tile + warp * (kScanItems * kWarpSize) + lane;
    int64_t counts[kScanItems], sums[kScanItems], of_warp = 0;
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      const int64_t item = own + k * kWarpSize;
      counts[k] = item < end ? source.count(item) : 0;
    }
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      int64_t sum = counts[k];
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int64_t other = __shfl_up_sync(kFullWarp, sum, static_cast<unsigned>(offset));
        if (lane >= offset) sum += other;
      }
      sums[k] = of_warp + sum;
      of_warp += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
    }
    if (lane == 0) parts[warp] = of_warp;
    __syncthreads();
    int64_t before_warp = before;
#pragma unroll
    for (int w = 0; w < kScanWarps; ++w) {
      if (w < warp) before_warp += parts[w];
      before += parts[w];
    }
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      const int64_t item = own + k * kWarpSize;
      if (item < end) put(item, before_warp + sums[k] - counts[k], counts[k]);
    }
    __syncthreads();  // the next tile fills `parts`
  }
  return before;
}

// sums[block] = the counts of the block's run.
template <typename Source>
__global__ void __launch_bounds__(kScanThreads)
    scan_sums_kernel(Source source, int64_t items, ScanTiling tiling, int64_t* sums) {
  EFFOPS_SHARED(int64_t, parts, kScanWarps);
  const int64_t first = int64_t{blockIdx.x} * tiling.items_per_block;
  const int64_t end = min(first + tiling.items_per_block, items);
  int64_t sum = 0;
#pragma unroll 4
  for (int64_t i = first + threadIdx.x; i < end; i += kScanThreads) sum += source.count(i);
  sum = sum_of_block(sum, parts);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <typename Source, typename Sink>
__global__ void __launch_bounds__(kScanThreads, 2)
    scan_kernel(Source source, Sink sink, int64_t items, ScanTiling tiling, const int64_t* sums) {
  EFFOPS_SHARED(int64_t, parts, kScanWarps);
  int64_t before = 0;
  for (int64_t block = threadIdx.x; block < blockIdx.x; block += kScanThreads) before += sums[block];
  before = sum_of_block(before, parts);
  __syncthreads();  // scan_run writes `parts`
  const int64_t first = int64_t{blockIdx.x} * tiling.items_per_block;
  const int64_t end = min(first + tiling.items_per_block, items);
  const int64_t total = scan_run(source, first, end, before, parts,
                                 [&](int64_t i, int64_t at, int64_t count) { sink.put(i, at, count); });
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) sink.finish(total);
}

}  // namespace effops::rowconv
