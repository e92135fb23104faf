// CUDA kernels of filter_flow_backward: the gradient of the image. No torch, no launches.
//
//   dX(u) = sum of T_k(p) dY(p) over the outputs p and taps k that read u, directly or through the padding
#pragma once

#include "filter_flow_backward_kernels.cuh"

namespace effops::localfilter {

constexpr int kGatherThreads = 256, kGatherChannels = 8;

// For any window. Bit-reproducible: no atomics, every pixel is written once, by the thread that adds it up.
//
// Parallelism: a thread per pixel and run of 8 channels of a group. It finds the outputs that read its
// pixel; the threads of a warp have neighbouring ones.
// Bytes: per run of channels the weights, coalesced, and K^2 times the output's gradient and the normalizer
// from the first-level cache. Bound: bandwidth with few channels, else the loads of gradients. Pixels at
// the border of a replicated image have up to K^2 / 4 times the work of others: small images wait for them.
// Limits: none that check_filter_flow_grad does not set.
template <typename F>
__global__ void __launch_bounds__(kGatherThreads, std::is_same_v<F, double> ? 2 : 3)
    image_gradient_gather_kernel(const __grid_constant__ FilterGradientArguments<F> arguments,
                                 DeviceMaps grad_image, int64_t runs, int64_t blocks_per_run, int64_t works) {
  using A = accumulator_t<F>;
  const DeviceWindow& window = arguments.window;
  const int64_t pixels = int64_t{window.height} * window.width, plane = arguments.out_plane();
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t map_run = work / blocks_per_run, map = map_run / runs;
    const int64_t pixel = (work - map_run * blocks_per_run) * kGatherThreads + threadIdx.x;
    if (pixel >= pixels) continue;
    const int64_t image = map / arguments.groups, group = map - image * arguments.groups;
    const ChannelRun run(group, arguments.group_channels, (map_run - map * runs) * kGatherChannels,
                         kGatherChannels);
    const int32_t row = static_cast<int32_t>(pixel / window.width);
    const int32_t column = static_cast<int32_t>(pixel - int64_t{row} * window.width);
    const F* taps = arguments.first_tap(image, group);
    const A* normalizer = arguments.normalize == kNone ? nullptr : arguments.normalizer + map * plane;
    const bool softmax = arguments.normalize == kSoftmax;
    A sums[kGatherChannels] = {};
    for (int32_t dy = 0; dy < window.kernel; ++dy) {
      for (Readers y(window, row, window.height, dy); !y.is_done(); y.advance(window)) {
        const F* tap = taps + int64_t{dy} * window.kernel * plane;
        for (int32_t dx = 0; dx < window.kernel; ++dx, tap += plane) {
          for (Readers x(window, column, window.width, dx); !x.is_done(); x.advance(window)) {
            const int64_t index = int64_t{y.at()} * window.out_width + x.at();
            A weight = A(widen(load_pack<1>(tap + index).data[0]));
            if (normalizer != nullptr) {
              const A saved = load_pack<1>(normalizer + index).data[0];
              weight = softmax ? fast_exp(weight - saved) : weight / saved;
            }
            A grads[kGatherChannels];
            read_channels(arguments.grad_output,
                          arguments.grad_output.offset(image, run.first, y.at(), x.at()), run.count, grads);
#pragma unroll
            for (int c = 0; c < kGatherChannels; ++c) sums[c] += weight * grads[c];
          }
        }
      }
    }
    write_channels(grad_image, grad_image.offset(image, run.first, row, column), run.count, sums);
  }
}

}  // namespace effops::localfilter
