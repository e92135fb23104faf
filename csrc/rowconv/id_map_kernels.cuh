// How the kernels see the index map of an SPS, and other maps of one integer per cell. No torch, no launches.
#pragma once

#include "../common/host_device.h"
#include "../common/warp.h"

namespace effops::rowconv {

constexpr int kCellThreads = 256;  // of a block, one cell each

inline int64_t cell_blocks(int64_t cells) { return (cells + kCellThreads - 1) / kCellThreads; }

// Cells of all maps, number (map * height + y) * width + x.
struct CellGrid {
  int64_t maps, height, width;

  EFFOPS_HD int64_t cells() const { return maps * height * width; }

  // Calls f(map, y, x).
  template <typename F>
  EFFOPS_DEVICE auto split(int64_t cell, const F& f) const {
    if (cells() <= INT32_MAX) {  // a division of 32 bits takes a fifth of the instructions
      const auto c = static_cast<uint32_t>(cell), w = static_cast<uint32_t>(width);
      const uint32_t line = c / w, h = static_cast<uint32_t>(height);
      return f(int64_t{line / h}, int64_t{line % h}, int64_t{c % w});
    }
    const int64_t line = cell / width;
    return f(line / height, line % height, cell % width);
  }
};

// A contiguous map that no thread writes during the kernel.
struct IdMap {
  const void* ids;
  bool wide;  // int64, not int32

  EFFOPS_DEVICE int64_t at(int64_t cell) const {
    return wide ? load_pack<1>(static_cast<const int64_t*>(ids) + cell).data[0]
                : load_pack<1>(static_cast<const int32_t*>(ids) + cell).data[0];
  }
};

// Calls f(cell) for all cells, by all threads of a grid of any size.
template <typename F>
EFFOPS_DEVICE void for_own_cells(int64_t cells, const F& f) {
  const int64_t step = int64_t{gridDim.x} * kCellThreads;
  for (int64_t cell = int64_t{blockIdx.x} * kCellThreads + threadIdx.x; cell < cells; cell += step) f(cell);
}

}  // namespace effops::rowconv
