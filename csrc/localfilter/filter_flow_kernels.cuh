// Forward CUDA kernels of filter_flow, and of expected_flow, which is the same without channels. No torch, no
// launches.
//
//   out = sum_k T_k X(tap k),  flow = sum_k T_k (dx_k, dy_k)
//
// with T_k = exp(L_k - m) / sum_k exp(L_k - m) for softmax; the log of that sum is saved for backward. All
// kernels pass over the weights once: what bounds them is reading N G K^2 Ho Wo weights, beside which images
// of few channels are small. Images of many channels are cut into runs of channels, each of which reads the
// weights again.
//
// Quad kernels: a thread makes 4 neighbouring outputs, a block a tile of 64 x 8. For windows without stride,
// upsampling or dilation and Wo a multiple of 4.
// Pixel kernels: a thread makes 1 output, a block a tile of 32 x 8. They read the image from a tile in shared
// memory, or, where the taps reach too far for one, through the first-level cache.
#pragma once

#include "filter_flow_tiles.cuh"

namespace effops::localfilter {

// ---------------------------------------------------------------------------------------------- sums

// Replaces weights whose bit t * kPixels + p is not set.
template <int kTaps, int kPixels, typename A>
EFFOPS_DEVICE void keep(uint32_t inside, A other, A (&weights)[kTaps][kPixels]) {
  static_assert(kTaps * kPixels <= 32, "a bit for each");
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      if ((inside >> (t * kPixels + p) & 1u) == 0) weights[t][p] = other;
    }
  }
}

// The bits of the taps [first, first + count) of a row that lie inside the image, for neighbouring pixels.
template <int kTaps, int kPixels>
EFFOPS_DEVICE uint32_t inside_bits(const DeviceWindow& window, bool row_is_inside, int32_t center_column,
                                   int32_t first, int32_t count) {
  uint32_t bits = 0;
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    if (t >= count) continue;
    const int32_t offset = window.offset(first + t);
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const bool inside = row_is_inside && is_inside(center_column, offset + p, window.width);
      bits |= uint32_t{inside} << (t * kPixels + p);
    }
  }
  return bits;
}

// What a thread keeps of its outputs while the taps pass, unnormalised.
//
// Softmax: weights are exp(logit - reference). The reference follows the largest logit only where that has
// moved away by kSlack, so that the sums are seldom rescaled; it begins at the lowest finite number, so that
// logits of -inf alone make no NaN of it.
template <typename A, int kPixels, int kChannels>
struct FilterSums {
  static constexpr A kLowest = std::is_same_v<A, double> ? A(-1.7976931348623157e308)
                                                         : A(-3.4028234663852886e38f);
  static constexpr A kSlack = A(8);

  A reference[kPixels];
  A total[kPixels], row_total[kPixels];  // of the weights, of those of the row of taps that is passing
  A flow_x[kPixels], flow_y[kPixels];
  A values[kChannels][kPixels];

  EFFOPS_DEVICE FilterSums() {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      reference[p] = kLowest;
      total[p] = row_total[p] = flow_x[p] = flow_y[p] = A(0);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) values[c][p] = A(0);
    }
  }

  EFFOPS_DEVICE void rescale(int p, A factor) {
    total[p] *= factor;
    row_total[p] *= factor;
    flow_x[p] *= factor;
    flow_y[p] *= factor;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) values[c][p] *= factor;
  }

  // Turns logits into weights.
  template <int kTaps>
  EFFOPS_DEVICE void exponentiate(A (&logits)[kTaps][kPixels]) {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      A top = logits[0][p];
#pragma unroll
      for (int t = 1; t < kTaps; ++t) top = max(top, logits[t][p]);
      if (top > reference[p] + kSlack) {
        rescale(p, fast_exp(reference[p] - top));
        reference[p] = top;
      }
#pragma unroll
      for (int t = 0; t < kTaps; ++t) logits[t][p] = fast_exp(logits[t][p] - reference[p]);
    }
  }

  // Weights of neighbouring taps of a row, `step` pixels apart; the first at `offset`.
  template <int kTaps>
  EFFOPS_DEVICE void add_weights(const A (&weights)[kTaps][kPixels], A offset, A step) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        row_total[p] += weights[t][p];
        flow_x[p] += weights[t][p] * (offset + static_cast<A>(t) * step);
      }
    }
  }

  EFFOPS_DEVICE void end_row(A offset) {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      total[p] += row_total[p];
      flow_y[p] += row_total[p] * offset;
      row_total[p] = A(0);
    }
  }
};

// From logits or weights to T_k up to the normalisation, which divides at the end: masks, exp, sums of the
// weights. `checked`: some taps of the block may lie outside the image and then read nothing.
template <typename F, typename A, int kTaps, int kPixels, int kChannels>
EFFOPS_DEVICE void take_weights(const FilterFlowArguments<F>& arguments, bool checked, bool row_is_inside,
                                int32_t center_column, int32_t first, int32_t count,
                                FilterSums<A, kPixels, kChannels>& sums, A (&weights)[kTaps][kPixels]) {
  const DeviceWindow& window = arguments.window;
  const uint32_t inside =
      checked ? inside_bits<kTaps, kPixels>(window, row_is_inside, center_column, first, count) : 0;
  if (checked && window.padding == kRenormalize) keep(inside, arguments.nothing(), weights);
  if (arguments.normalize == kSoftmax) sums.exponentiate(weights);
  sums.add_weights(weights, static_cast<A>(window.offset(first)), static_cast<A>(window.dilation));
  if (checked) keep(inside, A(0), weights);  // an infinite weight does not meet the padding
}

// Writes what a thread has. The first run of channels also writes what does not depend on them.
template <typename F, typename A, int kPixels, int kChannels>
EFFOPS_DEVICE void store_outputs(const FilterFlowArguments<F>& arguments, const TilePlace& place,
                                 const ChannelRun& run, const OutputPlace& output,
                                 const FilterSums<A, kPixels, kChannels>& sums) {
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const A divisor = arguments.normalize == kNone ? A(1) : sums.total[p];
    A values[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) values[c] = sums.values[c][p] / divisor;
    write_channels(arguments.output,
                   arguments.output.offset(place.image, run.first, output.row, output.column + p), run.count,
                   values);
    if (place.part != 0) continue;
    if (arguments.flow.data != nullptr) {
      const A flow[2] = {sums.flow_x[p] / divisor, sums.flow_y[p] / divisor};
      write_channels(arguments.flow,
                     arguments.flow.offset(place.image, 2 * place.group, output.row, output.column + p), 2,
                     flow);
    }
    if (arguments.normalizer != nullptr) {
      const int64_t map = place.image * arguments.groups + place.group;
      arguments.normalizer[map * arguments.out_plane() + output.index(arguments.window) + p] =
          arguments.normalize == kSoftmax ? sums.reference[p] + log(sums.total[p]) : sums.total[p];
    }
  }
}

// -------------------------------------------------------------------------------------- pixel kernel

// The image's pixels that a block holds.
struct TileOrigin {
  int32_t center_row, center_column;  // of the first output

  EFFOPS_DEVICE TileOrigin(const DeviceWindow& window, const TilePlace& place)
      : center_row(window.center(place.row)), center_column(window.center(place.column)) {}

  // That the first tap reads, inside the image or not.
  EFFOPS_DEVICE int64_t first_row(const DeviceWindow& window) const {
    return int64_t{center_row} + window.offset(0);
  }
  EFFOPS_DEVICE int64_t first_column(const DeviceWindow& window) const {
    return int64_t{center_column} + window.offset(0);
  }
  // Where in the tile the first tap of an output lies.
  EFFOPS_DEVICE int32_t cell(const OutputPlace& output, const TileShape& shape) const {
    return output.exists
               ? (output.center_row - center_row) * shape.pitch + output.center_column - center_column
               : 0;
  }
};

// Where a thread reads the taps of its output: from a tile, whose first tap is at `first`.
template <typename A, int kChannels>
struct TileSource {
  const A* first;
  int32_t row_step, tap_step, plane;

  EFFOPS_DEVICE TileSource(const DeviceWindow& window, const TileShape& shape, const A* first_in)
      : first(first_in),
        row_step(window.dilation * shape.pitch),
        tap_step(window.dilation),
        plane(shape.plane()) {}
  EFFOPS_DEVICE void read(int32_t dy, int32_t dx, A (&values)[kChannels]) const {
    const A* cell = first + dy * row_step + dx * tap_step;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) values[c] = cell[c * plane];
  }
};

// From the image; `channel`: offset of the first channel in it.
template <typename A, int kChannels>
struct ImageSource {
  const DeviceMaps& image;
  const DeviceWindow& window;
  int64_t channel;
  int channels;
  int32_t center_row, center_column;

  EFFOPS_DEVICE void read(int32_t dy, int32_t dx, A (&values)[kChannels]) const {
    const int64_t y = pad_index(int64_t{center_row} + window.offset(dy), window.height, window.padding);
    const int64_t x = pad_index(int64_t{center_column} + window.offset(dx), window.width, window.padding);
    const bool exists = y >= 0 && x >= 0;
    read_channels(image, exists ? channel + y * image.row_stride + x * image.pixel_stride : 0,
                  exists ? channels : 0, values);
  }
};

// The weights of `count` taps of one output; `taps` is the first's.
template <typename F, typename A, int kTaps>
EFFOPS_DEVICE void read_weights(const F* taps, int64_t plane, int32_t count, A other,
                                A (&weights)[kTaps][1]) {
  F raw[kTaps];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    if (t < count) raw[t] = load_pack_once<1>(taps + t * plane).data[0];
  }
#pragma unroll
  for (int t = 0; t < kTaps; ++t) weights[t][0] = t < count ? widen(raw[t]) : other;
}

template <typename F, typename A, int kChannels, typename Source>
EFFOPS_DEVICE void filter_output(const FilterFlowArguments<F>& arguments, const TilePlace& place,
                                 const ChannelRun& run, const OutputPlace& output, const Source& source) {
  const DeviceWindow& window = arguments.window;
  const int64_t plane = arguments.out_plane();
  const F* taps = arguments.first_tap(place.image, place.group) + output.index(window);
  FilterSums<A, 1, kChannels> sums;
  for (int32_t dy = 0; dy < window.kernel; ++dy) {
    const bool row_is_inside = is_inside(output.center_row, window.offset(dy), window.height);
    for (int32_t first = 0; first < window.kernel; first += kPixelTaps<F>) {
      const int32_t count = min(window.kernel - first, kPixelTaps<F>);
      A weights[kPixelTaps<F>][1];
      read_weights(taps, plane, count, arguments.nothing(), weights);
      taps += count * plane;
      take_weights(arguments, window.leaves_out(), row_is_inside, output.center_column, first, count, sums,
                   weights);
#pragma unroll
      for (int t = 0; t < kPixelTaps<F>; ++t) {
        if (t >= count) continue;
        A values[kChannels];
        source.read(dy, first + t, values);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sums.values[c][0] += weights[t][0] * values[c];
      }
    }
    sums.end_row(static_cast<A>(window.offset(dy)));
  }
  store_outputs(arguments, place, run, output, sums);
}

// Any stride, upsampling and dilation, one output per thread. Tiled: the pixels that a block's outputs read
// are in shared memory. Otherwise each tap is read from the image, where the caches must do.
//
// Parallelism: a block per tile of 32 x 8 outputs of a group and run of channels.
// Bytes: per run the weights, and the tile. Bound: bandwidth where K is large; with many channels, one read
// of shared memory per product.
// Limits: none that check_filter_flow does not set.
template <typename F, int kChannels, bool kTiled>
__global__ void __launch_bounds__(kPixelThreads,
                                  std::is_same_v<F, double> || !kTiled || kChannels > 4 ? 2 : 3)
    filter_flow_pixel_kernel(const __grid_constant__ FilterFlowArguments<F> arguments, TileGrid grid,
                             TileShape shape) {
  using A = accumulator_t<F>;
  EFFOPS_DYNAMIC_SHARED(A, tile);
  const DeviceWindow& window = arguments.window;
  for (int64_t work = blockIdx.x; work < grid.works; work += gridDim.x) {
    const TilePlace place(grid, work, kPixelRows, kPixelColumns);
    const OutputPlace output(window, place, static_cast<int32_t>(threadIdx.x) / kPixelColumns,
                             static_cast<int32_t>(threadIdx.x) % kPixelColumns);
    const ChannelRun run(place.group, arguments.group_channels, place.part * kChannels, kChannels);
    if constexpr (kTiled) {
      const TileOrigin origin(window, place);
      load_tile<kPixelThreads, kChannels>(arguments.image, window, shape, place.image, run.first, run.count,
                                          origin.first_row(window), origin.first_column(window), tile);
      __syncthreads();
      const TileSource<A, kChannels> source(window, shape, tile + origin.cell(output, shape));
      if (output.exists) filter_output<F, A, kChannels>(arguments, place, run, output, source);
      __syncthreads();  // the next work fills the tile
    } else if (output.exists) {
      const ImageSource<A, kChannels> source{arguments.image,
                                             window,
                                             arguments.image.offset(place.image, run.first, 0, 0),
                                             run.count,
                                             output.center_row,
                                             output.center_column};
      filter_output<F, A, kChannels>(arguments, place, run, output, source);
    }
  }
}

}  // namespace effops::localfilter
