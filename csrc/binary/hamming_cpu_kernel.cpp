// Hamming search on the CPU.
//
// d(i, j) = popcount(a_i xor b_j). The rows of b are packed group by group (hamming_tile_cpu.h) and compared
// with a tile of queries, two at a time, whose distances stay in registers. They are only compared with
// bounds: what a distance must be below to enter the query's list or to become the nearest of its row of b.
// That is rare once a few rows are known, and then the pair's distance is computed from the rows themselves.
// So neither a list of any length nor the nearest of every row of b costs more than a few operations per
// register of rows.
//
// Bound by arithmetic: per row and half byte one shuffle and one addition of a byte (AVX2), or per byte an
// xor, a count and an addition (AVX-512 BITALG). A group (AVX2: 8 KiB at 256 bits) stays in the first-level
// cache up to about 512 bits, the codes of a tile of queries in the second.
#include "hamming_tile_cpu.h"

namespace effops::binary {
namespace EFFOPS_ISA {
namespace {

constexpr int64_t kTileQueries = 1024;
constexpr int64_t kFewQueries = 3;  // that are not worth packing groups for

// Memory of a task. Bounds are what a distance must be below to matter; those of rows of b lie as Sums wants
// them.
template <typename Bound>
struct TileScratch {
  uint8_t* group;     // packed rows
  uint8_t* row_mask;  // [kGroupRows] of one query, filled up with zeros
  Bound* columns;     // [kGroupRows]
  Bound* queries;     // [kTileQueries]
  uint8_t* codes;     // of the tile's pairs of queries

  TileScratch(void* memory, int64_t bytes) {
    group = static_cast<uint8_t*>(memory);
    row_mask = group + group_bytes(bytes);
    columns = reinterpret_cast<Bound*>(row_mask + kGroupRows);
    queries = columns + kGroupRows;
    codes = reinterpret_cast<uint8_t*>(queries + kTileQueries);
  }

  static int64_t size(int64_t bytes) {
    return group_bytes(bytes) + kGroupRows + (kGroupRows + kTileQueries) * int64_t{sizeof(Bound)} +
           kTileQueries / kQueries * code_bytes(bytes);
  }
};

int64_t scratch_bytes(int64_t bytes) { return TileScratch<uint16_t>::size(bytes); }

EFFOPS_INLINE int64_t queries_of_tile(const HammingTask& task, int64_t tile) {
  return task.rows_a - tile < kTileQueries ? task.rows_a - tile : kTileQueries;
}

void encode_tile(const HammingTask& task, int64_t tile, int64_t queries, uint8_t* codes) {
  for (int64_t query = 0; query < queries; query += kQueries, codes += code_bytes(task.bytes)) {
    const uint8_t* row = task.a + (tile + query) * task.bytes;
    encode_pair(row, query + 1 < queries ? row + task.bytes : nullptr, task.bytes, codes);
  }
}

// Packs the group that begins at row `first`; returns its rows.
int64_t pack_group(const HammingTask& task, int64_t first, uint8_t* packed) {
  const int64_t count = task.end_b - first < kGroupRows ? task.end_b - first : kGroupRows;
  pack_rows(task.b + first * task.bytes, count, task.bytes, packed);
  return count;
}

// ---------------------------------------------------------------- lists of neighbours

// Puts `key` in place of the largest key, at the root of a heap of k keys.
EFFOPS_INLINE void replace_root(NeighbourKey* heap, int64_t k, NeighbourKey key) {
  int64_t node = 0;
  while (true) {
    int64_t child = 2 * node + 1;
    if (child >= k) break;
    if (child + 1 < k && heap[child + 1] > heap[child]) ++child;
    if (heap[child] <= key) break;
    heap[node] = heap[child];
    node = child;
  }
  heap[node] = key;
}

void sort_heap(NeighbourKey* heap, int64_t k) {
  for (int64_t last = k - 1; last > 0; --last) {
    const NeighbourKey key = heap[last];
    heap[last] = heap[0];
    replace_root(heap, last, key);
  }
}

// Offers row j of b to row i of a (of the task), which is nearer than one of the bounds or may be.
EFFOPS_INLINE void offer(const SearchTask& task, int64_t i, int64_t j) {
  const int32_t distance = exact_distance(task.a + i * task.bytes, task.b + j * task.bytes, task.bytes);
  NeighbourKey* heap = task.neighbours + i * task.k;
  if (const NeighbourKey key = make_key(distance, j); key < heap[0]) replace_root(heap, task.k, key);
  if (task.columns != nullptr) {
    const NeighbourKey key = make_key(distance, task.first_a + i);
    if (key < task.columns[j]) task.columns[j] = key;
  }
}

// ---------------------------------------------------------------- a group of rows

// Rows of b [first, first + count) against the queries [0, queries) of the tile that begins at row `tile`.
struct Group {
  int64_t first, count, tile, queries;
};

// How distances are summed and compared. A sum may be smaller than the distance where bits differ in a whole
// part of kPartBytes, and bounds are clamped to kMostBound, sums to one less: so nothing that is below its
// bound is missed, and take() knows the exact distances.
constexpr int64_t kPartBytes = 32;

// Up to kPartBytes: in 8 bits.
struct NarrowSums {
  using Bound = uint8_t;
  using Sum = Bytes;
  static constexpr int32_t kMostBound = 255;
  static constexpr int64_t place(int64_t row) { return row; }
  static EFFOPS_INLINE void sum(const uint8_t* codes, const uint8_t* rows, int64_t bytes,
                                Sum (&sums)[kQueries * kBlocks]) {
    Counter::sum(codes, rows, bytes * Counter::kPlacesPerByte, sums, AllBlocks{});
    for (Sum& sum : sums) sum = smaller(sum, splat(uint8_t{kMostBound - 1}));
  }
  // Lanes whose distance is below the bound of the query or of the lane's row.
  static EFFOPS_INLINE Bytes hits(Sum sum, Bound query, const Bound* rows) {
    return below(sum, larger(splat(query), load<Bytes>(rows)));
  }
};

// Any length: in 16 bits.
struct WideSums {
  using Bound = uint16_t;
  using Sum = Words;
  static constexpr int32_t kMostBound = 0xffff;
  static constexpr int64_t place(int64_t row) {
    return row / kByteLanes * kByteLanes + place_of_word(row % kByteLanes);
  }
  static EFFOPS_INLINE void sum(const uint8_t* codes, const uint8_t* rows, int64_t bytes,
                                Sum (&sums)[kQueries * kBlocks]) {
    for (Sum& sum : sums) sum = Sum{};
    for (int64_t start = 0; start < bytes; start += kPartBytes) {
      ByteSums part;
      Counter::sum(codes + code_bytes(start), rows + group_bytes(start),
                   (bytes - start < kPartBytes ? bytes - start : kPartBytes) * Counter::kPlacesPerByte, part,
                   AllBlocks{});
      for (int i = 0; i < kQueries * kBlocks; ++i) add(sums[i], part[i]);
    }
  }
  static EFFOPS_INLINE Bytes hits(const Sum& sum, Bound query, const Bound* rows) {
    const HalfWords bound = splat(query);
    return below(
        sum, {larger(bound, load<HalfWords>(rows)), larger(bound, load<HalfWords>(rows + kByteLanes / 2))});
  }
};

template <typename Sums>
EFFOPS_INLINE typename Sums::Bound bound_of(NeighbourKey worst) {
  const NeighbourKey distance = worst >> 32;
  return static_cast<typename Sums::Bound>(distance < Sums::kMostBound ? distance : Sums::kMostBound);
}

template <typename Sums>
EFFOPS_INLINE void set_column_bounds(const SearchTask& task, const Group& group,
                                     typename Sums::Bound* columns) {
  for (int64_t row = 0; row < kGroupRows; ++row) {
    const bool wanted = task.columns != nullptr && row < group.count;
    columns[Sums::place(row)] = wanted ? bound_of<Sums>(task.columns[group.first + row]) : 0;
  }
}

// Takes the rows of a group that are hits. Bounds sink on the way: most rows of a query's first group are
// hits only because nothing was known before.
template <typename Sums>
__attribute__((noinline)) void take(const SearchTask& task, const Group& group, int64_t query,
                                    const Bytes* hits, const typename Sums::Sum* sums,
                                    const TileScratch<typename Sums::Bound>& scratch) {
  constexpr int kWordBlocks = 64 / kByteLanes;
  const auto* distances = reinterpret_cast<const typename Sums::Bound*>(sums);
  typename Sums::Bound& bound = scratch.queries[query];
  for (int64_t word = 0; word < kBlocks / kWordBlocks; ++word) {
    LaneMask lanes = 0;
    for (int i = 0; i < kWordBlocks; ++i)
      lanes |= lanes_set(hits[word * kWordBlocks + i]) << (i * kByteLanes % 64);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int64_t row = 64 * word + __builtin_ctzll(lanes), place = Sums::place(row);
      if (distances[place] >= bound && distances[place] >= scratch.columns[place]) continue;
      if (row >= group.count) break;
      offer(task, group.tile + query, group.first + row);
      bound = bound_of<Sums>(task.neighbours[(group.tile + query) * task.k]);
      if (task.columns != nullptr) scratch.columns[place] = bound_of<Sums>(task.columns[group.first + row]);
    }
  }
}

// The query's mask for the rows of the group, or null.
EFFOPS_INLINE const uint8_t* group_mask(const SearchTask& task, const Group& group, int64_t query,
                                        uint8_t* row_mask) {
  if (task.mask == nullptr) return nullptr;
  const uint8_t* mask = task.mask + (group.tile + query) * task.mask_stride + group.first;
  if (group.count == kGroupRows) return mask;
  memcpy(row_mask, mask, group.count);
  return row_mask;
}

template <typename Sums>
EFFOPS_INLINE void compare(const SearchTask& task, const Group& group, int64_t query,
                           const typename Sums::Sum* sums, const TileScratch<typename Sums::Bound>& scratch) {
  const uint8_t* mask = group_mask(task, group, query, scratch.row_mask);
  Bytes hits[kBlocks], any = {};
  for (int block = 0; block < kBlocks; ++block) {
    hits[block] = Sums::hits(sums[block], scratch.queries[query], scratch.columns + block * kByteLanes);
    if (mask != nullptr) hits[block] &= below(Bytes{}, load<Bytes>(mask + block * kByteLanes));
    any |= hits[block];
  }
  if (__builtin_expect(lanes_set(any) != 0, 0)) take<Sums>(task, group, query, hits, sums, scratch);
}

template <typename Sums>
void search_tile(const SearchTask& task, int64_t tile, int64_t queries, void* memory) {
  const TileScratch<typename Sums::Bound> scratch(memory, task.bytes);
  encode_tile(task, tile, queries, scratch.codes);
  for (int64_t query = 0; query < queries; ++query) scratch.queries[query] = Sums::kMostBound;
  memset(scratch.row_mask, 0, kGroupRows);
  for (int64_t first = task.begin_b; first < task.end_b; first += kGroupRows) {
    const int64_t count = pack_group(task, first, scratch.group);
    const Group group = {first, count, tile, queries};
    set_column_bounds<Sums>(task, group, scratch.columns);
    const uint8_t* codes = scratch.codes;
    for (int64_t query = 0; query < queries; query += kQueries, codes += code_bytes(task.bytes)) {
      typename Sums::Sum sums[kQueries * kBlocks];
      Sums::sum(codes, scratch.group, task.bytes, sums);
      compare<Sums>(task, group, query, sums, scratch);
      if (query + 1 < queries) compare<Sums>(task, group, query + 1, sums + kBlocks, scratch);
    }
  }
}

// Every pair on its own. kBytes: of a row, if it is known (the loop over its words is unrolled), or 0.
template <int64_t kBytes>
void search_directly(const SearchTask& task) {
  const int64_t bytes = kBytes > 0 ? kBytes : task.bytes;
  for (int64_t i = 0; i < task.rows_a; ++i) {
    const uint8_t* query = task.a + i * bytes;
    const uint8_t* mask = task.mask == nullptr ? nullptr : task.mask + i * task.mask_stride;
    const NeighbourKey& worst = task.neighbours[i * task.k];
    NeighbourKey bound = worst;
    for (int64_t j = task.begin_b; j < task.end_b; ++j) {
      if (mask != nullptr && mask[j] == 0) continue;
      const NeighbourKey key = make_key(exact_distance(query, task.b + j * bytes, bytes), j);
      if (key >= bound && task.columns == nullptr) continue;
      offer(task, i, j);
      bound = worst;
    }
  }
}

void search(const SearchTask& task, void* memory) {
  for (int64_t i = 0; i < task.rows_a * task.k; ++i) task.neighbours[i] = kNoNeighbour;
  if (task.rows_a <= kFewQueries) {
    (task.bytes == 32 ? search_directly<32> : search_directly<0>)(task);
  } else {
    const auto tile_kernel = task.bytes <= kPartBytes ? search_tile<NarrowSums> : search_tile<WideSums>;
    for (int64_t tile = 0; tile < task.rows_a; tile += kTileQueries) {
      tile_kernel(task, tile, queries_of_tile(task, tile), memory);
    }
  }
  for (int64_t i = 0; i < task.rows_a; ++i) sort_heap(task.neighbours + i * task.k, task.k);
}

// ---------------------------------------------------------------- all distances

// Writes the distances of a pair of queries to the rows of a group, `columns` of them, into `rows` rows of
// the output.
EFFOPS_INLINE void write_distances(const HammingTask& task, const uint8_t* codes, const uint8_t* group,
                                   int64_t rows, int64_t columns, int32_t* out, int64_t out_stride) {
  constexpr int64_t kExactBytes = kPartBytes - 1;  // of a part whose sum always fits into 8 bits
  int32_t totals[kQueries * kGroupRows] = {};
  for (int64_t start = 0; start < task.bytes; start += kExactBytes) {
    const int64_t bytes = task.bytes - start < kExactBytes ? task.bytes - start : kExactBytes;
    ByteSums sums;
    Counter::sum(codes + code_bytes(start), group + group_bytes(start), bytes * Counter::kPlacesPerByte, sums,
                 AllBlocks{});
    uint8_t part[sizeof(sums)];
    memcpy(part, sums, sizeof(sums));
    for (int i = 0; i < kQueries * kGroupRows; ++i) totals[i] += part[i];
  }
  for (int64_t row = 0; row < rows; ++row) {
    memcpy(out + row * out_stride, totals + row * kGroupRows, columns * sizeof(int32_t));
  }
}

void distances(const HammingTask& task, int32_t* out, int64_t out_stride, void* memory) {
  if (task.rows_a <= kFewQueries) {
    for (int64_t i = 0; i < task.rows_a; ++i) {
      for (int64_t j = task.begin_b; j < task.end_b; ++j) {
        out[i * out_stride + j] =
            exact_distance(task.a + i * task.bytes, task.b + j * task.bytes, task.bytes);
      }
    }
    return;
  }
  const TileScratch<uint16_t> scratch(memory, task.bytes);
  for (int64_t tile = 0; tile < task.rows_a; tile += kTileQueries) {
    const int64_t queries = queries_of_tile(task, tile);
    encode_tile(task, tile, queries, scratch.codes);
    for (int64_t first = task.begin_b; first < task.end_b; first += kGroupRows) {
      const int64_t count = pack_group(task, first, scratch.group);
      const uint8_t* codes = scratch.codes;
      for (int64_t query = 0; query < queries; query += kQueries, codes += code_bytes(task.bytes)) {
        const int64_t rows = queries - query < kQueries ? queries - query : kQueries;
        write_distances(task, codes, scratch.group, rows, count, out + (tile + query) * out_stride + first,
                        out_stride);
      }
    }
  }
}

}  // namespace

extern const HammingKernels hamming_kernels = {scratch_bytes, search, distances};

}  // namespace EFFOPS_ISA
}  // namespace effops::binary
