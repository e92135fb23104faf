// Which row a tap of a gathered convolution multiplies: the index providers of the kernels. No torch, no
// launches.
//
// All of them are one struct with a switch at run time, so that the kernels are compiled once. A row of the
// result has a place (its map, y and x); a tap has an offset; both give a cell, and the cell a row of the
// operand.
#pragma once

#include "geometry_math.h"
#include "id_map_kernels.cuh"

namespace effops::rowconv {

// Convolutions whose results are added, in order. Each is the branch of a fused sum or of a choice.
constexpr int kMaxBranches = 32;

struct Branch {
  int32_t kernel_height, kernel_width;
  int32_t padding_y, padding_x, dilation_y, dilation_x;
  int32_t choice;  // the value that selects it, where there is one

  EFFOPS_HD int32_t taps() const { return kernel_height * kernel_width; }
};

struct BranchList {
  int32_t count, taps;  // taps: of all branches
  Branch branch[kMaxBranches];
};

// Goes through the taps of all branches.
struct TapWalk {
  int32_t branch = 0, y = 0, x = 0;
  int32_t index = 0;  // over all branches

  EFFOPS_DEVICE static TapWalk at(const BranchList& list, int32_t index) {
    TapWalk tap;
    tap.index = index;
    int32_t rest = index;
    while (rest >= list.branch[tap.branch].taps()) rest -= list.branch[tap.branch++].taps();
    tap.y = rest / list.branch[tap.branch].kernel_width;
    tap.x = rest % list.branch[tap.branch].kernel_width;
    return tap;
  }
  EFFOPS_DEVICE bool is_done(const BranchList& list) const { return index >= list.taps; }
  EFFOPS_DEVICE void advance(const BranchList& list) {
    ++index;
    if (++x < list.branch[branch].kernel_width) return;
    x = 0;
    if (++y < list.branch[branch].kernel_height) return;
    y = 0;
    ++branch;
  }
  // Whether the tap is the first of its branch.
  EFFOPS_DEVICE bool begins_branch() const { return y == 0 && x == 0; }
  // From the output cell, times the stride, to the input cell.
  EFFOPS_DEVICE int64_t offset_y(const BranchList& list) const {
    const Branch& own = list.branch[branch];
    return int64_t{y} * own.dilation_y - own.padding_y;
  }
  EFFOPS_DEVICE int64_t offset_x(const BranchList& list) const {
    const Branch& own = list.branch[branch];
    return int64_t{x} * own.dilation_x - own.padding_x;
  }
};

enum class RowKind : int32_t {
  kMap,         // row of the SPS at the cell that the tap reads
  kMapBack,     // active row whose tap reads the cell
  kBuckets,     // active rows whose tap reads the passive row: several
  kPixels,      // pixel that the tap of a kept position reads
  kPixelsBack,  // kept position, by its row, whose tap reads the pixel
  kChoiceBack,  // pixel of the tap's branch whose tap reads the pixel
};

constexpr int64_t kNoRow = -1;
// Rows below it stand for the sum over a bucket.
EFFOPS_HD int64_t sum_of_bucket(int64_t bucket) { return -2 - bucket; }
EFFOPS_HD int64_t bucket_of_sum(int64_t row) { return -2 - row; }

// Where a row of the result is.
struct RowPlace {
  int64_t first;  // cell of its map's origin; kBuckets: the row
  int32_t y, x;   // negative where there is none

  EFFOPS_HD bool exists() const { return y >= 0; }
  EFFOPS_HD static RowPlace none() { return {0, -1, -1}; }
};

struct RowSource {
  RowKind kind;
  int64_t rows;           // of the operand: others are no rows
  int64_t batch;          // maps
  int64_t height, width;  // of the map that the taps lead to
  // kMap, kMapBack
  IdMap index_map;  // [batch, height, width]
  const int32_t* roi;  // [NA]
  const int32_t* xy;   // [NA, 2]
  // kPixels, kPixelsBack, kChoiceBack
  int64_t own_height, own_width;  // of the map that the rows of the result lie in
  int64_t stride_y, stride_x;
  const int64_t* positions;  // kPixels: the cell of each row, or null: row r is cell r
  IdMap table;  // kPixelsBack: row of each cell; kChoiceBack: its choice; [batch, height, width]
  // kBuckets
  const int64_t* offsets;  // [buckets + 1]: bucket (row, tap) is row * taps + tap
  const int64_t* members;  // tap * rows + row of the active rows in each bucket

  EFFOPS_DEVICE RowPlace place(int64_t row) const {
    switch (kind) {
      case RowKind::kMap:
      case RowKind::kMapBack: return place_in_map(row);
      case RowKind::kBuckets: return {row, 0, 0};
      default: return place_in_image(row);
    }
  }

  // A row of the operand that is in a bucket of this tap.
  EFFOPS_DEVICE int64_t member(int64_t at, int32_t tap) const { return members[at] - tap * rows; }

  EFFOPS_DEVICE int64_t row(const RowPlace& place, const BranchList& list, const TapWalk& tap) const {
    if (!place.exists()) return kNoRow;
    switch (kind) {
      case RowKind::kMap: {
        const int64_t cell = cell_at(place, place.y + tap.offset_y(list), place.x + tap.offset_x(list));
        return cell < 0 ? kNoRow : known_row(index_map.at(cell));
      }
      case RowKind::kMapBack: {
        const int64_t cell = cell_at(place, place.y - tap.offset_y(list), place.x - tap.offset_x(list));
        return cell < 0 ? kNoRow : known_row(index_map.at(cell));
      }
      case RowKind::kBuckets: return row_of_bucket(place.first * list.taps + tap.index, tap.index);
      case RowKind::kPixels:
        return cell_at(place, place.y * stride_y + tap.offset_y(list),
                       place.x * stride_x + tap.offset_x(list));
      case RowKind::kPixelsBack: {
        const int64_t cell = cell_back(place, list, tap);
        return cell < 0 ? kNoRow : known_row(table.at(cell));
      }
      default: {
        const int64_t cell = cell_back(place, list, tap);
        return cell >= 0 && table.at(cell) == list.branch[tap.branch].choice ? cell : kNoRow;
      }
    }
  }

 private:
  EFFOPS_DEVICE int64_t known_row(int64_t row) const { return row >= 0 && row < rows ? row : kNoRow; }

  EFFOPS_DEVICE int64_t cell_at(const RowPlace& place, int64_t y, int64_t x) const {
    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
    return inside ? place.first + y * width + x : -1;
  }

  // The cell whose tap reads the place, as output_cell() of geometry_math.h.
  EFFOPS_DEVICE int64_t cell_back(const RowPlace& place, const BranchList& list, const TapWalk& tap) const {
    int64_t y = place.y - tap.offset_y(list), x = place.x - tap.offset_x(list);
    if (y < 0 || x < 0) return -1;
    if (stride_y != 1 || stride_x != 1) {
      // Both are below 2^32, where a division is cheap.
      const auto far_y = static_cast<uint32_t>(y), far_x = static_cast<uint32_t>(x);
      y = far_y / static_cast<uint32_t>(stride_y);
      x = far_x / static_cast<uint32_t>(stride_x);
      if (y * stride_y != far_y || x * stride_x != far_x) return -1;
    }
    return cell_at(place, y, x);
  }

  EFFOPS_DEVICE RowPlace place_in_map(int64_t row) const {
    const int64_t map = roi[row];
    const int32_t x = xy[2 * row], y = xy[2 * row + 1];
    const bool exists = map >= 0 && map < batch && y >= 0 && y < height && x >= 0 && x < width;
    return exists ? RowPlace{map * height * width, y, x} : RowPlace::none();
  }

  EFFOPS_DEVICE RowPlace place_in_image(int64_t row) const {
    const int64_t cell = positions == nullptr ? row : positions[row];
    const int64_t line = cell / own_width, image = line / own_height;
    if (cell < 0 || image >= batch) return RowPlace::none();
    return {image * height * width, static_cast<int32_t>(line - image * own_height),
            static_cast<int32_t>(cell - line * own_width)};
  }

  EFFOPS_DEVICE int64_t row_of_bucket(int64_t bucket, int32_t tap) const {
    const int64_t begin = offsets[bucket], count = offsets[bucket + 1] - begin;
    return count == 0 ? kNoRow : count == 1 ? member(begin, tap) : sum_of_bucket(bucket);
  }
};

// ids[tap, row] = the bucket of the passive row that the tap of the active row reads, -1 for other taps: the
// map of which bucket_cells() makes offsets and members. A thread per element. `source`: kMap.
template <typename Id>
__global__ void __launch_bounds__(kCellThreads)
    tap_buckets_kernel(const __grid_constant__ RowSource source, const __grid_constant__ BranchList list,
                       int64_t active, Id* ids) {
  for_own_cells(active * list.taps, [&](int64_t cell) {
    const int64_t index = cell / active;
    const TapWalk tap = TapWalk::at(list, static_cast<int32_t>(index));
    const int64_t id = source.row(source.place(cell - index * active), list, tap);
    ids[cell] = static_cast<Id>(id < active ? -1 : (id - active) * list.taps + tap.index);
  });
}

}  // namespace effops::rowconv
