// CUDA kernels that find the nearest and second nearest neighbours. No torch, no launches.
#pragma once

#include "hamming_tile_kernels.cuh"

namespace effops::binary {

// All kNoNeighbour before the kernel runs; null: not wanted.
struct NearestKeys {
  NeighbourKey *best, *second;  // [B, Na], indices in b
  NeighbourKey* columns;        // [B, Nb], indices in a

  // Whether b's nearest row of a isn't the one whose nearest row of b it is.
  EFFOPS_DEVICE bool is_one_sided(int64_t row, int64_t first_column, int64_t index) const {
    return columns != nullptr && index_of(columns[first_column + index]) != row;
  }
};

// Inside a block a neighbour is `distance << kIndexBits | index`, a number below kNothing, so that one
// multiply-add makes it and one minimum compares it. Until the end the key of a row's neighbour is larger by
// the row's place in its tile. Two keys that are no neighbours, or one and a neighbour, are still none when
// added, without overflow.
constexpr int kIndexBits = 17;
constexpr int64_t kSplitColumns = int64_t{1} << kIndexBits;
constexpr int32_t kIndexMask = (1 << kIndexBits) - 1;
constexpr int32_t kNothing = 3 << 28;
constexpr int32_t kForbidden = kNothing + kTile;  // stays above when the row's place is taken off
constexpr int32_t kLargest = 0x7fffffff;

constexpr int64_t kLargestKey = (kMaxBits << kIndexBits) + kIndexMask + kTile;
static_assert(kLargestKey < kNothing && kLargestKey + kForbidden <= kLargest &&
                  int64_t{2} * kForbidden <= kLargest && (kNothing & kIndexMask) == 0,
              "see above");

struct NearestScratch {
  int32_t best[kColumnWarps][kTile], second[kColumnWarps][kTile];
  int32_t columns[kRowWarps][kTile];
  uint32_t allowed[kTile][kColumnWarps];  // a bit per column
};

// Returns the old key.
EFFOPS_DEVICE NeighbourKey lower_key(NeighbourKey* address, NeighbourKey key) {
  return atomicMin(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(key));
}

// The two smallest of two ordered pairs.
EFFOPS_DEVICE void merge_two(int32_t& best, int32_t& second, int32_t other_best, int32_t other_second) {
  second = min(max(best, other_best), min(second, other_second));
  best = min(best, other_best);
}

template <bool kSecond, bool kColumns, bool kMasked>
struct NearestVisitor {
  static constexpr int32_t kAbsent = kNothing;

  HammingTile& tile;
  NearestScratch& scratch;
  const TilePlace place;
  const NearestKeys& keys;
  const int32_t rows, columns;             // of the work
  const uint32_t first_row, first_column;  // its first, in the sets
  const int64_t row_key, column_key;       // of its first, in the keys
  const uint8_t* const mask;               // of its first pair
  const int64_t mask_stride;               // from row to row
  int32_t best[8], second[8];  // per row of this thread; the index is that of the column plus the row's

  EFFOPS_DEVICE NearestVisitor(const HammingArguments& arguments, const TileWork& work,
                               const NearestKeys& keys_in, HammingTile& tile_in, NearestScratch& scratch_in)
      : tile(tile_in),
        scratch(scratch_in),
        place(threadIdx.x),
        keys(keys_in),
        rows(static_cast<int32_t>(work.end_row - work.first_row)),
        columns(static_cast<int32_t>(work.end_column - work.first_column)),
        first_row(static_cast<uint32_t>(work.first_row)),
        first_column(static_cast<uint32_t>(work.first_column)),
        row_key(work.item * arguments.a.rows + work.first_row),
        column_key(work.item * arguments.b.rows + work.first_column),
        mask(kMasked ? arguments.mask_of(work.item, work.first_row) + work.first_column : nullptr),
        mask_stride(arguments.b.rows) {
#pragma unroll
    for (int i = 0; i < 8; ++i) best[i] = second[i] = kLargest;
  }

  EFFOPS_DEVICE int32_t row_constant(int32_t norm, int row) const { return (norm << kIndexBits) + row; }
  EFFOPS_DEVICE int32_t column_constant(int32_t norm, int32_t column) const {
    return (norm << kIndexBits) + column;
  }

  EFFOPS_DEVICE void stage(int32_t first) {
    if constexpr (kMasked) {
      const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll 1
      for (int i = warp; i < kTile * kColumnWarps; i += kTileThreads / kWarpSize) {
        const int row = i / kColumnWarps, column = first + i % kColumnWarps * kWarpSize + place.lane;
        const bool allowed = row < rows && column < columns && mask[row * mask_stride + column] != 0;
        const uint32_t bits = __ballot_sync(kFullWarp, allowed);
        if (place.lane == 0) scratch.allowed[row][i % kColumnWarps] = bits;
      }
    }
  }

  EFFOPS_DEVICE void visit(const PairCounts& counts, int32_t first) {
    int32_t column_best[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) column_best[c] = kLargest;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = place.row(i);
      const int32_t row_constant = tile.row_constants[row];
      const uint32_t allowed = kMasked ? scratch.allowed[row][place.column_warp] >> (2 * (place.lane % 4))
                                       : kFullWarp;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int32_t common = counts[i / 2][c / 2][2 * (i % 2) + c % 2];
        int32_t key = row_constant - (common << (kIndexBits + 1));
        if (kMasked && !(allowed >> (8 * (c / 2) + c % 2) & 1)) key = kForbidden;
        if constexpr (kColumns) column_best[c] = min(column_best[c], key);
        key += tile.column_constants[place.column(c / 2, c % 2)];
        if constexpr (kSecond) second[i] = min(second[i], max(best[i], key));
        best[i] = min(best[i], key);
      }
    }
    if constexpr (kColumns) finish_columns(column_best, first);
  }

  // The column's part is missing from the keys so far: it doesn't change which row is nearest.
  EFFOPS_DEVICE void finish_columns(int32_t (&found)[8], int32_t first) {
    const int lane = place.lane;
#pragma unroll
    for (int c = 0; c < 4; ++c) found[c] = transpose_min(found[c], found[c + 4], 16, lane);
#pragma unroll
    for (int c = 0; c < 2; ++c) found[c] = transpose_min(found[c], found[c + 2], 8, lane);
    const int32_t smallest = transpose_min(found[0], found[1], 4, lane);
    const int column = place.column(lane / 8, lane / 4 % 2);
    scratch.columns[place.row_warp][column] = smallest + (tile.column_constants[column] & ~kIndexMask);
    __syncthreads();
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= kTile) return;
    const int32_t key = min(scratch.columns[0][thread], scratch.columns[1][thread]);
    if (key >= kNothing) return;
    lower_key(keys.columns + column_key + first + thread,
              make_key(key >> kIndexBits, first_row + static_cast<uint32_t>(key & kIndexMask)));
  }

  EFFOPS_DEVICE void finish_rows() {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int offset = 1; offset <= 2; offset *= 2) {
        const int32_t other_best = __shfl_xor_sync(kFullWarp, best[i], offset);
        const int32_t other_second = kSecond ? __shfl_xor_sync(kFullWarp, second[i], offset) : kLargest;
        merge_two(best[i], second[i], other_best, other_second);
      }
      if (place.lane % 4 == 0) {
        const int row = place.row(i);
        scratch.best[place.column_warp][row] = best[i];
        if constexpr (kSecond) scratch.second[place.column_warp][row] = second[i];
      }
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x);
    if (row >= rows) return;
    int32_t nearest = kLargest, next = kLargest;
#pragma unroll
    for (int warp = 0; warp < kColumnWarps; ++warp) {
      merge_two(nearest, next, scratch.best[warp][row], kSecond ? scratch.second[warp][row] : kLargest);
    }
    nearest -= row;
    next -= row;
    if (nearest < kNothing) publish(row, nearest, next);
  }

  // Of the keys that pass through `best` all but the smallest are pushed out, or never in. So `second`
  // ends as the smallest of the others whatever the order of the blocks.
  EFFOPS_DEVICE void publish(int row, int32_t nearest, int32_t next) const {
    const auto global = [&](int32_t key) {
      return make_key(key >> kIndexBits, first_column + static_cast<uint32_t>(key & kIndexMask));
    };
    const NeighbourKey key = global(nearest), old = lower_key(keys.best + row_key + row, key);
    if constexpr (kSecond) {
      NeighbourKey loser = max(old, key);
      if (next < kNothing) loser = min(loser, global(next));
      if (loser != kNoNeighbour) lower_key(keys.second + row_key + row, loser);
    }
  }
};

// keys.best[b, i] = min over j of (H(a[b, i], b[b, j]), j), keys.second: the next; keys.columns[b, j] = min
// over i of (H, i). Of the pairs that exist and the mask allows. Bit-reproducible: keys are unique integers.
//
// Parallelism: see hamming_tile_kernels.cuh; blocks meet in atomic minima, two per row and split, one per
// column and 128 rows. Bytes: the sets from the second-level cache, a `splits` times, b once per 128 rows,
// and the mask; no pair is stored. Bound by the minima, three integer operations per pair and one more for
// the columns: 27 us for 10k x 10k rows of 256 bits on an H100 (132 SMs, 64 lanes, 1.755 GHz), where the
// tensor cores need less; wider rows by the tensor cores. ScalarCounter by the units of popc, 6 per 256
// bits at 16 lanes: 162 us. Limits: rows of at most 4096 bits.
template <typename Counter, bool kSecond, bool kColumns, bool kMasked>
__global__ void __launch_bounds__(kTileThreads, Counter::kBlocks)
    hamming_nearest_kernel(HammingArguments arguments, HammingTiling tiling, NearestKeys keys) {
  if constexpr (Counter::kNative) {
    EFFOPS_SHARED(HammingTile, tile, 1);
    EFFOPS_SHARED(NearestScratch, scratch, 1);
    for (int64_t index = blockIdx.x; index < tiling.works; index += gridDim.x) {
      const TileWork work = tiling.work(arguments, index);
      if (work.is_empty()) continue;
      NearestVisitor<kSecond, kColumns, kMasked> visitor(arguments, work, keys, tile[0], scratch[0]);
      visit_tiles<Counter>(arguments, work, tile[0], visitor);
      visitor.finish_rows();
    }
  }
}

constexpr int kRowThreads = 256;

// distances, indices [B, Na, k], k = 1 or 2, from the keys. With keys.columns: mutual neighbours only.
// One thread per row. Bytes: 8 per key read, one column key gathered, 12 k written per row.
__global__ void __launch_bounds__(kRowThreads)
    hamming_neighbours_kernel(NearestKeys keys, int64_t rows, int64_t rows_a, int64_t rows_b, int k,
                              int32_t* distances, int64_t* indices) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x; row < rows; row += step) {
    const int64_t item = row / rows_a;
    NeighbourKey best = keys.best[row], second = k > 1 ? keys.second[row] : kNoNeighbour;
    if (best != kNoNeighbour && keys.is_one_sided(row - item * rows_a, item * rows_b, index_of(best))) {
      best = second = kNoNeighbour;
    }
    distances[row * k] = distance_of(best);
    indices[row * k] = index_of(best);
    if (k > 1) {
      distances[row * k + 1] = distance_of(second);
      indices[row * k + 1] = index_of(second);
    }
  }
}

// Sets the rows of distances, indices [B, Na, k] whose nearest neighbour isn't mutual to missing. A warp per
// row. Bytes: 16 read and, of such rows, 12 k written.
__global__ void __launch_bounds__(kRowThreads)
    hamming_drop_one_sided_kernel(NearestKeys keys, int64_t rows, int64_t rows_a, int64_t rows_b, int64_t k,
                                  int32_t* distances, int64_t* indices) {
  constexpr int kWarps = kRowThreads / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; row < rows;
       row += step) {
    const int64_t item = row / rows_a, nearest = indices[row * k];
    if (nearest == kNoIndex || !keys.is_one_sided(row - item * rows_a, item * rows_b, nearest)) continue;
    __syncwarp();  // all lanes have read the nearest
    for (int64_t i = row * k + lane; i < (row + 1) * k; i += kWarpSize) {
      distances[i] = kNoDistance;
      indices[i] = kNoIndex;
    }
  }
}

}  // namespace effops::binary
