// CUDA kernels of sps_from_dense and sps_to_dense. No torch, no launches.
#pragma once

#include "../common/dtype.h"
#include "id_map_kernels.cuh"
#include "scan_kernels.cuh"

namespace effops::rowconv {

// -------------------------------------------------------------------------------------- sps_from_dense

// The structure of sps_from_dense is a scan (scan_kernels.cuh) of the mask: with `before` active cells before
// a cell, its row is `before` of the active or cell - before of the passive ones. Bytes: the mask twice, 4 or
// 8 B per cell, 12 B per active cell. Bound by bandwidth.
struct ActiveSource {
  const uint8_t* mask;

  EFFOPS_DEVICE int64_t count(int64_t cell) const { return load_pack<1>(mask + cell).data[0] != 0; }
};

struct FromDenseSink {
  CellGrid grid;
  int64_t active;   // rows
  void* index_map;  // int64 if wide, else int32
  bool wide;
  int32_t *roi, *xy;

  EFFOPS_DEVICE void put(int64_t cell, int64_t before, int64_t count) const {
    const int64_t id = count != 0 ? before : active + cell - before;
    if (wide) {
      static_cast<int64_t*>(index_map)[cell] = id;
    } else {
      static_cast<int32_t*>(index_map)[cell] = static_cast<int32_t>(id);
    }
    if (count == 0) return;
    grid.split(cell, [&](int64_t map, int64_t y, int64_t x) {
      roi[before] = static_cast<int32_t>(map);
      *reinterpret_cast<Pack<int32_t, 2>*>(xy +
                                           2 * before) = {{static_cast<int32_t>(x), static_cast<int32_t>(y)}};
    });
  }
  EFFOPS_DEVICE void finish(int64_t) const {}
};

// ----------------------------------------------------------------------------------- rows to and from maps

// Dense features [maps, features, height, width] of any strides, in elements.
struct DenseLayout {
  CellGrid grid;
  int64_t features;
  int64_t map_stride, feature_stride, y_stride, x_stride;

  EFFOPS_DEVICE int64_t offset_of(int64_t cell) const {
    return grid.split(cell, [&](int64_t map, int64_t y, int64_t x) { return offset_of(map, y, x); });
  }
  EFFOPS_DEVICE int64_t offset_of(int64_t map, int64_t y, int64_t x) const {
    return map * map_stride + y * y_stride + x * x_stride;
  }
};

constexpr int kMoveThreads = 256;
constexpr int kMoveWarps = kMoveThreads / kWarpSize;
constexpr int kMoveItems = kWarpSize;         // of a tile
constexpr int kMoveFeatures = 2 * kWarpSize;  // of a tile
constexpr int kMoveSteps = kMoveItems * kMoveFeatures / kMoveThreads;

// What is moved: the features of all cells to or from the rows of their ids, or, with roi and xy, those of
// the active rows. Rows are contiguous; without active_rows or passive_rows those cells are left out.
template <typename Word>
struct MoveArguments {
  DenseLayout layout;
  Word* dense;
  Word *active_rows, *passive_rows;
  int64_t active, passive;
  IdMap map;
  const int32_t *roi, *xy;

  EFFOPS_HD int64_t items() const { return roi != nullptr ? active : layout.grid.cells(); }
  EFFOPS_HD int64_t feature_tiles() const { return (layout.features + kMoveFeatures - 1) / kMoveFeatures; }
  EFFOPS_HD int64_t works() const { return (items() + kMoveItems - 1) / kMoveItems * feature_tiles(); }

  // Null: none.
  EFFOPS_DEVICE Word* row_of(int64_t item) const {
    if (item >= items()) return nullptr;
    const int64_t id = roi != nullptr ? item : map.at(item);
    if (id < 0 || id >= active + passive) return nullptr;
    Word* const rows = id < active ? active_rows : passive_rows;
    if (rows == nullptr) return nullptr;
    return rows + (id < active ? id : id - active) * layout.features;
  }
  EFFOPS_DEVICE Word* cell_of(int64_t item) const {
    if (item >= items()) return nullptr;
    if (roi == nullptr) return dense + layout.offset_of(item);
    const int64_t r = roi[item], x = xy[2 * item], y = xy[2 * item + 1];
    const bool inside = r >= 0 && r < layout.grid.maps && y >= 0 && y < layout.grid.height && x >= 0 &&
                        x < layout.grid.width;
    return inside ? dense + layout.offset_of(r, y, x) : nullptr;
  }
};

// Calls f(item, feature, step) for the thread's elements of a tile: lanes along the items or the features.
template <typename F>
EFFOPS_DEVICE void for_tile(bool along_items, const F& f) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
  for (int step = 0; step < kMoveSteps; ++step) {
    const int line = warp + step * kMoveWarps;
    if (along_items) {
      f(lane, line, step);
    } else {
      f(line % kMoveItems, line / kMoveItems * kWarpSize + lane, step);
    }
  }
}

// kToRows: row[c] = dense[c, cell], 0 for a cell outside; else dense[c, cell] = row[c], 0 for an id outside.
//
// Parallelism: a block per tile of 32 items and 64 features, which it turns in shared memory: the lanes run
// along the features of a row, and along the cells of a map unless the features of its cells are neighbours
// (channels_last). Bytes: each element once on both sides; the ids once per 64 features. Bound by bandwidth.
template <typename Word, bool kToRows>
__global__ void __launch_bounds__(kMoveThreads, sizeof(Word) == 8 ? 3 : 4)
    sps_move_kernel(MoveArguments<Word> arguments) {
  using Line = Word[kMoveItems + 1];  // one more, against bank conflicts
  EFFOPS_SHARED(Line, tile, kMoveFeatures);
  EFFOPS_SHARED(Word*, rows, kMoveItems);
  EFFOPS_SHARED(Word*, cells, kMoveItems);
  const int64_t works = arguments.works(), feature_tiles = arguments.feature_tiles();
  const int64_t feature_stride = arguments.layout.feature_stride;
  const bool along_cells = feature_stride != 1;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t first_item = work / feature_tiles * kMoveItems;
    const int64_t first_feature = work % feature_tiles * kMoveFeatures;
    __syncthreads();  // the tile before has been written
    if (threadIdx.x < kMoveItems) {
      rows[threadIdx.x] = arguments.row_of(first_item + threadIdx.x);
      cells[threadIdx.x] = arguments.cell_of(first_item + threadIdx.x);
    }
    __syncthreads();
    const auto element = [&](bool of_row, int item, int feature) -> Word* {
      const int64_t f = first_feature + feature;
      Word* const first = of_row ? rows[item] : cells[item];
      if (first == nullptr || f >= arguments.layout.features) return nullptr;
      return first + (of_row ? f : f * feature_stride);
    };
    Word values[kMoveSteps];
    for_tile(kToRows && along_cells, [&](int item, int feature, int step) {
      const Word* const from = element(!kToRows, item, feature);
      values[step] = from != nullptr ? load_pack<1>(from).data[0] : Word{0};
    });
    for_tile(kToRows && along_cells,
             [&](int item, int feature, int step) { tile[feature][item] = values[step]; });
    __syncthreads();
    for_tile(!kToRows && along_cells, [&](int item, int feature, int) {
      Word* const to = element(kToRows, item, feature);
      if (to != nullptr) *to = tile[feature][item];
    });
  }
}

// ------------------------------------------------------------------------------- gradient of passive rows

constexpr int64_t kLongSum = 512;  // cells from which on a block adds them up

// The cells of each passive row, as made by cell_buckets_kernels.cuh.
struct PassiveCells {
  const int64_t *offsets, *cells;
  int64_t rows;

  EFFOPS_DEVICE int64_t count(int64_t row) const { return row < rows ? offsets[row + 1] - offsets[row] : 0; }
};

template <typename T>
struct PassiveGradient {
  using A = accumulator_t<T>;
  const DenseLayout& layout;
  const PassiveCells& passive;
  const T* grad_output;
  int lane;

  EFFOPS_DEVICE A at(int64_t cell_offset, int64_t feature) const {
    return widen(load_pack<1>(grad_output + cell_offset + feature * layout.feature_stride).data[0]);
  }

  // A lane per feature, the cells one after the other. All lanes have to call it.
  EFFOPS_DEVICE A sum_of_few(int64_t row, int64_t feature) const {
    A sum = A(0);
    for (int64_t base = passive.offsets[row]; base < passive.offsets[row + 1]; base += kWarpSize) {
      const int count = static_cast<int>(min(passive.offsets[row + 1] - base, int64_t{kWarpSize}));
      const int64_t own = lane < count ? layout.offset_of(passive.cells[base + lane]) : 0;
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        const int64_t offset = __shfl_sync(kFullWarp, own, j);
        if (feature < layout.features) sum += at(offset, feature);
      }
    }
    return sum;
  }

  // A lane per cell, all of one feature.
  EFFOPS_DEVICE A sum_of_many(int64_t row, int64_t feature) const {
    A sum = A(0);
#pragma unroll 4
    for (int64_t j = passive.offsets[row] + lane; j < passive.offsets[row + 1]; j += kWarpSize) {
      sum += at(layout.offset_of(passive.cells[j]), feature);
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, offset);
    }
    return sum;
  }
};

// grad_passive[p, c] = the sum of grad_output[c, cell] over the cells of row p, always in the same order.
//
// Parallelism: a warp per row and 32 features, a lane per feature; the warps of a block share the features of
// a row of many cells. Bytes: grad_output once where the cells of neighbouring rows are neighbours,
// grad_passive once, 8 B per cell and 32 features. Bound by bandwidth.
template <typename T>
__global__ void __launch_bounds__(kScanThreads, 1)
    sps_passive_gradient_kernel(DenseLayout layout, PassiveCells passive, const T* grad_output,
                                T* grad_passive) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t feature_tiles = (layout.features + kWarpSize - 1) / kWarpSize;
  const int64_t works = (passive.rows + kScanWarps - 1) / kScanWarps * feature_tiles;
  const PassiveGradient<T> gradient{layout, passive, grad_output, lane};
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t first_row = work / feature_tiles * kScanWarps, own = first_row + warp;
    const int64_t first = work % feature_tiles * kWarpSize, end = min(first + kWarpSize, layout.features);
    if (own < passive.rows && passive.count(own) < kLongSum) {
      const auto sum = gradient.sum_of_few(own, first + lane);
      if (first + lane < end) grad_passive[own * layout.features + first + lane] = narrow<T>(sum);
    }
    for (int64_t row = first_row; row < first_row + kScanWarps; ++row) {
      if (passive.count(row) < kLongSum) continue;
      for (int64_t feature = first + warp; feature < end; feature += kScanWarps) {
        const auto sum = gradient.sum_of_many(row, feature);
        if (lane == 0) grad_passive[row * layout.features + feature] = narrow<T>(sum);
      }
    }
  }
}

}  // namespace effops::rowconv
