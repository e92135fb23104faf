// Which pixel a tap of a K x K window reads: what the CPU, the CUDA and the simulator builds share.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace effops::localfilter {

// The schema's numbers.
enum Normalize : int { kSoftmax = 0, kNone = 1, kSum = 2 };
enum Padding : int { kZeros = 0, kReplicate = 1, kReflect = 2, kRenormalize = 3 };

// Windows of K x K taps over an image. The window of output pixel (y, x) lies around the image's pixel
// (y * stride / upsample, x * stride / upsample), rounded down; its taps are `dilation` apart and reach from
// -(K / 2) on: for an even K there are K / 2 before the centre and K / 2 - 1 behind it. The check of the op
// keeps (kernel - 1) * dilation, the factors and all sides below 2^31, so that no sum here overflows.
struct Window {
  int64_t height, width;          // of the image
  int64_t out_height, out_width;  // of the filters and the output
  int64_t kernel, dilation, stride, upsample;
  int padding;  // Padding

  EFFOPS_HD int64_t taps() const { return kernel * kernel; }
  EFFOPS_HD int64_t center(int64_t out) const { return out * stride / upsample; }
  // Pixels from the centre to a tap, along one axis.
  EFFOPS_HD int64_t offset(int64_t tap) const { return (tap - kernel / 2) * dilation; }
};

// Windows that keep the sides of the image.
inline Window same_window(int64_t height, int64_t width, int64_t kernel, int64_t dilation, int padding) {
  return {height, width, height, width, kernel, dilation, 1, 1, padding};
}

// Whether taps outside the image read nothing (and, with kRenormalize, do not count).
EFFOPS_HD bool leaves_out(int padding) { return padding == kZeros || padding == kRenormalize; }

// The row (or column) of the image, which has `size` > 0 of them, that stands for row `at`; -1 if none does.
EFFOPS_HD int64_t pad_index(int64_t at, int64_t size, int padding) {
  if (at >= 0 && at < size) return at;
  if (leaves_out(padding)) return -1;
  if (padding == kReplicate) return at < 0 ? 0 : size - 1;
  const int64_t period = size > 1 ? 2 * (size - 1) : 1;  // reflected without repeating the border
  int64_t folded = at % period;
  if (folded < 0) folded += period;
  return folded < size ? folded : period - folded;
}

}  // namespace effops::localfilter
