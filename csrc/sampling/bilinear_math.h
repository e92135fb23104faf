// Bilinear sampling on one map of a pyramid: the scalar maths that the CPU kernels, the CUDA kernels
// and the simulator share. Vectorised CPU code repeats these formulas lane by lane.
//
//   v(x, y) = sum over the 4 corners of w_corner * map[corner],  corners outside the map read as 0
//
// Pixel coordinates: x = loc_x * width - 0.5 (align_corners=False). A point is active iff
// -1 < x < width and -1 < y < height; NaN and Inf fail the test before any conversion to an integer.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace effops::sampling {

// One map of a pyramid: rows [start, start + height * width) of a row-major list of pixels.
struct Level {
  int64_t start;
  int32_t height;
  int32_t width;
};

// The four corners of an active point, in the order (y0,x0) (y0,x1) (y1,x0) (y1,x1).
// A corner outside the map has valid = false; its index is that of a corner inside, safe to read.
template <typename T>
struct Corners {
  int64_t index[4];
  bool valid[4];
  T fx, fy;  // distances from (x0, y0), in [0, 1)
};

template <typename T>
EFFOPS_HD bool is_active(T x, T y, int32_t height, int32_t width) {
  return x > T(-1) && x < static_cast<T>(width) && y > T(-1) && y < static_cast<T>(height);
}

// x and y in pixels, for which is_active holds.
template <typename T>
EFFOPS_HD Corners<T> corners_at(T x, T y, int32_t height, int32_t width) {
  // Truncation rounds towards 0, so floor is one less for negative fractions.
  int32_t x0 = static_cast<int32_t>(x), y0 = static_cast<int32_t>(y);
  x0 -= static_cast<T>(x0) > x;
  y0 -= static_cast<T>(y0) > y;
  const bool left = x0 >= 0, right = x0 + 1 < width, top = y0 >= 0, bottom = y0 + 1 < height;
  const int64_t xa = left ? x0 : x0 + 1, xb = right ? x0 + 1 : x0;
  const int64_t row_a = static_cast<int64_t>(top ? y0 : y0 + 1) * width;
  const int64_t row_b = static_cast<int64_t>(bottom ? y0 + 1 : y0) * width;
  return {{row_a + xa, row_a + xb, row_b + xa, row_b + xb},
          {top && left, top && right, bottom && left, bottom && right},
          x - static_cast<T>(x0),
          y - static_cast<T>(y0)};
}

// Weights of the corners, 0 for those outside the map.
template <typename T>
EFFOPS_HD void corner_weights(const Corners<T>& c, T (&weight)[4]) {
  const T gx = T(1) - c.fx, gy = T(1) - c.fy;
  weight[0] = c.valid[0] ? gy * gx : T(0);
  weight[1] = c.valid[1] ? gy * c.fx : T(0);
  weight[2] = c.valid[2] ? c.fy * gx : T(0);
  weight[3] = c.valid[3] ? c.fy * c.fx : T(0);
}

// For kernels that read all four corners: where a column (or row) lies outside, both of its corners read
// the neighbour inside, with half of its weight each. Weight 0 would do for finite values, but 0 * Inf is
// NaN.
template <typename T>
EFFOPS_HD void share_border_weights(bool two_columns, bool two_rows, T (&weight)[4]) {
  if (!two_columns) {
    weight[0] = weight[1] = T(0.5) * (weight[0] + weight[1]);
    weight[2] = weight[3] = T(0.5) * (weight[2] + weight[3]);
  }
  if (!two_rows) {
    weight[0] = weight[2] = T(0.5) * (weight[0] + weight[2]);
    weight[1] = weight[3] = T(0.5) * (weight[1] + weight[3]);
  }
}

// d v / d x and d v / d y, from the corner values (0 for corners outside the map).
template <typename T>
EFFOPS_HD void corner_slopes(const Corners<T>& c, const T (&value)[4], T& dx, T& dy) {
  dx = (T(1) - c.fy) * (value[1] - value[0]) + c.fy * (value[3] - value[2]);
  dy = (T(1) - c.fx) * (value[2] - value[0]) + c.fx * (value[3] - value[1]);
}

}  // namespace effops::sampling
