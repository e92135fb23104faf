// CUDA kernels of filter_flow_backward: the gradient of the filters. No torch, no launches.
//
//   s_k  = sum_c dY_c X_c(tap k) + dx_k gfx + dy_k gfy,  D = sum_c dY_c Y_c + fx gfx + fy gfy
//   dL_k = T_k (s_k - D) for softmax, (s_k - D) / S for weights divided by their sum, s_k for weights as
//   given
//
// The T_k are made again from the weights and the saved normalizer, so that one pass over the weights does.
#pragma once

#include "filter_flow_kernels.cuh"

namespace effops::localfilter {

template <typename F>
struct FilterGradientArguments : FilterFlowArguments<F> {  // output, flow, normalizer: as forward saved them
  DeviceMaps grad_output;  // [N, C, Ho, Wo]
  DeviceMaps grad_flow;  // [N, 2 G, Ho, Wo]; data null: none, nor flow
  F* grad_filters;  // as filters
};

// What the gradients of the weights of an output have in common.
template <typename A, int kPixels>
struct OutputGradient {
  A normalizer[kPixels];  // the log of the sum for softmax, else the factor of the weights
  A inner[kPixels];  // D; 0 for weights as given
  A flow_x[kPixels], flow_y[kPixels];

  EFFOPS_DEVICE A weight(bool softmax, int p, A value) const {
    return softmax ? fast_exp(value - normalizer[p]) : value * normalizer[p];
  }
};

// Outputs that don't exist have gradients of 0 everywhere.
template <typename F, typename A, int kPixels>
EFFOPS_DEVICE void read_gradient(const FilterGradientArguments<F>& arguments, const TilePlace& place,
                                 const OutputPlace& output, OutputGradient<A, kPixels>& gradient) {
  constexpr int kRun = 4;
  const int64_t map = place.image * arguments.groups + place.group;
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    gradient.normalizer[p] = A(1);
    gradient.inner[p] = gradient.flow_x[p] = gradient.flow_y[p] = A(0);
    if (!output.exists) continue;
    if (arguments.grad_flow.data != nullptr) {
      A grad[2], flow[2];
      const auto read = [&](const DeviceMaps& maps, A(&values)[2]) {
        read_channels(maps, maps.offset(place.image, 2 * place.group, output.row, output.column + p), 2,
                      values);
      };
      read(arguments.grad_flow, grad);
      read(arguments.flow, flow);
      gradient.flow_x[p] = grad[0];
      gradient.flow_y[p] = grad[1];
      gradient.inner[p] = grad[0] * flow[0] + grad[1] * flow[1];
    }
    if (arguments.normalize == kNone) {
      gradient.inner[p] = A(0);
      continue;
    }
    const A saved = arguments.normalizer[map * arguments.out_plane() + output.index(arguments.window) + p];
    gradient.normalizer[p] = arguments.normalize == kSoftmax ? saved : A(1) / saved;
    for (int64_t begin = 0; begin < arguments.group_channels; begin += kRun) {
      const ChannelRun run(place.group, arguments.group_channels, begin, kRun);
      A grads[kRun], values[kRun];
      const auto read = [&](const DeviceMaps& maps, A(&target)[kRun]) {
        read_channels(maps, maps.offset(place.image, run.first, output.row, output.column + p), run.count,
                      target);
      };
      read(arguments.grad_output, grads);
      read(arguments.output, values);
#pragma unroll
      for (int c = 0; c < kRun; ++c) gradient.inner[p] += grads[c] * values[c];
    }
  }
}

// From sum_c dY_c X_c(tap k) to the gradients of the weights of neighbouring taps, the first at `offset_x`.
template <typename F, typename A, int kTaps, int kPixels>
EFFOPS_DEVICE void finish_gradients(const FilterGradientArguments<F>& arguments, bool checked,
                                    uint32_t inside, A offset_x, A offset_y,
                                    const OutputGradient<A, kPixels>& gradient,
                                    const A (&weights)[kTaps][kPixels], A (&dots)[kTaps][kPixels]) {
  const A step = static_cast<A>(arguments.window.dilation);
  if (checked) keep(inside, A(0), dots);  // nothing was multiplied with what lies outside
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const A flow = (offset_x + static_cast<A>(t) * step) * gradient.flow_x[p] +
                     offset_y * gradient.flow_y[p];
      const A factor = arguments.normalize == kSoftmax ? weights[t][p] : gradient.normalizer[p];
      dots[t][p] = (dots[t][p] + flow - gradient.inner[p]) * factor;
    }
  }
  if (checked && arguments.window.padding == kRenormalize) keep(inside, A(0), dots);
}

// -------------------------------------------------------------------------------------- pixel kernel

// The gradients of `count` neighbouring taps of an output, from their sums over the channels.
template <typename F, typename A, int kTaps>
EFFOPS_DEVICE void store_gradients(const FilterGradientArguments<F>& arguments, const TilePlace& place,
                                   const OutputPlace& output, const OutputGradient<A, 1>& gradient,
                                   int32_t dy, int32_t first, int32_t count, A (&dots)[kTaps][1]) {
  const DeviceWindow& window = arguments.window;
  const bool checked = window.leaves_out();
  const int64_t plane = arguments.out_plane(), tap = int64_t{dy} * window.kernel + first;
  const F* taps = arguments.first_tap(place.image, place.group) + tap * plane + output.index(window);
  A weights[kTaps][1];
  read_weights(taps, plane, count, A(0), weights);
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    weights[t][0] = gradient.weight(arguments.normalize == kSoftmax, 0, weights[t][0]);
  }
  const bool row_is_inside = is_inside(output.center_row, window.offset(dy), window.height);
  const uint32_t inside =
      checked ? inside_bits<kTaps, 1>(window, row_is_inside, output.center_column, first, count) : 0;
  finish_gradients(arguments, checked, inside, static_cast<A>(window.offset(first)),
                   static_cast<A>(window.offset(dy)), gradient, weights, dots);
  F* target = arguments.grad_filters + (taps - arguments.filters);
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    if (t < count) store_pack_once<1>(target + t * plane, Pack<F, 1>{{narrow<F>(dots[t][0])}});
  }
}

// Adds the products of a run of channels.
template <int kTaps, typename A, int kChannels, typename Source>
EFFOPS_DEVICE void add_dots(const Source& source, int32_t row, int32_t first, int32_t count,
                            const A (&grads)[kChannels], A (&dots)[kTaps][1]) {
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    if (t >= count) continue;
    A values[kChannels];
    source.read(row, first + t, values);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) dots[t][0] += grads[c] * values[c];
  }
}

// Any stride, upsampling and dilation, one output per thread. The grid's parts are runs of `tap_rows` rows of
// taps: all of them where a group has at most kChannels channels, which then stay in shared memory (kTiled)
// and registers; else one, for which the channels pass in runs of kChannels.
//
// Parallelism: a block per tile of 32 x 8 outputs of a group and part.
// Bytes: the weights and their gradients once; the image and the output's gradient once, or with many
// channels once per 8 taps, from the second-level cache. Bound: bandwidth with few channels, else one read
// of shared memory per product.
// Limits: none that check_filter_flow_grad does not set.
template <typename F, int kChannels, bool kTiled>
__global__ void __launch_bounds__(kPixelThreads, std::is_same_v<F, double> ? 1 : 2)
    filter_gradient_pixel_kernel(const __grid_constant__ FilterGradientArguments<F> arguments, TileGrid grid,
                                 TileShape shape, int32_t tap_rows) {
  using A = accumulator_t<F>;
  constexpr int kTaps = kPixelTaps<F>;
  EFFOPS_DYNAMIC_SHARED(A, tile);
  const DeviceWindow& window = arguments.window;
  const bool has_runs = arguments.group_channels > kChannels;
  for (int64_t work = blockIdx.x; work < grid.works; work += gridDim.x) {
    const TilePlace place(grid, work, kPixelRows, kPixelColumns);
    const OutputPlace output(window, place, static_cast<int32_t>(threadIdx.x) / kPixelColumns,
                             static_cast<int32_t>(threadIdx.x) % kPixelColumns);
    const TileOrigin origin(window, place);
    OutputGradient<A, 1> gradient;
    read_gradient(arguments, place, output, gradient);
    A grads[kChannels];
    // Makes a run of channels present, in a tile from tap row `dy` on: for each step, or once if it is the
    // only one.
    const auto enter = [&](const ChannelRun& run, int32_t dy) {
      read_channels(
          arguments.grad_output,
          output.exists ? arguments.grad_output.offset(place.image, run.first, output.row, output.column) : 0,
          output.exists ? run.count : 0, grads);
      if constexpr (kTiled) {
        __syncthreads();  // the tile that was there is done with
        load_tile<kPixelThreads, kChannels>(arguments.image, window, shape, place.image, run.first, run.count,
                                            int64_t{origin.center_row} + window.offset(dy),
                                            origin.first_column(window), tile);
        __syncthreads();
      }
    };
    const int32_t begin = static_cast<int32_t>(place.part) * tap_rows;
    for (int32_t dy = begin; dy < begin + tap_rows; ++dy) {
      for (int32_t first = 0; first < window.kernel; first += kTaps) {
        const int32_t count = min(window.kernel - first, kTaps);
        A dots[kTaps][1] = {};
        for (int64_t channel = 0; channel < max(arguments.group_channels, int64_t{1}); channel += kChannels) {
          const ChannelRun run(place.group, arguments.group_channels, channel, kChannels);
          if (has_runs || (dy == begin && first == 0)) enter(run, dy);
          if constexpr (kTiled) {
            const TileSource<A, kChannels> source(window, shape, tile + origin.cell(output, shape));
            add_dots<kTaps>(source, dy - begin, first, count, grads, dots);
          } else if (output.exists) {
            const ImageSource<A, kChannels> source{arguments.image,
                                                   window,
                                                   arguments.image.offset(place.image, run.first, 0, 0),
                                                   run.count,
                                                   output.center_row,
                                                   output.center_column};
            add_dots<kTaps>(source, dy, first, count, grads, dots);
          }
        }
        if (output.exists) store_gradients(arguments, place, output, gradient, dy, first, count, dots);
      }
    }
  }
}

// Tap rows of a part.
inline int64_t gradient_tap_rows(const Window& window, int64_t group_channels, int64_t channels) {
  return group_channels > channels ? 1 : window.kernel;
}

}  // namespace effops::localfilter
