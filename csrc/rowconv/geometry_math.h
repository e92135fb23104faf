// Which input cell a tap of a convolution reads, and which output cell reads an input cell: what the CPU, the
// CUDA and the simulator builds share.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace effops::rowconv {

// A convolution over one map. The check of the op keeps (kernel - 1) * dilation, padding and all sides below
// 2^31, so that no sum here overflows. A convolution over an SPS has stride 1 and keeps the sides.
struct Geometry {
  int64_t in_height, in_width, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;

  EFFOPS_HD int64_t taps() const { return kernel_height * kernel_width; }
  EFFOPS_HD int64_t in_cells() const { return in_height * in_width; }
  EFFOPS_HD int64_t out_cells() const { return out_height * out_width; }
};

// A convolution of odd kernel size that keeps the sides of the map.
inline Geometry same_geometry(int64_t height, int64_t width, int64_t kernel, int64_t dilation) {
  const int64_t padding = (kernel - 1) / 2 * dilation;
  return {height, width, height, width, kernel, kernel, 1, 1, padding, padding, dilation, dilation};
}

// The input cell y * in_width + x that tap `tap` of the output cell (y, x) reads, or -1 outside the map.
EFFOPS_HD int64_t input_cell(const Geometry& g, int64_t y, int64_t x, int64_t tap) {
  const int64_t in_y = y * g.stride_y - g.padding_y + tap / g.kernel_width * g.dilation_y;
  const int64_t in_x = x * g.stride_x - g.padding_x + tap % g.kernel_width * g.dilation_x;
  const bool inside = in_y >= 0 && in_y < g.in_height && in_x >= 0 && in_x < g.in_width;
  return inside ? in_y * g.in_width + in_x : -1;
}

// The output cell y * out_width + x whose tap `tap` reads the input cell (y, x), or -1 if there is none.
EFFOPS_HD int64_t output_cell(const Geometry& g, int64_t y, int64_t x, int64_t tap) {
  const int64_t far_y = y + g.padding_y - tap / g.kernel_width * g.dilation_y;
  const int64_t far_x = x + g.padding_x - tap % g.kernel_width * g.dilation_x;
  if (far_y < 0 || far_x < 0) return -1;
  int64_t out_y = far_y, out_x = far_x;
  if (g.stride_y != 1 || g.stride_x != 1) {  // divisions are slow
    out_y /= g.stride_y;
    out_x /= g.stride_x;
    if (out_y * g.stride_y != far_y || out_x * g.stride_x != far_x) return -1;
  }
  return out_y < g.out_height && out_x < g.out_width ? out_y * g.out_width + out_x : -1;
}

}  // namespace effops::rowconv
