// Maps of features in channel planes or channels_last, as runs of cells for the copying kernels.
#pragma once

#include <algorithm>

#include "../common/row_copy_cpu_kernel.h"
#include "../common/torch.h"

namespace effops::rowconv {

// Cells of one map that are copied at a time; they lie `cell_stride` apart in every plane.
struct Run {
  int64_t roi, y, x;  // of the first one
  int64_t first, count;  // cells, numbered through all maps
};

// Maps in channel planes, of any strides.
class Planes {
 public:
  explicit Planes(const Tensor& x)  // [R, F, H, W]
      : data_(static_cast<const char*>(x.const_data_ptr())),
        element_(static_cast<int64_t>(x.element_size())),
        height_(x.size(2)),
        width_(x.size(3)),
        map_stride_(x.stride(0)),
        channel_stride_(x.stride(1)),
        row_stride_(x.stride(2)),
        cell_stride_(x.stride(3)) {}

  // Calls f(run, its elements) for runs that make up the cells [begin, end).
  template <typename F>
  void for_runs(int64_t begin, int64_t end, const F& f) const {
    const int64_t cells = height_ * width_;
    const bool flat = row_stride_ == width_ * cell_stride_ || height_ == 1;
    for (int64_t cell = begin; cell < end;) {
      const int64_t in_map = cell % cells;
      Run run{cell / cells, in_map / width_, in_map % width_, cell, 0};
      run.count = std::min({kCopyTile, end - cell, flat ? cells - in_map : width_ - run.x});
      const int64_t offset = run.roi * map_stride_ + run.y * row_stride_ + run.x * cell_stride_;
      f(run, PlaneRun{data_ + offset * element_, cell_stride_, channel_stride_});
      cell += run.count;
    }
  }

 private:
  const char* data_;
  int64_t element_, height_, width_, map_stride_, channel_stride_, row_stride_, cell_stride_;
};

}  // namespace effops::rowconv
