// How the CPU ops of this engine split their work, and the memory that a thread keeps from tile to tile.
#pragma once

#include <memory>

#include "../common/row_copy_cpu_kernel.h"
#include "filter_flow.h"
#include "window_tile_cpu.h"

namespace effops::localfilter {

// Memory of one thread. What nobody writes, the zeros beside rows, stays as it is while tiles look the same.
template <typename A>
class Buffer {
 public:
  A* sized(int64_t size) {
    if (size > static_cast<int64_t>(memory_.size())) memory_.resize(size);
    return memory_.data();
  }
  A* between_zeros(int64_t size, int64_t width) {
    if (size != size_ || width != width_) memory_.assign(size, A(0));
    size_ = size;
    width_ = width;
    return memory_.data();
  }

 private:
  std::vector<A> memory_;
  int64_t size_ = -1, width_ = -1;
};

// Filters, or their gradient, as planes of taps. Where the taps of a pixel lie next to each other
// (channels_last) a row of a tile is transposed at a time.
class FilterPlanes {
 public:
  explicit FilterPlanes(const Tensor& filters)
      : adjacent_(filters.size(3) > 1 && filters.stride(3) != 1 && filters.stride(1) == 1),
        tensor_(adjacent_ || filters.size(3) <= 1 || filters.stride(3) == 1
                    ? filters
                    : torch::stable::contiguous(filters)),
        view_(tensor_) {}

  int type() const { return static_cast<int>(view_.type); }
  bool adjacent() const { return adjacent_; }

  struct Row {
    int64_t n, channel, taps, y, x, count;  // all taps of `count` pixels from (y, x) on
  };
  struct Planes {
    void* data;
    int64_t stride;  // elements between planes
  };

  // Where a row can be written; see finish().
  Planes target(const Row& row, Buffer<char>& memory) const {
    if (!adjacent_) return {view_.at(row.n, row.channel, row.y, row.x), view_.strides[1]};
    const int64_t stride = whole_registers(row.count);
    return {memory.sized(row.taps * stride * view_.element), stride};
  }
  // A row to be read.
  Planes read(const Row& row, Buffer<char>& memory) const {
    const Planes planes = target(row, memory);
    if (!adjacent_) return planes;
    for_pieces(row, planes, [&](const std::vector<void*>& pixels, char* piece) {
      row_copy_kernels().to_planes[size_index(view_.element)](pixels.data(), count_of(pixels), row.taps,
                                                              piece, planes.stride);
    });
    return planes;
  }
  // Brings what was written to where it belongs.
  void finish(const Row& row, const Planes& planes) const {
    if (!adjacent_) return;
    for_pieces(row, planes, [&](const std::vector<void*>& pixels, char* piece) {
      row_copy_kernels().to_rows[size_index(view_.element)]({piece, 1, planes.stride}, count_of(pixels),
                                                            row.taps, pixels.data());
    });
  }

 private:
  static constexpr int64_t kPiece = 16;  // pixels of a call, which stay in the first-level cache

  static int64_t count_of(const std::vector<void*>& pixels) { return static_cast<int64_t>(pixels.size()); }

  // Calls f(addresses of some pixels, where they begin in the planes).
  template <typename F>
  void for_pieces(const Row& row, const Planes& planes, const F& f) const {
    for (int64_t first = 0; first < row.count; first += kPiece) {
      std::vector<void*> pixels;
      for (int64_t i = first; i < std::min(row.count, first + kPiece); ++i) {
        pixels.push_back(view_.at(row.n, row.channel, row.y, row.x + i));
      }
      f(pixels, static_cast<char*>(planes.data) + first * view_.element);
    }
  }

  bool adjacent_;
  Tensor tensor_;
  MapView view_;
};

// Tiles of equal size that cover the output; the last ones may be smaller. Their sizes do not depend on the
// number of threads.
struct TileGrid {
  int64_t rows, columns;       // of a tile
  int64_t down, across;        // tiles
  int64_t out_rows, out_columns;

  TileGrid(const Window& window, int64_t tile_rows, int64_t tile_columns)
      : rows(tile_rows),
        columns(whole_registers(divide_up(window.out_width, divide_up(window.out_width, tile_columns)))),
        down(divide_up(window.out_height, rows)),
        across(divide_up(window.out_width, columns)),
        out_rows(window.out_height),
        out_columns(window.out_width) {}

  int64_t first_row(int64_t tile) const { return tile * rows; }
  int64_t rows_of(int64_t tile) const { return std::min(rows, out_rows - tile * rows); }
  int64_t first_column(int64_t tile) const { return tile * columns; }
  int64_t columns_of(int64_t tile) const { return std::min(columns, out_columns - tile * columns); }
};

// The columns of all tiles of a row of them.
inline std::vector<TileColumns> columns_of(const Window& window, const TileGrid& grid, bool backward) {
  std::vector<TileColumns> columns;
  for (int64_t i = 0; i < grid.across; ++i) {
    columns.emplace_back(window, grid.first_column(i), grid.columns_of(i), backward);
  }
  return columns;
}

// Whether all sums of so many channels stay in registers: few of them, whose taps lie next to each other.
inline bool are_few(const Window& window, int64_t channels) {
  const bool adjacent = window.dilation == 1 && window.stride == 1 && window.upsample == 1;
  return channels == 0 || (channels <= kFewChannels && adjacent);
}

constexpr int64_t kFewRows = 16, kFewColumns = 512;  // of tiles with few channels
constexpr int64_t kManyColumns = 128;  // also of few ones whose taps are transposed
constexpr int64_t kWeightBytes = 384 << 10, kStagedBytes = 192 << 10;  // of the second-level cache

// Tiles for few channels.
inline TileGrid grid_of_few(const Window& window, const FilterPlanes& filters) {
  return TileGrid(window, kFewRows, filters.adjacent() ? kManyColumns : kFewColumns);
}

// Tiles whose weights of all taps, `copies` times, stay in the second-level cache.
inline TileGrid grid_of_weights(const Window& window, int64_t element, int64_t copies) {
  const int64_t width = std::min(kManyColumns, whole_registers(window.out_width));
  const int64_t bytes = window.taps() * width * element * copies;
  const int64_t rows = std::clamp<int64_t>(kWeightBytes / bytes / 2 * 2, bytes < kWeightBytes ? 2 : 1, 16);
  return TileGrid(window, rows, kManyColumns);
}

// Channels whose pixels stay there, too.
inline int64_t channels_at_a_time(int64_t bytes_per_channel) {
  return std::max<int64_t>(8, kStagedBytes / std::max<int64_t>(1, bytes_per_channel) / 8 * 8);
}

// Calls f(first, count) for the channels, so many at a time.
template <typename F>
void for_channels(int64_t channels, int64_t at_a_time, const F& f) {
  for (int64_t first = 0; first < channels; first += at_a_time)
    f(first, std::min(at_a_time, channels - first));
}

// The part of FilterRow that a tile fixes.
inline FilterRow filter_row(const Window& window, int normalize, const TileRows& rows,
                            const TileColumns& columns, int64_t row) {
  FilterRow result{};
  result.count = columns.count;
  result.kernel = window.kernel;
  result.normalize = normalize;
  result.renormalize = window.padding == kRenormalize;
  result.first = columns.first_inside.data();
  result.last = columns.last_inside.data();
  result.all_first = columns.all_first;
  result.all_last = columns.all_last;
  result.rows_inside = rows.inside.data() + row * window.kernel;
  result.first_offset = static_cast<double>(window.offset(0));
  result.step = static_cast<double>(window.dilation);
  return result;
}

// ---------------------------------------------------------------------------------------- image gradients

// Sums of the image's gradient, one per band of output rows: windows of neighbouring bands overlap, so each
// has rows of its own, which are added in order at the end.
template <typename A>
class ImageBands {
 public:
  // An image here is a group of channels: `channels` is their number.
  ImageBands(const Window& window, const TileGrid& grid, int64_t images, int64_t channels)
      : window_(window),
        images_(images),
        channels_(channels),
        tiles_(divide_up(least_rows(window), grid.rows)),
        bands_(divide_up(grid.down, tiles_)) {
    for (int64_t band = 0; band < bands_; ++band) {
      int64_t first = INT64_MAX, last = 0;
      for (int64_t tile = first_tile(band); tile < last_tile(band, grid); ++tile) {
        const auto [low, high] = TileRows(window, grid.first_row(tile), grid.rows_of(tile)).image_range();
        first = std::min(first, low);
        last = std::max(last, high);
      }
      first_row_.push_back(first);
      last_row_.push_back(last);
      begin_.push_back(size_);
      size_ += (last - first) * window.width * channels;
    }
    memory_.reset(new A[images * size_]);
  }

  int64_t bands() const { return bands_; }
  int64_t first_tile(int64_t band) const { return band * tiles_; }
  int64_t last_tile(int64_t band, const TileGrid& grid) const {
    return std::min(grid.down, (band + 1) * tiles_);
  }

  void clear(int64_t image, int64_t band) {
    const int64_t end = band + 1 < bands_ ? begin_[band + 1] : size_;
    std::fill(at(image, band), at(image, 0) + end, A(0));
  }
  void add(const WindowTile<A>& tile, const A* staged, int64_t image, int64_t band, int64_t channel,
           int64_t channels) {
    const int64_t stride = channel_stride(band);
    tile.fold(staged, channels, first_row_[band], stride, at(image, band) + channel * stride);
  }

  // Adds the bands up, of groups of channels of the gradient.
  void write(const MapView& grad, int64_t groups) const {
    parallel_for(images_ * channels_ * window_.height, divide_up(1 << 14, window_.width),
                 [&](int64_t begin, int64_t end) {
                   std::vector<A> row(whole_registers(window_.width));
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t y = i % window_.height, c = i / window_.height % channels_;
                     write_row(grad, groups, i / window_.height / channels_, c, y, row);
                   }
                 });
  }

 private:
  // Of a band: with fewer, what it shares with its neighbours would be most of it.
  static int64_t least_rows(const Window& window) {
    const int64_t reach = (window.kernel - 1) * window.dilation * window.upsample / window.stride;
    return std::clamp<int64_t>(reach, 16, std::max<int64_t>(16, window.out_height));
  }

  int64_t channel_stride(int64_t band) const { return (last_row_[band] - first_row_[band]) * window_.width; }
  A* at(int64_t image, int64_t band) const { return memory_.get() + image * size_ + begin_[band]; }

  void write_row(const MapView& grad, int64_t groups, int64_t image, int64_t c, int64_t y,
                 std::vector<A>& row) const {
    std::fill(row.begin(), row.end(), A(0));
    for (int64_t band = 0; band < bands_; ++band) {
      if (y < first_row_[band] || y >= last_row_[band]) continue;
      const A* from = at(image, band) + c * channel_stride(band) + (y - first_row_[band]) * window_.width;
      tile_row_kernels().add[WindowTile<A>::kIndex](from, window_.width, row.data());
    }
    tile_row_kernels().write[static_cast<int>(grad.type)](
        row.data(), nullptr, window_.width, grad.at(image / groups, image % groups * channels_ + c, y, 0),
        grad.strides[3]);
  }

  const Window& window_;
  int64_t images_, channels_, tiles_, bands_, size_ = 0;
  std::vector<int64_t> first_row_, last_row_, begin_;
  std::unique_ptr<A[]> memory_;
};

}  // namespace effops::localfilter
