// How the CUDA kernels of filter_flow and its gradients divide the work: arguments, tiles of outputs, runs of
// channels. No torch, no launches.
#pragma once

#include "window_tile.cuh"

namespace effops::localfilter {

// Of the quad kernels and of the pixel kernels.
constexpr int kQuad = 4;  // neighbouring outputs of a thread
constexpr int kQuadColumns = 64, kQuadRows = 8;
constexpr int kQuadsAcross = kQuadColumns / kQuad, kQuadThreads = kQuadsAcross * kQuadRows;

constexpr int kPixelColumns = 32, kPixelRows = 8, kPixelThreads = kPixelColumns * kPixelRows;
template <typename F>
constexpr int kPixelTaps = sizeof(F) > 4 ? 4 : 8;  // whose weights are on their way to a thread at a time
constexpr int kDirectChannels = 4;  // of a run where there is no tile

// ----------------------------------------------------------------------------------------- arguments

template <typename F>
struct FilterFlowArguments {
  using A = accumulator_t<F>;

  DeviceWindow window;
  int normalize;  // kSum also for weights as given, of which only those inside count
  int64_t batch;
  int64_t groups, group_channels;
  DeviceMaps image;  // [N, C, H, W]
  const F* filters;  // [N, G * K * K, Ho, Wo], contiguous
  DeviceMaps output;  // [N, C, Ho, Wo]
  DeviceMaps flow;  // [N, 2 G, Ho, Wo]; data null: not wanted
  A* normalizer;  // [N, G, Ho, Wo], contiguous; null: not wanted

  EFFOPS_HD int64_t out_plane() const { return int64_t{window.out_height} * window.out_width; }
  EFFOPS_HD int64_t taps() const { return int64_t{window.kernel} * window.kernel; }
  EFFOPS_DEVICE const F* first_tap(int64_t image, int64_t group) const {
    return filters + (image * groups + group) * taps() * out_plane();
  }
  // A weight that counts nothing.
  EFFOPS_DEVICE A nothing() const { return normalize == kSoftmax ? -A(INFINITY) : A(0); }
};

// The pieces of work: tiles of the outputs of an image and a group, in `parts` parts (of the channels, or of
// the taps). Neighbouring parts come after each other: they read the same weights.
struct TileGrid {
  int64_t parts, columns, rows, groups;
  int64_t works;  // of all images
};

struct TilePlace {
  int64_t image, group, part;
  int32_t row, column;  // of the first output

  EFFOPS_DEVICE TilePlace(const TileGrid& grid, int64_t work, int32_t tile_rows, int32_t tile_columns) {
    const int64_t tile = work / grid.parts, line = tile / grid.columns, map = line / grid.rows;
    part = work - tile * grid.parts;
    column = static_cast<int32_t>(tile - line * grid.columns) * tile_columns;
    row = static_cast<int32_t>(line - map * grid.rows) * tile_rows;
    image = map / grid.groups;
    group = map - image * grid.groups;
  }
};

// A run of neighbouring channels of a group.
struct ChannelRun {
  int64_t first;  // in the image
  int count;

  EFFOPS_DEVICE ChannelRun(int64_t group, int64_t group_channels, int64_t begin, int most)
      : first(group * group_channels + begin),
        count(static_cast<int>(group_channels - begin < most ? group_channels - begin : most)) {}
};

// The outputs of a thread: one, or neighbours of which the first is given. All of them exist or none.
struct OutputPlace {
  bool exists;
  int32_t row, column;  // (0, 0) if nothing exists
  int32_t center_row, center_column;  // in the image

  // `tile_row`, `tile_column`: in the tile at `place`.
  EFFOPS_DEVICE OutputPlace(const DeviceWindow& window, const TilePlace& place, int32_t tile_row,
                            int32_t tile_column)
      : exists(tile_row < window.out_height - place.row && tile_column < window.out_width - place.column) {
    row = exists ? place.row + tile_row : 0;
    column = exists ? place.column + tile_column : 0;
    center_row = window.center(row);
    center_column = window.center(column);
  }
  EFFOPS_DEVICE int64_t index(const DeviceWindow& window) const {
    return int64_t{row} * window.out_width + column;
  }
};

// ------------------------------------------------------------------------------------------- geometry

inline int64_t tile_count(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Runs of at most `most` channels of a group; one without any if it has none.
inline int64_t run_count(int64_t channels, int64_t most) {
  return channels > most ? tile_count(channels, most) : 1;
}

inline TileGrid make_tile_grid(const Window& window, int64_t batch, int64_t groups, int64_t parts, int rows,
                               int columns) {
  const int64_t down = tile_count(window.out_height, rows), across = tile_count(window.out_width, columns);
  return {parts, across, down, groups, batch * groups * down * across * parts};
}

// Bytes of shared memory for `channels` of a tile, and its shape where they are at most `limit`.
struct TilePlan {
  TileShape shape{};
  int64_t bytes = 0;
  bool fits = false;
};

inline TilePlan plan_tile(int64_t rows, int64_t columns, int64_t pitch, int64_t channels,
                          int64_t element_bytes, int64_t limit) {
  constexpr int64_t kFarTooLong = 1 << 20;  // no product below overflows
  TilePlan plan;
  if (rows > kFarTooLong || pitch > kFarTooLong) return plan;
  plan.bytes = rows * pitch * channels * element_bytes;
  plan.fits = plan.bytes <= limit;
  if (plan.fits) {
    plan.shape = {static_cast<int32_t>(rows), static_cast<int32_t>(columns), static_cast<int32_t>(pitch)};
  }
  return plan;
}

// Of the pixel kernels; `tap_rows`: whose pixels it holds at a time.
inline TilePlan plan_pixel_tile(const Window& window, int64_t tap_rows, int64_t channels,
                                int64_t element_bytes, int64_t limit) {
  const int64_t rows = center_span(window, window.out_height, kPixelRows) + (tap_rows - 1) * window.dilation;
  const int64_t columns = center_span(window, window.out_width, kPixelColumns) +
                          (window.kernel - 1) * window.dilation;
  return plan_tile(rows, columns, columns, channels, element_bytes, limit);
}

}  // namespace effops::localfilter
