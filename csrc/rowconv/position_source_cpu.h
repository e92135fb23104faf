// Convolutions at chosen positions of maps [N, C, H, W]: sources of row_gemm_cpu.h, and maps as rows of
// channels.
#pragma once

#include <numeric>
#include <vector>

#include "../common/maps.h"
#include "geometry_math.h"
#include "planes_cpu.h"
#include "row_gemm_cpu.h"

namespace effops::rowconv {

// ---------------------------------------------------------------------------------------- maps

// The maps [N, C, H, W] as a tensor whose memory holds [N, H, W, C]: themselves, or a copy.
inline Tensor channel_rows(const Tensor& maps) {
  if (is_channels_last(maps)) return maps;
  const int64_t channels = maps.size(1), cells = maps.size(0) * maps.size(2) * maps.size(3);
  const Tensor rows = empty_of(maps, {cells, channels});
  const Planes planes(maps);
  const int64_t row_bytes = channels * static_cast<int64_t>(maps.element_size());
  const auto to_rows = row_copy_kernels().to_rows[size_index(static_cast<int64_t>(maps.element_size()))];
  auto* data = static_cast<char*>(rows.mutable_data_ptr());
  parallel_for(cells, (1 << 15) / (channels + 1) + 1, [&](int64_t begin, int64_t end) {
    void* targets[kCopyTile];
    planes.for_runs(begin, end, [&](const Run& run, const PlaneRun& elements) {
      for (int64_t i = 0; i < run.count; ++i) targets[i] = data + (run.first + i) * row_bytes;
      to_rows(elements, run.count, channels, targets);
    });
  });
  return rows;
}

// Writes rows of accumulators to positions (n * H * W + y * W + x) of maps [N, C, H, W].
template <typename T>
class MapWriter {
 public:
  using A = accumulator_t<T>;

  explicit MapWriter(const Tensor& maps)
      : data_(static_cast<T*>(maps.mutable_data_ptr())),
        channels_(maps.size(1)),
        cells_(maps.size(2) * maps.size(3)),
        channels_last_(is_channels_last(maps)) {}

  // row_of(i) is the row for position first + i.
  template <typename RowOf>
  void write_range(int64_t first, int64_t count, const RowOf& row_of) const {
    std::vector<int64_t> positions(count);
    std::iota(positions.begin(), positions.end(), first);
    write(positions.data(), count, row_of);
  }

  // row_of(i) is the row for positions[i].
  template <typename RowOf>
  void write(const int64_t* positions, int64_t count, const RowOf& row_of) const {
    if (channels_last_) {
      for (int64_t i = 0; i < count; ++i)
        store_row<T>(row_of(i), channels_, data_ + positions[i] * channels_);
      return;
    }
    constexpr int64_t kChannels = 16;  // planes written at a time: a cache line of a row
    for (int64_t first = 0; first < channels_; first += kChannels) {
      const int64_t last = std::min(first + kChannels, channels_);
      for (int64_t i = 0; i < count; ++i) {
        const A* row = row_of(i);
        T* target = data_ + positions[i] / cells_ * channels_ * cells_ + positions[i] % cells_;
        for (int64_t c = first; c < last; ++c) target[c * cells_] = narrow<T>(row[c]);
      }
    }
  }

 private:
  T* data_;
  int64_t channels_, cells_;
  bool channels_last_;
};

// ---------------------------------------------------------------------------------------- sources

// A position taken apart, the coordinates in pixels of the input where tap 0 reads.
struct Place {
  int64_t image, y, x;
};

// Forward: the pixels that the kept positions read.
template <typename T>
class PixelSource {
 public:
  PixelSource(const Geometry& geometry, const int64_t* positions, const T* pixels, int64_t channels)
      : g_(geometry), positions_(positions), pixels_(pixels), channels_(channels) {}

  int64_t choose(int64_t first, int64_t count, int64_t tap, Choice<T>* chosen) {
    if (first != first_) locate(first, count);
    const int64_t down = tap / g_.kernel_width * g_.dilation_y, right = tap % g_.kernel_width * g_.dilation_x;
    Choice<T>* next = chosen;
    for (int64_t i = 0; i < count; ++i) {
      const Place& place = places_[i];
      const int64_t y = place.y + down, x = place.x + right;
      if (y < 0 || y >= g_.in_height || x < 0 || x >= g_.in_width) continue;
      const T* row = pixels_ + ((place.image * g_.in_height + y) * g_.in_width + x) * channels_;
      prefetch_row(row, channels_);
      *next++ = {i, row, nullptr};
    }
    return next - chosen;
  }

 private:
  void locate(int64_t first, int64_t count) {
    first_ = first;
    places_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = positions_[first + i], cell = position % g_.out_cells();
      places_[i] = {position / g_.out_cells(), cell / g_.out_width * g_.stride_y - g_.padding_y,
                    cell % g_.out_width * g_.stride_x - g_.padding_x};
    }
  }

  Geometry g_;
  const int64_t* positions_;
  const T* pixels_;
  int64_t channels_;
  int64_t first_ = -1;  // of the places
  std::vector<Place> places_;
};

// Gradient of the input: the gradient rows of the outputs that read a pixel. RowOf gives the row of an output
// position (image * out_cells + cell), or null where it takes no part.
template <typename T, typename RowOf>
class OutputSource {
 public:
  OutputSource(const Geometry& geometry, const RowOf& row_of, int64_t channels)
      : g_(geometry), row_of_(row_of), channels_(channels) {}

  int64_t choose(int64_t first, int64_t count, int64_t tap, Choice<T>* chosen) const {
    Choice<T>* next = chosen;
    int64_t image = first / g_.in_cells(), y = first % g_.in_cells() / g_.in_width, x = first % g_.in_width;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t cell = output_cell(g_, y, x, tap);
      const T* row = cell < 0 ? nullptr : row_of_(image * g_.out_cells() + cell);
      if (row != nullptr) {
        prefetch_row(row, channels_);
        *next++ = {i, row, nullptr};
      }
      if (++x < g_.in_width) continue;
      x = 0;
      if (++y < g_.in_height) continue;
      y = 0;
      ++image;
    }
    return next - chosen;
  }

 private:
  Geometry g_;
  const RowOf& row_of_;
  int64_t channels_;
};

// ---------------------------------------------------------------------------------------- products

// Calls emit(first, count, block), from all threads, with conv + bias of blocks of the `count` positions of a
// source. No bias: an empty one.
template <typename T, typename Emit>
void convolve_positions(const TapWeights<accumulator_t<T>>& weights, const PixelSource<T>& source,
                        int64_t count, const std::vector<accumulator_t<T>>& bias, const Emit& emit) {
  using A = accumulator_t<T>;
  struct Task {
    ProductBlock<T> block;
    PixelSource<T> source;
  };
  const auto width = weights.groups() * weights.columns();
  for_row_blocks(
      count, kBlockRows, [&] { return Task{{weights, false}, source}; },
      [&](Task& task, int64_t first, int64_t rows) {
        task.block.clear(rows);
        task.block.add(weights, task.source, first, rows);
        task.block.join_groups(weights, rows);
        for (int64_t i = 0; !bias.empty() && i < rows; ++i) {
          row_gemm_kernels().activate[kPrecision<A>](task.block.sums(i), bias.data(), width, nullptr);
        }
        emit(first, rows, task.block);
      });
}

}  // namespace effops::rowconv
