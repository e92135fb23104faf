// CUDA kernels of sps_refine. No torch, no launches.
//
// The sizes of the result are known beforehand, so that nothing waits for the device:
//   refine_select_kernel, once per digit of a key and once more: the bound of the scores to keep
//   a scan (scan_kernels.cuh) of the kept rows: new_ids, and the cells of the new active rows
//   refine_map_kernel, refine_rows_kernel: the new map, the new rows
#pragma once

#include "../common/order_key.h"
#include "id_map_kernels.cuh"
#include "scan_kernels.cuh"

namespace effops::rowconv {

constexpr int64_t kMaxRefineRows = INT32_MAX;  // of active ones: the scan holds two counts in an integer

// ------------------------------------------------------------------------------------------------ bound

// A contiguous vector of scores.
struct ScoreView {
  const void* data;
  FloatType type;

  EFFOPS_HD int key_bits() const { return type == FloatType::kDouble ? 64 : 32; }

  // Integers > 0 and < 2^key_bits() - 1 in the order of the scores, NaN the largest, -0 equal to 0.
  EFFOPS_DEVICE uint64_t key(int64_t i) const {
    switch (type) {
      case FloatType::kFloat: return key_of_type<float>(i);
      case FloatType::kDouble: return key_of_type<double>(i);
      case FloatType::kBFloat16: return key_of_type<bf16>(i);
      default: return key_of_type<f16>(i);
    }
  }

 private:
  template <typename T>
  EFFOPS_DEVICE uint64_t key_of_type(int64_t i) const {
    using A = accumulator_t<T>;
    using Unsigned = typename KeyOf<A>::Unsigned;
    const A score = widen(load_pack<1>(static_cast<const T*>(data) + i).data[0]);
    return static_cast<Unsigned>(static_cast<Unsigned>(key_of(score)) - static_cast<Unsigned>(kNoKey<A>));
  }
};

// The highest scores are those of keys > key and the first `ties` of those with that key. While it is looked
// for: the first digits of the key are known, and `ties` are wanted of the scores whose keys have them.
struct RefineBound {
  uint64_t key;
  int64_t ties;
};

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kSelectScores = 8 * kScanThreads;  // that a block counts, or more

struct RefineSelect {
  ScoreView scores;
  int64_t active, kept;  // 0 < kept < active
  RefineBound* bounds;   // [passes() + 1]
  uint32_t* counts;      // [passes(), kDigits], zeros at first

  EFFOPS_HD int passes() const { return (scores.key_bits() + kDigitBits - 1) / kDigitBits; }
  // Bits of the key below the digit of a pass.
  EFFOPS_HD int shift(int pass) const {
    const int rest = scores.key_bits() - (pass + 1) * kDigitBits;
    return rest > 0 ? rest : 0;
  }
  // Bits of the key from the digit of a pass on.
  EFFOPS_HD int open_bits(int pass) const { return scores.key_bits() - pass * kDigitBits; }
};

// The digits from the highest on, as items of a scan.
struct DigitSource {
  const uint32_t* counts;

  EFFOPS_DEVICE int64_t count(int64_t item) const { return counts[kDigits - 1 - item]; }
};

// Pass p: each block adds the digit that the counts of pass p - 1 give to the bound, then counts the next
// digit of the scores whose keys begin with it. After the last digit a pass of one block completes the bound.
//
// Parallelism: a thread per score. Bytes: the scores three times (six in float64), from the second-level
// cache; 8 KB of counts per block and pass. Bound by latency: 2 to 3 us per pass for 10^5 scores on an H100.
__global__ void __launch_bounds__(kScanThreads) refine_select_kernel(RefineSelect select, int pass) {
  EFFOPS_SHARED(uint32_t, found, kDigits);
  EFFOPS_SHARED(int64_t, parts, kScanWarps);
  EFFOPS_SHARED(RefineBound, shared_bound, 1);
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kScanThreads) found[i] = 0;
  if (pass == 0) {
    if (threadIdx.x == 0) shared_bound[0] = {0, select.kept};
  } else {
    const RefineBound before = select.bounds[pass - 1];
    scan_run(DigitSource{select.counts + int64_t{pass - 1} * kDigits}, 0, kDigits, 0, parts,
             [&](int64_t item, int64_t above, int64_t count) {
               if (above >= before.ties || above + count < before.ties) return;
               const auto digit = static_cast<uint64_t>(kDigits - 1 - item);
               shared_bound[0] = {before.key | digit << select.shift(pass - 1), before.ties - above};
             });
  }
  __syncthreads();
  const RefineBound bound = shared_bound[0];
  if (blockIdx.x == 0 && threadIdx.x == 0) select.bounds[pass] = bound;
  if (pass == select.passes()) return;
  const int shift = select.shift(pass), open = select.open_bits(pass);
  const auto is_open = [&](uint64_t key) { return open == 64 || key >> open == bound.key >> open; };
  const int64_t step = int64_t{gridDim.x} * kScanThreads;
  for (int64_t i = int64_t{blockIdx.x} * kScanThreads + threadIdx.x; i < select.active; i += step) {
    const uint64_t key = select.scores.key(i);
    if (is_open(key)) atomicAdd(found + (key >> shift & (kDigits - 1)), 1u);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kScanThreads) {
    if (found[i] != 0) atomicAdd(select.counts + int64_t{pass} * kDigits + i, found[i]);
  }
}

// ------------------------------------------------------------------------------------------------- rows

struct RefineShape {
  int64_t active, passive;          // NA, NP
  int64_t new_active, new_passive;  // NA', NP'
  int64_t children;                 // of a kept row: 4 or 1
};

// Counts above the bound in the upper half of an integer, ties in the lower one.
struct KeptRowSource {
  ScoreView scores;
  const RefineBound* bound;    // null: this one
  RefineBound constant_bound;  // of all or none

  EFFOPS_DEVICE RefineBound known_bound() const { return bound != nullptr ? *bound : constant_bound; }
  EFFOPS_DEVICE int64_t count(int64_t row) const {
    const uint64_t key = scores.key(row), limit = known_bound().key;
    return key > limit ? int64_t{1} << 32 : key == limit ? 1 : 0;
  }
};

// new_ids[i] = the first id of active row i in the result; roi and xy of the rows that it becomes.
// Bytes: the scores twice, 8 B per row, 12 B read and 12 B per child written of kept rows.
struct RefineSink {
  KeptRowSource source;
  RefineShape shape;
  const int32_t *roi, *xy;
  int64_t* new_ids;
  int32_t *new_roi, *new_xy;

  EFFOPS_DEVICE void put(int64_t row, int64_t before, int64_t count) const {
    const int64_t ties = source.known_bound().ties;
    const int64_t above = before >> 32, equal = before & 0xffffffff;
    const int64_t kept = above + min(equal, ties);
    if (count > 1 || (count == 1 && equal < ties)) {
      new_ids[row] = kept * shape.children;
      write_cells(row, kept);
    } else {
      new_ids[row] = shape.new_active + shape.passive + row - kept;
    }
  }
  EFFOPS_DEVICE void finish(int64_t) const {}

 private:
  EFFOPS_DEVICE void write_cells(int64_t row, int64_t kept) const {
    const int32_t r = roi[row], x = xy[2 * row], y = xy[2 * row + 1];
    if (shape.children == 1) {
      new_roi[kept] = r;
      *reinterpret_cast<Pack<int32_t, 2>*>(new_xy + 2 * kept) = {{x, y}};
      return;
    }
    const int32_t left = twice(x), upper = twice(y), right = left | 1, lower = upper | 1;
    *reinterpret_cast<Pack<int32_t, 4>*>(new_roi + 4 * kept) = {{r, r, r, r}};
    auto* cells = reinterpret_cast<Pack<int32_t, 4>*>(new_xy + 8 * kept);
    cells[0] = {{left, upper, right, upper}};
    cells[1] = {{left, lower, right, lower}};
  }
  // Cells outside the map may be anywhere.
  static EFFOPS_DEVICE int32_t twice(int32_t value) {
    return static_cast<int32_t>(2 * static_cast<uint32_t>(value));
  }
};

// The features of each row to the rows that it becomes, old passive rows in front of the demoted ones. Rows
// are of `words` words of kBytes.
//
// Parallelism: 2^lanes_log2 lanes per row, a word each. Bytes: the rows once, the new ones once. Bound by
// bandwidth.
template <int kBytes>
__global__ void __launch_bounds__(kCellThreads)
    refine_rows_kernel(RefineShape shape, const uint8_t* active, const uint8_t* passive, int64_t words,
                       int lanes_log2, const int64_t* new_ids, uint8_t* new_active, uint8_t* new_passive) {
  for_own_cells((shape.active + shape.passive) << lanes_log2, [&](int64_t thread) {
    const int64_t row = thread >> lanes_log2, row_bytes = words * kBytes;
    const bool is_active = row < shape.active;
    const int64_t id = is_active ? new_ids[row] : shape.new_active + row - shape.active;
    const bool is_kept = id < shape.new_active;
    const uint8_t* from = is_active ? active + row * row_bytes : passive + (row - shape.active) * row_bytes;
    uint8_t* to = is_kept ? new_active + id * row_bytes : new_passive + (id - shape.new_active) * row_bytes;
    const int64_t copies = is_kept ? shape.children : 1;
    for (int64_t w = thread & ((1 << lanes_log2) - 1); w < words; w += int64_t{1} << lanes_log2) {
      const auto word = load_pack_once<kBytes>(from + w * kBytes);
      for (int64_t k = 0; k < copies; ++k) store_pack_once<kBytes>(to + k * row_bytes + w * kBytes, word);
    }
  });
}

// -------------------------------------------------------------------------------------------------- map

// The new ids of all cells, in 2 x 2 cells each if kDoubles; -1 for ids out of range.
//
// Parallelism: a thread per cell, which writes two neighbours at a time. Bytes: the map once, 8 B per active
// cell, the new map once. Bound by bandwidth.
template <typename NewId, bool kDoubles>
__global__ void __launch_bounds__(kCellThreads)
    refine_map_kernel(RefineShape shape, CellGrid grid, IdMap map, const int64_t* new_ids, NewId* new_map) {
  for_own_cells(grid.cells(), [&](int64_t cell) {
    const int64_t id = map.at(cell);
    int64_t new_id = -1;
    if (id >= shape.active && id - shape.active < shape.passive)
      new_id = shape.new_active + id - shape.active;
    if (id >= 0 && id < shape.active) new_id = new_ids[id];
    if constexpr (kDoubles) {
      const int64_t child = new_id >= 0 && new_id < shape.new_active ? 1 : 0;
      const auto pair = [&](int64_t first) {
        return Pack<NewId, 2>{{static_cast<NewId>(first), static_cast<NewId>(first + child)}};
      };
      grid.split(cell, [&](int64_t r, int64_t y, int64_t x) {
        NewId* upper = new_map + 2 * ((r * grid.height + y) * 2 * grid.width + x);
        store_pack_once<2>(upper, pair(new_id));
        store_pack_once<2>(upper + 2 * grid.width, pair(new_id + 2 * child));
      });
    } else {
      new_map[cell] = static_cast<NewId>(new_id);
    }
  });
}

// --------------------------------------------------------------------------------------------- backward

// grad_active[i] = the sum of its children's rows of new_grad_active if it was kept, else its row of
// new_grad_passive; grad_passive[q] = new_grad_passive[q]. Either may be null. Ids out of range give 0.
//
// Parallelism: 2^lanes_log2 lanes per row, kVector features each. Bytes: the new gradients once, the others
// once. Bound by bandwidth.
template <typename T, int kVector>
__global__ void __launch_bounds__(kCellThreads)
    refine_gradient_kernel(RefineShape shape, const T* new_grad_active, const T* new_grad_passive,
                           const int64_t* new_ids, int64_t features, int lanes_log2, T* grad_active,
                           T* grad_passive) {
  for_own_cells((shape.active + shape.passive) << lanes_log2, [&](int64_t thread) {
    const int64_t row = thread >> lanes_log2;
    const bool is_active = row < shape.active;
    T* out = is_active ? grad_active : grad_passive;
    if (out == nullptr) return;
    out += (is_active ? row : row - shape.active) * features;
    const int64_t id = is_active ? new_ids[row] : shape.new_active + row - shape.active;
    const bool is_kept = id < shape.new_active;
    const int64_t copies = is_kept ? shape.children : 1;
    const bool exists = id >= 0 && id - shape.new_active < shape.new_passive &&
                        (!is_kept || shape.new_active - id >= copies);
    const T* from = nullptr;
    if (exists)
      from = is_kept ? new_grad_active + id * features
                     : new_grad_passive + (id - shape.new_active) * features;
    const int64_t step = int64_t{kVector} << lanes_log2;
    for (int64_t f = (thread & ((1 << lanes_log2) - 1)) * kVector; f < features; f += step) {
      accumulator_t<T> sums[kVector] = {};
      if (exists) widen_pack(load_pack_once<kVector>(from + f), sums);
      for (int64_t k = 1; exists && k < copies; ++k) {
        accumulator_t<T> values[kVector];
        widen_pack(load_pack_once<kVector>(from + k * features + f), values);
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[v] += values[v];
      }
      Pack<T, kVector> result;
#pragma unroll
      for (int v = 0; v < kVector; ++v) result.data[v] = narrow<T>(sums[v]);
      store_pack_once<kVector>(out + f, result);
    }
  });
}

// The lanes of a row of `words` words.
inline int lanes_log2_of(int64_t words) {
  int log2 = 0;
  while (log2 < 5 && (int64_t{1} << log2) < words) ++log2;
  return log2;
}

}  // namespace effops::rowconv
