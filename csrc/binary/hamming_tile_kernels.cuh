// Tiles of pairs: what the kernels that look at all pairs of rows share. No torch, no launches.
//
//   H(a, b) = |a| + |b| - 2 popc(a & b)
//
// A block takes 128 rows of a and walks over columns (rows of b) in tiles of 128. Both are staged in shared
// memory, 256 bits of each at a time, zero-padded, so that rows of any width and alignment look the same; the
// norms are counted on the way. Its 8 warps (2 x 4, 64 x 32 pairs each) count the common ones of the pairs,
// and hand 64 counts per thread, in the layout of the tensor cores, to a visitor. The words of the next tile
// are not fetched ahead, for which there are no registers: on tensor cores another block of the
// multiprocessor counts meanwhile.
#pragma once

#include "../common/warp.h"
#include "hamming_math.h"

namespace effops::binary {

struct HammingSet {
  const uint8_t* data;  // [B, rows, bytes]
  int64_t rows;
  const int64_t* lengths;  // [B], or null: all rows exist

  EFFOPS_DEVICE int64_t length(int64_t item) const {
    if (lengths == nullptr) return rows;
    const int64_t length = lengths[item];
    return length < 0 ? 0 : length < rows ? length : rows;
  }
};

struct HammingArguments {
  HammingSet a, b;
  int32_t bytes;  // of a row
  int32_t alignment;  // of every row: 16, 4 or 1 bytes
  const uint8_t* mask;  // [Na, Nb] per batch item, or null
  int64_t mask_stride;  // from one batch item to the next

  EFFOPS_DEVICE const uint8_t* row_of(const HammingSet& set, int64_t item, int64_t row) const {
    return set.data + (item * set.rows + row) * bytes;
  }
  EFFOPS_DEVICE const uint8_t* mask_of(int64_t item, int64_t row) const {
    return mask + item * mask_stride + row * b.rows;
  }
  EFFOPS_DEVICE bool allows(int64_t item, int64_t row, int64_t column) const {
    return mask == nullptr || mask_of(item, row)[column] != 0;
  }
};

constexpr int kTile = 128;  // rows, and columns
constexpr int kTileThreads = 256;
constexpr int kRowWarps = 2, kColumnWarps = 4;
constexpr int kChunkBytes = 32;  // of a row, staged at a time
// Words between rows in shared memory: fragments, and 16-byte reads of 8 rows, touch each bank once.
constexpr int kStagedStride = 12;

using Words = Pack<uint32_t, 4>;

// 16 bytes of a row from `begin` on, zeros past its end.
EFFOPS_DEVICE Words load_words(const uint8_t* row, int32_t begin, int32_t bytes, int32_t alignment) {
  Words words = {};
  if (alignment == 16) {
    if (begin < bytes) words = load_pack<4>(reinterpret_cast<const uint32_t*>(row + begin));
    return words;
  }
  if (alignment == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t first = begin + 4 * i;
      if (first < bytes) words.data[i] = load_pack<1>(reinterpret_cast<const uint32_t*>(row + first)).data[0];
    }
    return words;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (begin + i < bytes) words.data[i / 4] |= uint32_t{row[begin + i]} << (8 * (i % 4));
  }
  return words;
}

// popc runs at a quarter of the rate of logic: a full adder saves one of four.
EFFOPS_DEVICE int32_t count_ones(const Words& x) {
  const uint32_t ones = x.data[0] ^ x.data[1] ^ x.data[2];
  const uint32_t twos = (x.data[0] & x.data[1]) | (x.data[2] & (x.data[0] ^ x.data[1]));
  return __popc(ones) + __popc(x.data[3]) + 2 * __popc(twos);
}

EFFOPS_DEVICE int32_t chunks_of(int32_t bytes) {
  return bytes > kChunkBytes ? (bytes + kChunkBytes - 1) / kChunkBytes : 1;
}

// ------------------------------------------------------------------------------------------- counting

struct HammingTile {
  uint32_t rows[kTile * kStagedStride], columns[kTile * kStagedStride];
  int32_t row_constants[kTile], column_constants[kTile];  // the visitor's
};

// The pairs (row(i), column(n, e)), i < 8, n < 4, e < 2, of a thread: counts[i / 2][n][2 * (i % 2) + e].
using PairCounts = int32_t[4][4][4];

struct TilePlace {
  int lane, row_warp, column_warp;
  EFFOPS_DEVICE explicit TilePlace(unsigned thread)
      : lane(static_cast<int>(thread) % kWarpSize),
        row_warp(static_cast<int>(thread) / kWarpSize / kColumnWarps),
        column_warp(static_cast<int>(thread) / kWarpSize % kColumnWarps) {}

  EFFOPS_DEVICE int row(int i) const { return row_warp * (kTile / kRowWarps) + 8 * i + lane / 4; }
  EFFOPS_DEVICE int column(int n, int e) const {
    return column_warp * (kTile / kColumnWarps) + 8 * n + 2 * (lane % 4) + e;
  }
};

// Four words in shared memory.
EFFOPS_DEVICE Words staged_words(const uint32_t* words) { return *reinterpret_cast<const Words*>(words); }

// Counts by popc.
struct ScalarCounter {
  static constexpr bool kNative = true;
  static constexpr int kBlocks = 1;  // of a multiprocessor: two leave too few registers

  EFFOPS_DEVICE static void add(const HammingTile& tile, const TilePlace& place, PairCounts& counts) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const uint32_t* rows = tile.rows + 4 * half;
      const uint32_t* columns = tile.columns + 4 * half;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const Words column[2] = {staged_words(columns + place.column(n, 0) * kStagedStride),
                                 staged_words(columns + place.column(n, 1) * kStagedStride)};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          __syncwarp();  // keeps the compiler from holding many rows in registers
          const Words row = staged_words(rows + place.row(i) * kStagedStride);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            Words common;
#pragma unroll
            for (int w = 0; w < 4; ++w) common.data[w] = row.data[w] & column[e].data[w];
            counts[i / 2][n][2 * (i % 2) + e] += count_ones(common);
          }
        }
      }
    }
  }
};

// Counts by the tensor cores.
struct TensorCounter {
  static constexpr bool kNative = kHasBitMma;
  static constexpr int kBlocks = 2;

  EFFOPS_DEVICE static void add(const HammingTile& tile, const TilePlace& place, PairCounts& counts) {
    const int g = place.lane / 4, q = place.lane % 4;
    uint32_t columns[4][2];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = place.column_warp * (kTile / kColumnWarps) + 8 * n + g;
      const uint32_t* words = tile.columns + column * kStagedStride + q;
      columns[n][0] = words[0];
      columns[n][1] = words[4];
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const uint32_t* upper = tile.rows + place.row(2 * m) * kStagedStride + q;
      const uint32_t* lower = tile.rows + place.row(2 * m + 1) * kStagedStride + q;
      const uint32_t rows[4] = {upper[0], lower[0], upper[4], lower[4]};
#pragma unroll
      for (int n = 0; n < 4; ++n) add_common_ones(counts[m][n], rows, columns[n]);
    }
  }
};

// --------------------------------------------------------------------------------------------- walking

// What one block does: rows [first_row, end_row) of a, at most kTile, with columns [first_column,
// end_column).
struct TileWork {
  int64_t item;  // of the batch
  int64_t first_row, end_row, first_column, end_column;

  EFFOPS_DEVICE bool is_empty() const { return first_row >= end_row || first_column >= end_column; }
};

// Calls, for every tile, in all threads of the block,
//   visitor.stage(first)           between two barriers, to fill shared memory of its own
//   visitor.visit(counts, first)
// where `first` is the tile's first column, counted from work.first_column. tile.row_constants[i] is
// visitor.row_constant(norm, i), and so for columns; rows and columns that don't exist have no ones and
// visitor.kAbsent. The work isn't empty.
template <typename Counter, typename Visitor>
EFFOPS_DEVICE void visit_tiles(const HammingArguments& arguments, const TileWork& work, HammingTile& tile,
                               Visitor& visitor) {
  const TilePlace place(threadIdx.x);
  // Two threads stage a row, and a column.
  const int slot = static_cast<int>(threadIdx.x) / 2, half = static_cast<int>(threadIdx.x) % 2;
  const int at = slot * kStagedStride + 4 * half;
  const int32_t bytes = arguments.bytes, chunks = chunks_of(bytes);
  const int32_t count = static_cast<int32_t>(work.end_column - work.first_column);
  const bool row_exists = work.first_row + slot < work.end_row;
  const uint8_t* row = arguments.row_of(arguments.a, work.item, work.first_row + (row_exists ? slot : 0));
  const uint8_t* columns = arguments.row_of(arguments.b, work.item, work.first_column);
  const auto load = [&](const uint8_t* data, int32_t chunk) {
    return load_words(data, chunk * kChunkBytes + 16 * half, bytes, arguments.alignment);
  };
  const auto load_column = [&](int32_t column, int32_t chunk) {
    return column < count ? load(columns + static_cast<int64_t>(column) * bytes, chunk) : Words{};
  };
  for (int32_t first = 0; first < count; first += kTile) {
    int32_t row_norm = 0, column_norm = 0;
    PairCounts counts = {};
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
      const bool has_rows = first == 0 || chunks > 1;  // a single chunk of the rows stays
      const Words row_words = has_rows && row_exists ? load(row, chunk) : Words{};
      const Words next = load_column(first + slot, chunk);
      __syncthreads();  // nobody reads the tile any more
      if (has_rows) *reinterpret_cast<Words*>(tile.rows + at) = row_words;
      *reinterpret_cast<Words*>(tile.columns + at) = next;
      row_norm += count_ones(row_words);
      column_norm += count_ones(next);
      const bool is_last = chunk + 1 == chunks;
      if (is_last) {
        visitor.stage(first);
        row_norm += __shfl_xor_sync(kFullWarp, row_norm, 1);
        column_norm += __shfl_xor_sync(kFullWarp, column_norm, 1);
        if (half == 0) {
          tile.column_constants[slot] =
              first + slot < count ? visitor.column_constant(column_norm, first + slot) : Visitor::kAbsent;
        } else if (has_rows) {
          tile.row_constants[slot] = row_exists ? visitor.row_constant(row_norm, slot) : Visitor::kAbsent;
        }
      }
      __syncthreads();
      Counter::add(tile, place, counts);
    }
    visitor.visit(counts, first);
  }
}

// -------------------------------------------------------------------------------------------- geometry

struct HammingTiling {
  int64_t row_tiles, splits;  // of a batch item
  int64_t split_columns;
  int64_t works;  // items * row_tiles * splits

  // The row tiles of a split are neighbours, so that they find its columns in the caches.
  EFFOPS_DEVICE TileWork work(const HammingArguments& arguments, int64_t index) const {
    TileWork result;
    const int64_t rest = index / row_tiles;
    result.first_row = index % row_tiles * kTile;
    result.item = rest / splits;
    result.first_column = rest % splits * split_columns;
    result.end_row = min(result.first_row + kTile, arguments.a.length(result.item));
    result.end_column = min(result.first_column + split_columns, arguments.b.length(result.item));
    return result;
  }
};

// slots: blocks that the device runs at a time. max_columns: of a split, a multiple of kTile.
inline HammingTiling make_hamming_tiling(int64_t batch, int64_t rows_a, int64_t rows_b, int64_t slots,
                                         int64_t max_columns) {
  constexpr int64_t kMaxWaves = 4;
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t row_tiles = divide_up(rows_a, kTile), tiles = divide_up(rows_b, kTile);
  const int64_t blocks = batch * row_tiles;
  if (blocks == 0 || tiles == 0) return {row_tiles, 0, 0, 0};
  int64_t best_time = INT64_MAX, best = 0;
  for (int64_t waves = 1; waves <= kMaxWaves; ++waves) {
    int64_t splits = waves * slots / blocks;
    splits = splits < tiles ? splits : tiles;
    const int64_t fewest = divide_up(tiles, max_columns / kTile);
    const int64_t tiles_each = divide_up(tiles, splits > fewest ? splits : fewest);
    // In tiles; a block's start and end take about as long as a tile.
    const int64_t time = divide_up(blocks * divide_up(tiles, tiles_each), slots) * (tiles_each + 1);
    if (time < best_time) {
      best_time = time;
      best = tiles_each;
    }
  }
  const int64_t splits = divide_up(tiles, best);
  return {row_tiles, splits, best * kTile, blocks * splits};
}

}  // namespace effops::binary
