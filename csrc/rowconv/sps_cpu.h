// Reading an SPS on the CPU: its ids and cells are checked before anything is found by them.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "sps.h"

namespace effops::rowconv {

// Calls f(ids) with the contiguous map in its own type.
template <typename F>
decltype(auto) with_ids(const Tensor& index_map, const F& f) {
  return index_map.scalar_type() == ScalarType::Int
             ? f(static_cast<const int32_t*>(index_map.const_data_ptr()))
             : f(static_cast<const int64_t*>(index_map.const_data_ptr()));
}

// The map, contiguous, all ids of which are in [0, NA + NP).
inline Tensor checked_index_map(const char* op, const Tensor& index_map, const SpsShape& shape) {
  const Tensor map = as_contiguous(index_map);
  with_ids(map, [&](const auto* ids) {
    using Id = std::remove_const_t<std::remove_pointer_t<decltype(ids)>>;
    const int64_t cells = map.numel(), rows = shape.active + shape.passive;
    const Id last = static_cast<Id>(std::min<int64_t>(rows - 1, std::numeric_limits<Id>::max()));
    // Negative as soon as one id is below 0 or above the last: without a branch, so that the loop vectorises.
    Id signs = 0;
    for (int64_t i = 0; i < cells; ++i) {
      signs |= ids[i] | static_cast<Id>(static_cast<std::make_unsigned_t<Id>>(last) - ids[i]);
    }
    for (int64_t i = 0; signs < 0 && i < cells; ++i) {
      if (ids[i] >= 0 && ids[i] <= last) continue;
      fail(op, ": expected index_map in [0, NA + NP = ", rows, "), got ", ids[i]);
    }
  });
  return map;
}

// Where the active rows stand: [NA] and [NA, 2], contiguous.
class Cells {
 public:
  // All of them are in a map of `shape`.
  Cells(const char* op, const Tensor& roi, const Tensor& xy, const SpsShape& shape)
      : roi_(as_contiguous(roi)),
        xy_(as_contiguous(xy)),
        roi_data_(static_cast<const int32_t*>(roi_.const_data_ptr())),
        xy_data_(static_cast<const int32_t*>(xy_.const_data_ptr())),
        height_(shape.height),
        width_(shape.width) {
    for (int64_t i = 0; i < shape.active; ++i) {
      const auto [r, y, x] = (*this)[i];
      if (r < 0 || r >= shape.maps) fail(op, ": expected roi in [0, R = ", shape.maps, "), got ", r);
      if (x < 0 || x >= shape.width) fail(op, ": expected xy[:, 0] in [0, W = ", shape.width, "), got ", x);
      if (y < 0 || y >= shape.height) fail(op, ": expected xy[:, 1] in [0, H = ", shape.height, "), got ", y);
    }
  }

  struct Cell {
    int64_t roi, y, x;
  };
  Cell operator[](int64_t row) const { return {roi_data_[row], xy_data_[2 * row + 1], xy_data_[2 * row]}; }

  const int32_t* roi() const { return roi_data_; }
  const int32_t* xy() const { return xy_data_; }

  // The cell's number through all maps.
  int64_t flat(int64_t row) const {
    const auto [roi, y, x] = (*this)[row];
    return (roi * height_ + y) * width_ + x;
  }

 private:
  Tensor roi_, xy_;
  const int32_t *roi_data_, *xy_data_;
  int64_t height_, width_;
};

}  // namespace effops::rowconv
