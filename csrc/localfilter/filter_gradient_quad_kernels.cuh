// CUDA kernels of filter_flow_backward where a thread has four neighbouring outputs: both gradients in one
// pass over the weights. No torch, no launches.
#pragma once

#include "filter_flow_backward_kernels.cuh"
#include "filter_flow_quad_kernels.cuh"

namespace effops::localfilter {

// The gradient of the part of the image that a block reads, in shared memory; null: not wanted.
template <int kChannels>
class GradientTile {
 public:
  EFFOPS_DEVICE GradientTile(float* sums, const TileShape& shape) : sums_(sums), shape_(shape) {}

  EFFOPS_DEVICE bool is_wanted() const { return sums_ != nullptr; }

  EFFOPS_DEVICE void clear() const {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kChannels * shape_.plane(); i += kQuadThreads) {
      sums_[i] = 0.0f;
    }
  }

  // Adds what a thread's four outputs give to the eight pixels of a step; the last four become final with the
  // next step only, and wait in `late`. The threads of a row of outputs share a warp and write to other packs
  // of four, rows of outputs to other rows; between steps a warp waits, between rows of taps the block, so
  // that the sums have an order.
  EFFOPS_DEVICE void add_step(int32_t cell, int channel, const float (&values)[2 * kQuad - 1],
                              float (&late)[kQuad - 1]) const {
    float own[kQuad];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) own[i] = values[i] + (i < kQuad - 1 ? late[i] : 0.0f);
    add(cell, channel, own);
#pragma unroll
    for (int i = 0; i < kQuad - 1; ++i) late[i] = values[kQuad + i];
  }

  EFFOPS_DEVICE void add_late(int32_t cell, int channel, float (&late)[kQuad - 1]) const {
    const float own[kQuad] = {late[0], late[1], late[2], 0.0f};
    add(cell, channel, own);
#pragma unroll
    for (int i = 0; i < kQuad - 1; ++i) late[i] = 0.0f;
  }

  // Copies the tile to the `channels` planes of a workspace.
  EFFOPS_DEVICE void store(int64_t channels, float* target) const {
    const int32_t packs = static_cast<int32_t>(channels) * shape_.plane() / kQuad;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < packs; i += kQuadThreads) {
      store_pack_once<kQuad>(target + kQuad * i, reinterpret_cast<const Pack<float, kQuad>*>(sums_)[i]);
    }
  }

 private:
  EFFOPS_DEVICE void add(int32_t cell, int channel, const float (&values)[kQuad]) const {
    auto* pack = reinterpret_cast<Pack<float, kQuad>*>(sums_ + channel * shape_.plane() + cell);
    Pack<float, kQuad> sums = *pack;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) sums.data[i] += values[i];
    *pack = sums;
  }

  float* sums_;
  TileShape shape_;
};

// grads[c][p] = the gradient of channel c of a thread's outputs; 0 where there is none.
template <int kChannels>
EFFOPS_DEVICE void read_quad_channels(const DeviceMaps& maps, const TilePlace& place, const ChannelRun& run,
                                      const OutputPlace& output, float (&grads)[kChannels][kQuad]) {
#pragma unroll
  for (int p = 0; p < kQuad; ++p) {
    float values[kChannels];
    read_channels(maps,
                  output.exists ? maps.offset(place.image, run.first, output.row, output.column + p) : 0,
                  output.exists ? run.count : 0, values);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) grads[c][p] = values[c];
  }
}

// dots[t][p] += sum_c grads[c][p] X_c(tap t of output p), for a step whose first pixel is at `cell`. kFull:
// the step has all its taps.
template <bool kFull, int kChannels>
EFFOPS_DEVICE void multiply_step(const float* tile, const TileShape& shape, int32_t cell, int32_t count,
                                 const float (&grads)[kChannels][kQuad], float (&dots)[kQuadTaps][kQuad]) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    float pixels[2 * kQuad];
    read_eight(tile + c * shape.plane() + cell, pixels);
#pragma unroll
    for (int t = 0; t < kQuadTaps; ++t) {
      if (!kFull && t >= count) continue;
#pragma unroll
      for (int p = 0; p < kQuad; ++p) dots[t][p] += grads[c][p] * pixels[t + p];
    }
  }
}

// X_c(tap t of output p) gets weights[t][p] grads[c][p].
template <bool kFull, int kChannels>
EFFOPS_DEVICE void scatter_step(const GradientTile<kChannels>& sums, int32_t cell, int32_t count,
                                const float (&weights)[kQuadTaps][kQuad],
                                const float (&grads)[kChannels][kQuad], float (&late)[kChannels][kQuad - 1]) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    float values[2 * kQuad - 1] = {};
#pragma unroll
    for (int t = 0; t < kQuadTaps; ++t) {
      if (!kFull && t >= count) continue;
#pragma unroll
      for (int p = 0; p < kQuad; ++p) values[t + p] += weights[t][p] * grads[c][p];
    }
    sums.add_step(cell, c, values, late[c]);
  }
}

template <typename F>
EFFOPS_DEVICE void store_quads(F* target, int64_t plane, int32_t count,
                               const float (&values)[kQuadTaps][kQuad]) {
#pragma unroll
  for (int t = 0; t < kQuadTaps; ++t) {
    if (t >= count) continue;
    Pack<F, kQuad> pack;
#pragma unroll
    for (int p = 0; p < kQuad; ++p) pack.data[p] = narrow<F>(values[t][p]);
    store_pack_once<kQuad>(target + t * plane, pack);
  }
}

// What a thread knows of its four outputs.
template <int kChannels>
struct QuadOutputs {
  OutputPlace place;
  OutputGradient<float, kQuad> gradient;
  float grads[kChannels][kQuad];
  float late[kChannels][kQuad - 1];  // of the gradient of the image (GradientTile)
};

// One step: weights of neighbouring taps from `first` on, read by `taps`, to their gradients at `target`.
template <bool kChecked, bool kFull, typename F, int kChannels>
EFFOPS_DEVICE void gradient_step(const FilterGradientArguments<F>& arguments, const TileShape& shape,
                                 const float* tile, const GradientTile<kChannels>& sums, int32_t cell,
                                 int32_t dy, int32_t first, int32_t count, QuadTaps<F>& taps,
                                 QuadOutputs<kChannels>& own, F* target) {
  const DeviceWindow& window = arguments.window;
  float weights[kQuadTaps][kQuad], dots[kQuadTaps][kQuad] = {};
  taps.take(count, 0.0f, weights);
#pragma unroll
  for (int t = 0; t < kQuadTaps; ++t) {
#pragma unroll
    for (int p = 0; p < kQuad; ++p) {
      weights[t][p] = own.gradient.weight(arguments.normalize == kSoftmax, p, weights[t][p]);
    }
  }
  if (sums.is_wanted()) {
    scatter_step<kFull>(sums, cell, count, weights, own.grads, own.late);
    __syncwarp();
  }
  multiply_step<kFull>(tile, shape, cell, count, own.grads, dots);
  uint32_t inside = 0;
  if (kChecked) {
    const bool row_is_inside = is_inside(own.place.center_row, window.offset(dy), window.height);
    inside = inside_bits<kQuadTaps, kQuad>(window, row_is_inside, own.place.center_column, first, count);
  }
  finish_gradients(arguments, kChecked, inside, static_cast<float>(window.offset(first)),
                   static_cast<float>(window.offset(dy)), own.gradient, weights, dots);
  if (own.place.exists) store_quads(target, arguments.out_plane(), count, dots);
}

// A row of taps.
template <bool kChecked, typename F, int kChannels>
EFFOPS_DEVICE void gradient_row(const FilterGradientArguments<F>& arguments, const TileShape& shape,
                                const float* tile, const GradientTile<kChannels>& sums, int32_t cell,
                                int32_t dy, QuadTaps<F>& taps, QuadOutputs<kChannels>& own, F*& target) {
  for (int32_t first = 0; first < arguments.window.kernel; first += kQuadTaps, cell += kQuadTaps) {
    const int32_t count = min(arguments.window.kernel - first, kQuadTaps);
    if (count == kQuadTaps) {
      gradient_step<kChecked, true>(arguments, shape, tile, sums, cell, dy, first, count, taps, own, target);
    } else {
      gradient_step<kChecked, false>(arguments, shape, tile, sums, cell, dy, first, count, taps, own, target);
    }
    target += count * arguments.out_plane();
  }
  if (!sums.is_wanted()) return;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) sums.add_late(cell, c, own.late[c]);
  __syncthreads();
}

// The gradients of the filters and, unless `halo` is null, of the image, in tiles for fold_tiles_kernel. As
// filter_flow_quad_kernel, for groups of at most kChannels channels.
//
// Parallelism: as there. The gradient of the image is added up in shared memory without atomics, in an
// order that is always the same (GradientTile): a barrier of the block per row of taps.
// Bytes: the weights read, their gradients written, with 8- or 16-byte accesses; the tile, and a tile of
// sums. Bound: bandwidth.
// Limits: the tile, for `halo` two of it, fits the shared memory.
template <typename F, int kChannels>
__global__ void __launch_bounds__(kQuadThreads, 3)
    filter_gradient_quad_kernel(const __grid_constant__ FilterGradientArguments<F> arguments, TileGrid grid,
                                TileShape shape, float* halo) {
  EFFOPS_DYNAMIC_SHARED(float, tile);
  const DeviceWindow& window = arguments.window;
  const int32_t tile_row = static_cast<int32_t>(threadIdx.x) / kQuadsAcross;
  const int32_t tile_column = static_cast<int32_t>(threadIdx.x) % kQuadsAcross * kQuad;
  const GradientTile<kChannels> sums(halo == nullptr ? nullptr : tile + kChannels * shape.plane(), shape);
  for (int64_t work = blockIdx.x; work < grid.works; work += gridDim.x) {
    const TilePlace place(grid, work, kQuadRows, kQuadColumns);
    const ChannelRun run(place.group, arguments.group_channels, 0, kChannels);
    QuadOutputs<kChannels> own{{window, place, tile_row, tile_column}, {}, {}, {}};
    const F* first = arguments.first_tap(place.image, place.group) + own.place.index(window);
    QuadTaps<F> taps(first, arguments.out_plane(), window.kernel, own.place.exists);
    F* target = arguments.grad_filters + (first - arguments.filters);
    load_tile<kQuadThreads, kChannels>(arguments.image, window, shape, place.image, run.first, run.count,
                                       place.row + window.offset(0), place.column + window.offset(0), tile);
    if (sums.is_wanted()) sums.clear();
    read_gradient(arguments, place, own.place, own.gradient);
    read_quad_channels(arguments.grad_output, place, run, own.place, own.grads);
    __syncthreads();
    const bool checked = window.leaves_out() && crosses_border(window, place);
    for (int32_t dy = 0; dy < window.kernel; ++dy) {
      const int32_t cell = (tile_row + dy) * shape.pitch + tile_column;
      if (checked) {
        gradient_row<true>(arguments, shape, tile, sums, cell, dy, taps, own, target);
      } else {
        gradient_row<false>(arguments, shape, tile, sums, cell, dy, taps, own, target);
      }
    }
    if (sums.is_wanted()) {
      sums.store(arguments.group_channels, halo + work * arguments.group_channels * shape.plane());
    }
    __syncthreads();  // the next work fills the tile
  }
}

// Calls f(tile, at) for the tiles along an axis that hold a place which row `row` stands for: they begin
// `before` rows before their outputs, of which they have `outputs`, and hold `rows`.
template <typename F>
EFFOPS_DEVICE void for_tiles(int64_t row, int64_t size, int padding, int32_t before, int32_t behind,
                             int32_t outputs, int32_t rows, int64_t tiles, const F& f) {
  for (Preimages places(row, size, padding, -before, size - 1 + behind); !places.is_done();
       places.advance()) {
    const int64_t at = places.at() + before;  // in the first tile
    const int64_t last = min(at / outputs, tiles - 1);
    const int64_t first = at < rows ? 0 : (at - rows) / outputs + 1;
    for (int64_t tile = first; tile <= last; ++tile) f(tile, at - tile * outputs);
  }
}

// Adds up the tiles that filter_gradient_quad_kernel left, [works][group_channels][rows][pitch], and folds
// the padding back: dX(u) = sum over the places that u stands for, and over the tiles that hold them, in
// their order.
//
// Parallelism: a thread per element of the image.
// Bytes: the tiles once, and the image. Bound: bandwidth.
template <typename A>
__global__ void __launch_bounds__(kPixelThreads, 2)
    fold_tiles_kernel(const A* halo, const __grid_constant__ DeviceWindow window, TileGrid grid,
                      TileShape shape, int64_t group_channels, DeviceMaps grad_image, int64_t elements) {
  const int64_t step = int64_t{gridDim.x} * kPixelThreads;
  const int32_t before = window.kernel / 2, behind = window.kernel - 1 - before;
  for (int64_t i = int64_t{blockIdx.x} * kPixelThreads + threadIdx.x; i < elements; i += step) {
    const int64_t line = i / window.width, plane = line / window.height;
    const int64_t column = i - line * window.width, row = line - plane * window.height;
    const int64_t map = plane / group_channels, channel = plane - map * group_channels;
    const A* tiles = halo + (map * grid.rows * grid.columns * group_channels + channel) * shape.plane();
    A sum[1] = {A(0)};
    for_tiles(row, window.height, window.padding, before, behind, kQuadRows, shape.rows, grid.rows,
              [&](int64_t tile_row, int64_t y) {
                for_tiles(column, window.width, window.padding, before, behind, kQuadColumns, shape.columns,
                          grid.columns, [&](int64_t tile_column, int64_t x) {
                            const int64_t tile = tile_row * grid.columns + tile_column;
                            sum[0] += tiles[tile * group_channels * shape.plane() + y * shape.pitch + x];
                          });
              });
    const int64_t image = map / grid.groups, group = map - image * grid.groups;
    write_channels(grad_image, grad_image.offset(image, group * group_channels + channel, row, column), 1,
                   sum);
  }
}

}  // namespace effops::localfilter
