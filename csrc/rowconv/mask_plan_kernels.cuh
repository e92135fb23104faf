// CUDA kernels of plan_mask and of the nearest kept positions. No torch, no launches.
#pragma once

#include "id_map_kernels.cuh"
#include "scan_kernels.cuh"

namespace effops::rowconv {

// A contiguous mask of bool or of floating numbers; NaN counts as kept, -0 as 0.
struct MaskView {
  const void* data;
  int64_t bytes;  // of an element: 1, 2, 4 or 8

  EFFOPS_DEVICE bool is_kept(int64_t position) const {
    switch (bytes) {
      case 1: return word<uint8_t>(position) != 0;
      case 2: return (word<uint16_t>(position) & 0x7fffu) != 0;
      case 4: return (word<uint32_t>(position) & 0x7fffffffu) != 0;
      default: return (word<uint64_t>(position) & 0x7fffffffffffffffu) != 0;
    }
  }

 private:
  template <typename Word>
  EFFOPS_DEVICE Word word(int64_t position) const {
    return load_pack<1>(static_cast<const Word*>(data) + position).data[0];
  }
};

// plan_mask is a scan (scan_kernels.cuh) of the kept positions:
//   positions = those with mask != 0, ascending; rows[position] = its index there, or -1.
// Bytes: the mask twice, 8 B per position, 8 B per kept one. Bound by bandwidth.
struct KeptSource {
  MaskView mask;

  EFFOPS_DEVICE int64_t count(int64_t position) const { return mask.is_kept(position); }
};

struct PlanSink {
  int64_t* positions;
  int64_t* rows;
  int64_t* kept;  // gets the number of positions where it is not null

  EFFOPS_DEVICE void put(int64_t position, int64_t before, int64_t count) const {
    rows[position] = count != 0 ? before : -1;
    if (count != 0) positions[before] = position;
  }
  EFFOPS_DEVICE void finish(int64_t total) const {
    if (kept != nullptr) *kept = total;
  }
};

struct PlanShape {
  int64_t batch, height, width;

  EFFOPS_HD int64_t columns() const { return batch * width; }
  EFFOPS_HD int64_t positions() const { return batch * height * width; }
};

// column_nearest[n, y, x] = the row of cells y' of the kept position nearest to (y, x) in its column, the
// upper one of two, or -1.
//
// Parallelism: a thread per column, down and up. Bytes: rows, and column_nearest four times, 24 B per
// position of which 12 come from the caches. Bound by latency where the columns are few.
__global__ void __launch_bounds__(kCellThreads)
    nearest_in_column_kernel(const int64_t* rows, PlanShape shape, int32_t* column_nearest) {
  for_own_cells(shape.columns(), [&](int64_t column) {
    const int64_t first = column / shape.width * shape.height * shape.width + column % shape.width;
    int32_t above = -1;
#pragma unroll 4
    for (int64_t y = 0; y < shape.height; ++y) {
      if (load_pack<1>(rows + first + y * shape.width).data[0] >= 0) above = static_cast<int32_t>(y);
      column_nearest[first + y * shape.width] = above;
    }
    int64_t below = -1;
#pragma unroll 4
    for (int64_t y = shape.height - 1; y >= 0; --y) {
      const int64_t upper = column_nearest[first + y * shape.width];
      if (upper == y) below = y;
      if (below >= 0 && (upper < 0 || below - y < y - upper)) {
        column_nearest[first + y * shape.width] = static_cast<int32_t>(below);
      }
    }
  });
}

// nearest[position] = rows of the kept position of the same image at the smallest Euclidean distance, of
// several the one of the lowest flat position, or -1 where the image has none.
//
// Parallelism: a thread per position, which looks at the nearest positions of the columns to its left and
// right until a column alone is farther than the best. Bytes: 4 B per column and position from the caches, 16
// B per position. Bound by the number of columns, which is the distance to the nearest kept position.
__global__ void __launch_bounds__(kCellThreads)
    nearest_rows_kernel(const int64_t* rows, const int32_t* column_nearest, PlanShape shape,
                        int64_t* nearest) {
  for_own_cells(shape.positions(), [&](int64_t position) {
    const int64_t x = position % shape.width, y = position / shape.width % shape.height;
    const int64_t image = position / (shape.width * shape.height) * (shape.width * shape.height);
    const int32_t* line = column_nearest + image + y * shape.width;
    int64_t best_distance = INT64_MAX, best = -1;
    const auto look_at = [&](int64_t column, int64_t dx) {
      const int64_t near_y = load_pack<1>(line + column).data[0];
      if (near_y < 0) return;
      const int64_t distance = dx * dx + (near_y - y) * (near_y - y), found = near_y * shape.width + column;
      if (distance < best_distance || (distance == best_distance && found < best)) {
        best_distance = distance;
        best = found;
      }
    };
    const int64_t farthest = max(x, shape.width - 1 - x);
    for (int64_t dx = 0; dx <= farthest && dx * dx <= best_distance; ++dx) {
      if (dx <= x) look_at(x - dx, dx);
      if (dx > 0 && x + dx < shape.width) look_at(x + dx, dx);
    }
    nearest[position] = best >= 0 ? rows[image + best] : -1;
  });
}

}  // namespace effops::rowconv
