// Tiles of output pixels on the CPU: which pixels of the image they read, and where a staged copy holds them.
//
// Padding, dilation, stride and upsampling are all in the maps below. Kernels see staged rows in which the
// tap of pixel i is element i + (an offset of the tap).
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "../common/dtype_switch.h"
#include "../common/parallel.h"
#include "tile_rows_cpu_kernel.h"

namespace effops::localfilter {

constexpr int64_t kLanes = 16;  // registers of every instruction set hold a divisor of it

inline int64_t whole_registers(int64_t count) { return divide_up(count, kLanes) * kLanes; }

// The rows of an image that a tile of output rows reads, each once, ascending.
struct TileRows {
  int64_t count = 0, kernel = 0;
  std::vector<int64_t> coordinates;  // of the read rows, before padding
  std::vector<int64_t> image_rows;  // that stand for them; -1: none
  std::vector<int64_t> read_row;  // [count * kernel] index into these of each row of taps
  std::vector<int64_t> tap_row;  // [read rows * count] which row of taps of an output row reads it, or -1
  std::vector<uint8_t> inside;  // [count * kernel] whether a row of taps lies inside the image
  // Output rows and read rows in pairs that share much work; the second may be -1.
  std::vector<std::pair<int64_t, int64_t>> output_pairs, read_pairs;

  TileRows(const Window& window, int64_t first, int64_t rows) : count(rows), kernel(window.kernel) {
    std::vector<int64_t> centers;
    for (int64_t r = 0; r < rows; ++r) centers.push_back(window.center(first + r));
    const auto coordinate = [&](int64_t r, int64_t dy) { return centers[r] + window.offset(dy); };
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t dy = 0; dy < kernel; ++dy) coordinates.push_back(coordinate(r, dy));
    }
    std::sort(coordinates.begin(), coordinates.end());
    coordinates.erase(std::unique(coordinates.begin(), coordinates.end()), coordinates.end());
    for (const int64_t at : coordinates) image_rows.push_back(pad_index(at, window.height, window.padding));
    tap_row.assign(coordinates.size() * rows, -1);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t dy = 0; dy < kernel; ++dy) {
        const auto at = std::lower_bound(coordinates.begin(), coordinates.end(), coordinate(r, dy));
        read_row.push_back(at - coordinates.begin());
        tap_row[read_row.back() * rows + r] = dy;
        inside.push_back(image_rows[read_row.back()] >= 0);
      }
    }
    output_pairs = pairs_of(centers, window);
    read_pairs = pairs_of(coordinates, window);
  }

  int64_t read_rows() const { return static_cast<int64_t>(coordinates.size()); }

  // The rows of the image that stand for any read row: [first, last).
  std::pair<int64_t, int64_t> image_range() const {
    int64_t first = INT64_MAX, last = 0;
    for (const int64_t row : image_rows) {
      if (row < 0) continue;
      first = std::min(first, row);
      last = std::max(last, row + 1);
    }
    return {std::min(first, last), last};
  }

 private:
  // Of rows a multiple of the dilation apart, one reads (or is read by) most of what the other does.
  static std::vector<std::pair<int64_t, int64_t>> pairs_of(const std::vector<int64_t>& at,
                                                           const Window& window) {
    const int64_t rows = static_cast<int64_t>(at.size());
    std::vector<std::pair<int64_t, int64_t>> pairs;
    std::vector<bool> taken(rows, false);
    for (int64_t a = 0; a < rows; ++a) {
      if (taken[a]) continue;
      int64_t b = a + 1;
      const auto fits = [&] {
        const int64_t distance = at[b] - at[a];
        return !taken[b] && distance % window.dilation == 0 && distance / window.dilation < window.kernel;
      };
      while (b < rows && !fits()) ++b;
      if (b < rows) taken[b] = true;
      pairs.emplace_back(a, b < rows ? b : -1);
    }
    return pairs;
  }
};

// A part of a staged row, and the columns of taps that read it.
struct ColumnPhase {
  int64_t first = 0, length = 0;
  std::vector<int64_t> taps, offsets;  // offsets from `first`
};

// The columns of an image that a tile of output columns reads.
struct TileColumns {
  int64_t first = 0, count = 0, width = 0;  // width: count, in whole registers
  int64_t pitch = 0;  // elements of a staged row
  std::vector<int64_t> offsets;  // [kernel] where the tap of pixel 0 lies in a staged row
  std::vector<int32_t> columns;  // [pitch] the column of the image, or -1
  int64_t run_first = 0, run_last = 0;  // see StagedColumns
  std::vector<ColumnPhase> phases;
  std::vector<int64_t> first_inside, last_inside;  // [kernel] pixels whose tap lies inside
  int64_t all_first = 0, all_last = 0;  // pixels whose taps all do
  // Rows of `count` pixels between zeros, for what is read at (element of a phase - offset): backward only.
  int64_t margin = 0, row_pitch = 0;

  TileColumns(const Window& window, int64_t from, int64_t pixels, bool backward)
      : first(from), count(pixels), width(whole_registers(pixels)) {
    lay_out(window);
    fill_columns(window);
    find_inside(window);
    row_pitch = width;
    if (!backward) return;
    for (const ColumnPhase& phase : phases) {
      margin = std::max(margin, whole_registers(phase.offsets.back()));
      row_pitch = std::max(row_pitch, phase.length);
    }
    row_pitch += margin;
  }

  StagedColumns staged() const { return {columns.data(), pitch, run_first, run_last}; }

 private:
  void lay_out(const Window& window) {
    // One part in which the taps lie dilation * upsample apart; with a stride one part per remainder; or,
    // where the taps are further apart than the tile is wide, one part per tap.
    const int64_t step = window.dilation * window.upsample;
    const bool apart = window.stride > window.kernel || (window.kernel > 1 && step / window.stride >= width);
    phases.resize(apart ? window.kernel : window.stride);
    for (int64_t dx = 0; dx < window.kernel; ++dx) {
      ColumnPhase& phase = phases[apart ? dx : dx * step % window.stride];
      phase.taps.push_back(dx);
      phase.offsets.push_back(apart ? 0 : dx * step / window.stride);
    }
    std::erase_if(phases, [](const ColumnPhase& phase) { return phase.taps.empty(); });
    offsets.resize(window.kernel);
    for (ColumnPhase& phase : phases) {
      phase.first = pitch;
      phase.length = whole_registers(width + phase.offsets.back());
      pitch += phase.length;
      for (size_t i = 0; i < phase.taps.size(); ++i) offsets[phase.taps[i]] = phase.first + phase.offsets[i];
    }
  }

  void fill_columns(const Window& window) {
    columns.resize(pitch);
    for (const ColumnPhase& phase : phases) {
      for (int64_t i = 0; i < phase.length; ++i) {
        // Element i is what the phase's first tap reads at pixel i - (its offset).
        const int64_t at = window.center(first + i - phase.offsets[0]) + window.offset(phase.taps[0]);
        columns[phase.first + i] = static_cast<int32_t>(pad_index(at, window.width, window.padding));
      }
    }
    int64_t best = 0;
    for (int64_t begin = 0; begin < pitch;) {
      int64_t end = begin + 1;
      while (end < pitch && columns[begin] >= 0 && columns[end] == columns[end - 1] + 1) ++end;
      if (columns[begin] >= 0 && end - begin > best) {
        best = end - begin;
        run_first = begin;
        run_last = end;
      }
      begin = end;
    }
  }

  void find_inside(const Window& window) {
    all_last = count;
    for (int64_t dx = 0; dx < window.kernel; ++dx) {
      int64_t begin = 0, end = count;
      if (leaves_out(window.padding)) {
        const auto column = [&](int64_t i) { return window.center(first + i) + window.offset(dx); };
        while (begin < count && column(begin) < 0) ++begin;
        while (end > begin && column(end - 1) >= window.width) --end;
      }
      first_inside.push_back(begin);
      last_inside.push_back(end);
      all_first = std::max(all_first, begin);
      all_last = std::min(all_last, end);
    }
  }
};

// Maps [N, C, H, W] of any strides, read or written.
struct MapView {
  char* data;
  int64_t element, strides[4];
  FloatType type;

  explicit MapView(const Tensor& maps)
      : data(static_cast<char*>(const_cast<void*>(maps.const_data_ptr()))),
        element(static_cast<int64_t>(maps.element_size())),
        strides{maps.stride(0), maps.stride(1), maps.stride(2), maps.stride(3)},
        type(float_type_of(maps.scalar_type())) {}

  char* at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return data + (n * strides[0] + c * strides[1] + y * strides[2] + x * strides[3]) * element;
  }
};

}  // namespace effops::localfilter
