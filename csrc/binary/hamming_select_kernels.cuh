// CUDA kernels that find any number of nearest neighbours. No torch, no launches.
#pragma once

#include "hamming_tile_kernels.cuh"

namespace effops::binary {

constexpr int kSelectWarps = 8;     // of a block at most, one row of a each
constexpr int kSelectThreads = kSelectWarps * kWarpSize;
constexpr int kSelectColumns = 128;  // staged at a time
constexpr int kLaneColumns = kSelectColumns / kWarpSize;

struct SelectTiling {
  int32_t warps;
  int32_t bins;  // distances from 0 to the number of bits
  int64_t row_groups, splits, split_columns;
  int64_t works;  // items * row_groups * splits

  EFFOPS_HD int64_t threads() const { return int64_t{warps} * kWarpSize; }
};

struct SelectStage {
  uint32_t columns[kSelectColumns * kStagedStride];
  uint32_t rows[kSelectWarps * kChunkBytes / 4];
};

// Calls f(distances, first) in each warp with the distances of its row to columns first + 32 c + lane,
// c < kLaneColumns, for all columns in ascending order; those of the warp's lanes outside are rubbish.
template <typename F>
EFFOPS_DEVICE void for_distances(const HammingArguments& arguments, const TileWork& work, SelectStage& stage,
                                 const F& f) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int32_t chunks = chunks_of(arguments.bytes);
  const auto load = [&](const HammingSet& set, int64_t index, int64_t end, int32_t chunk, int half) {
    return index < end ? load_words(arguments.row_of(set, work.item, index), chunk * kChunkBytes + 16 * half,
                                    arguments.bytes, arguments.alignment)
                       : Words{};
  };
  for (int64_t first = work.first_column; first < work.end_column; first += kSelectColumns) {
    int32_t distances[kLaneColumns] = {};
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
      __syncthreads();
      for (int i = thread; i < 2 * kSelectColumns; i += threads) {
        *reinterpret_cast<Words*>(stage.columns + i / 2 * kStagedStride + 4 * (i % 2)) =
            load(arguments.b, first + i / 2, work.end_column, chunk, i % 2);
      }
      if (lane < 2) {
        *reinterpret_cast<Words*>(stage.rows + warp * kChunkBytes / 4 + 4 * lane) =
            load(arguments.a, work.first_row + warp, work.end_row, chunk, lane);
      }
      __syncthreads();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Words row = staged_words(stage.rows + warp * kChunkBytes / 4 + 4 * half);
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) {
          Words different = staged_words(stage.columns + (c * kWarpSize + lane) * kStagedStride + 4 * half);
#pragma unroll
          for (int w = 0; w < 4; ++w) different.data[w] ^= row.data[w];
          distances[c] += count_ones(different);
        }
      }
    }
    f(distances, first);
  }
}

// Turns a warp's counts into the sums of those before, and returns the sum of all.
EFFOPS_DEVICE uint32_t accumulate_counts(uint32_t* counts, int32_t bins, int lane) {
  uint32_t before = 0;
  for (int32_t base = 0; base < bins; base += kWarpSize) {
    const uint32_t count = base + lane < bins ? counts[base + lane] : 0;
    uint32_t sum = count;
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint32_t other = __shfl_up_sync(kFullWarp, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (base + lane < bins) counts[base + lane] = before + sum - count;
    before += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  }
  __syncwarp();
  return before;
}

// What a warp does for its row of a.
struct RowSelection {
  const HammingArguments& arguments;
  const TileWork& work;
  const SelectTiling& tiling;
  int64_t row, output_row;  // in its set, of all sets
  uint32_t* counts;         // [bins], of this warp
  uint32_t* all_counts;     // [B, Na, splits, bins], or null
  int64_t split;
  int lane;

  EFFOPS_DEVICE bool allows(int64_t column) const {
    return column < work.end_column && arguments.allows(work.item, row, column);
  }
  EFFOPS_DEVICE uint32_t* split_counts(int64_t other) const {
    return all_counts + (output_row * tiling.splits + other) * tiling.bins;
  }

  template <typename F>
  EFFOPS_DEVICE void for_bins(const F& f) const {
    for (int32_t bin = lane; bin < tiling.bins; bin += kWarpSize) f(bin);
    __syncwarp();
  }

  EFFOPS_DEVICE void count(const int32_t (&distances)[kLaneColumns], int64_t first) const {
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      if (allows(first + c * kWarpSize + lane)) atomicAdd(counts + distances[c], 1u);
    }
  }

  // Where each distance begins among the row's neighbours; returns how many neighbours there are. The
  // counts are this warp's or, of several splits, all_counts.
  template <bool kSplit>
  EFFOPS_DEVICE uint32_t find_places() const {
    if constexpr (kSplit) {
      for_bins([&](int32_t bin) {
        uint32_t sum = 0;
        for (int64_t other = 0; other < tiling.splits; ++other) sum += split_counts(other)[bin];
        counts[bin] = sum;
      });
    }
    const uint32_t total = accumulate_counts(counts, tiling.bins, lane);
    if constexpr (kSplit) {
      for_bins([&](int32_t bin) {
        for (int64_t other = 0; other < split; ++other) counts[bin] += split_counts(other)[bin];
      });
    }
    return total;
  }

  // Columns come in ascending order, so that equal distances find their places in that order.
  EFFOPS_DEVICE void place(const int32_t (&distances)[kLaneColumns], int64_t first, uint32_t k,
                           int32_t* found_distances, int64_t* found_indices) const {
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      const int64_t column = first + c * kWarpSize + lane;
      const uint32_t at = allows(column) ? counts[distances[c]] : k;
      const bool wanted = at < k;
      if (!__any_sync(kFullWarp, wanted)) continue;
      const uint32_t equal = __match_any_sync(kFullWarp, wanted ? distances[c] : -1);
      const uint32_t rank = static_cast<uint32_t>(__popc(equal & ((1u << lane) - 1)));
      if (wanted && rank < k - at) {
        found_distances[at + rank] = distances[c];
        found_indices[at + rank] = column;
      }
      __syncwarp();  // all lanes have read their counts
      if (wanted && rank == 0) counts[distances[c]] = at + static_cast<uint32_t>(__popc(equal));
      __syncwarp();
    }
  }
};

// The k nearest neighbours in order of (distance, index): a counting sort by distance of which only the first
// k places are written. distances, indices [B, Na, k]; missing ones at the end.
//
// Parallelism: a warp per row of a, a lane per column; with few rows the columns are split among blocks that
// exchange `counts` [B, Na, splits, bins] between two launches: all count, then all place. Dynamic shared
// memory: a counter per warp and distance. Bytes: b once per block of up to 8 rows and pass from the
// second-level cache, 12 B Na k written. Bound by popc, 6 per 256 bits and pass: 324 us for 10k x 10k rows on
// an H100. Limits: any k; bits + 1 counters in shared memory.
template <bool kCount, bool kPlace>
__global__ void __launch_bounds__(kSelectThreads, 2)
    hamming_select_kernel(HammingArguments arguments, SelectTiling tiling, int64_t k, uint32_t* counts,
                          int32_t* distances, int64_t* indices) {
  EFFOPS_SHARED(SelectStage, stage, 1);
  EFFOPS_DYNAMIC_SHARED(uint32_t, block_counts);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int64_t index = blockIdx.x; index < tiling.works; index += gridDim.x) {
    const int64_t rest = index / tiling.splits, split = index % tiling.splits;
    TileWork work;
    __syncwarp();  // the counts of the work before are not read any more
    work.item = rest / tiling.row_groups;
    work.first_row = rest % tiling.row_groups * tiling.warps;
    work.end_row = min(work.first_row + tiling.warps, arguments.a.length(work.item));
    work.first_column = split * tiling.split_columns;
    work.end_column = min(work.first_column + tiling.split_columns, arguments.b.length(work.item));
    const int64_t row = work.first_row + warp, output_row = work.item * arguments.a.rows + row;
    const bool exists = row < work.end_row;
    const RowSelection selection{arguments, work,  tiling, row, output_row, block_counts + warp * tiling.bins,
                                 counts,    split, lane};
    if constexpr (kCount) {
      selection.for_bins([&](int32_t bin) { selection.counts[bin] = 0; });
      for_distances(arguments, work, stage[0], [&](const int32_t (&found)[kLaneColumns], int64_t first) {
        if (exists) selection.count(found, first);
      });
      __syncwarp();
    }
    if constexpr (!kPlace) {
      if (!exists) continue;
      selection.for_bins([&](int32_t bin) { selection.split_counts(split)[bin] = selection.counts[bin]; });
    } else {
      const uint32_t total = exists ? selection.template find_places<!kCount>() : 0;
      const uint32_t wanted = static_cast<uint32_t>(k);
      for_distances(arguments, work, stage[0], [&](const int32_t (&found)[kLaneColumns], int64_t first) {
        if (!exists) return;
        selection.place(found, first, wanted, distances + output_row * k, indices + output_row * k);
      });
      if (row >= arguments.a.rows || split != 0) continue;
      for (int64_t i = int64_t{total} + lane; i < k; i += kWarpSize) {
        distances[output_row * k + i] = kNoDistance;
        indices[output_row * k + i] = kNoIndex;
      }
    }
  }
}

// -------------------------------------------------------------------------------------------- geometry

// slots: blocks that the device runs at a time.
inline SelectTiling make_select_tiling(int64_t batch, int64_t rows_a, int64_t rows_b, int32_t bytes,
                                       int64_t slots) {
  constexpr int32_t kMaxCounters = 10 * 1024;
  constexpr int64_t kFewestTiles = 8;  // of a split
  SelectTiling tiling{};
  tiling.bins = 8 * bytes + 1;
  tiling.warps = kSelectWarps;
  while (tiling.warps * tiling.bins > kMaxCounters) tiling.warps /= 2;
  tiling.row_groups = (rows_a + tiling.warps - 1) / tiling.warps;
  const int64_t blocks = batch * tiling.row_groups, tiles = (rows_b + kSelectColumns - 1) / kSelectColumns;
  int64_t splits = blocks > 0 ? slots / blocks : 1;
  if (splits > tiles / kFewestTiles) splits = tiles / kFewestTiles;
  if (splits < 1) splits = 1;
  const int64_t tiles_each = tiles > splits ? (tiles + splits - 1) / splits : 1;
  tiling.split_columns = tiles_each * kSelectColumns;
  tiling.splits = tiles > 0 ? (tiles + tiles_each - 1) / tiles_each : 1;
  tiling.works = blocks * tiling.splits;
  return tiling;
}

inline int64_t select_shared_bytes(const SelectTiling& tiling) {
  return int64_t{tiling.warps} * tiling.bins * static_cast<int64_t>(sizeof(uint32_t));
}

}  // namespace effops::binary
