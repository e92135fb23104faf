// point_sample on CUDA: arguments, grids, launches.
#include "../common/dtype_switch.h"
#include "point_sample.h"
#include "point_sample_kernels.cuh"
#include "pyramid_cuda.cuh"

namespace effops::sampling {
namespace {

// Checked inputs, laid out as the kernels read them.
struct Inputs {
  PointSampleShape shape;
  const std::vector<Tensor>& pyramid;
  Tensor batch, level, xy;
  DevicePyramid maps;

  Inputs(const std::vector<Tensor>& pyramid_in, const Tensor& batch_in, const Tensor& level_in,
         const Tensor& xy_in)
      : shape(check_point_sample(pyramid_in, batch_in, level_in, xy_in)),
        pyramid(pyramid_in),
        batch(as_contiguous(batch_in)),
        level(as_contiguous(level_in)),
        xy(as_contiguous(xy_in)),
        maps(make_device_pyramid("point_sample", pyramid)) {}

  bool is_empty() const { return shape.points == 0 || shape.pyramid.channels == 0; }

  template <typename T>
  PointSampleArguments<T> arguments(int64_t vector) const {
    return {maps,
            batch.const_data_ptr<int64_t>(),
            level.const_data_ptr<int64_t>(),
            xy.const_data_ptr(),
            xy.scalar_type() == pyramid[0].scalar_type(),
            point_lanes_log2(shape.pyramid.channels, vector),
            shape.points};
  }
};

template <typename T>
void run_forward(const Inputs& inputs, const CudaScope& scope, const Tensor& output) {
  const auto run = [&](auto kernel, int vector) {
    const PointSampleArguments<T> arguments = inputs.arguments<T>(vector);
    scope.launch(kernel, point_blocks(inputs.shape.points, arguments.lanes_log2), kMapThreads, 0, arguments,
                 static_cast<T*>(output.mutable_data_ptr()));
  };
  if (has_channel_vectors(inputs.pyramid, kPackSize<T>)) {
    run(&point_sample_forward_kernel<T, kPackSize<T>>, kPackSize<T>);
  } else {
    run(&point_sample_forward_kernel<T, 1>, 1);
  }
}

// grad_pyramid: zeros in the accumulator type, or null; grad_xy: or null.
template <typename T>
void run_backward(const Inputs& inputs, const CudaScope& scope, const Tensor& grad_output,
                  const std::vector<Tensor>* grad_pyramid, const Tensor* grad_xy) {
  const PointSampleArguments<T> arguments = inputs.arguments<T>(1);
  const DeviceGradients gradients = grad_pyramid ? make_device_gradients(*grad_pyramid) : DeviceGradients{};
  const auto run = [&](auto kernel) {
    scope.launch(kernel, point_blocks(inputs.shape.points, arguments.lanes_log2), kMapThreads, 0, arguments,
                 static_cast<const T*>(grad_output.const_data_ptr()), gradients,
                 grad_xy ? grad_xy->mutable_data_ptr() : nullptr);
  };
  if (grad_pyramid && grad_xy) {
    run(&point_sample_backward_kernel<T, true, true>);
  } else if (grad_pyramid) {
    run(&point_sample_backward_kernel<T, true, false>);
  } else if (grad_xy) {
    run(&point_sample_backward_kernel<T, false, true>);
  }
}

template <typename T>
void run_map_gradients(const Inputs& inputs, const CudaScope& scope, const Tensor& grad_output,
                       const std::vector<Tensor>& grad_pyramid) {
  const PointSampleArguments<T> arguments = inputs.arguments<T>(1);
  for (size_t l = 0; l < grad_pyramid.size(); ++l) {
    const Tensor& gradient = grad_pyramid[l];
    const MapTiling tiling = make_map_tiling(static_cast<int64_t>(l), gradient.size(0),
                                             gradient.size(2) * gradient.size(3), gradient.size(1),
                                             kOwnedPixels, kWarpSize);
    if (tiling.works == 0) continue;
    const int64_t warps = kMapThreads / kWarpSize;
    scope.launch(&point_sample_map_gradient_kernel<T>, (tiling.works + warps - 1) / warps, kMapThreads, 0,
                 arguments, tiling, static_cast<const T*>(grad_output.const_data_ptr()),
                 static_cast<T*>(gradient.mutable_data_ptr()));
  }
}

Tensor point_sample(const std::vector<Tensor>& pyramid,  // L x [B, C, H_l, W_l]
                    const Tensor& batch,                 // [N]
                    const Tensor& level,                 // [N]
                    const Tensor& xy) {                  // [N, 2]
  const Inputs inputs(pyramid, batch, level, xy);
  const CudaScope scope(pyramid[0]);
  const Tensor output = empty_of(pyramid[0], {inputs.shape.points, inputs.shape.pyramid.channels});
  if (inputs.is_empty()) return output;
  dispatch_floating("point_sample", "pyramid", pyramid[0].scalar_type(),
                    [&](auto tag) { run_forward<typename decltype(tag)::type>(inputs, scope, output); });
  return output;
}

std::tuple<std::vector<Tensor>, Tensor> point_sample_backward(
    const Tensor& grad_output,           // [N, C]
    const std::vector<Tensor>& pyramid,  // L x [B, C, H_l, W_l]
    const Tensor& batch,                 // [N]
    const Tensor& level,                 // [N]
    const Tensor& xy,                    // [N, 2]
    bool need_pyramid, bool need_xy, bool deterministic) {
  const Inputs inputs(pyramid, batch, level, xy);
  const CudaScope scope(pyramid[0]);
  check_point_sample_grad(grad_output, pyramid[0], inputs.shape);
  const ScalarType dtype = pyramid[0].scalar_type();
  const bool by_atomics = need_pyramid && !deterministic && !inputs.is_empty();
  std::vector<Tensor> grad_pyramid =
      new_pyramid_gradients(pyramid, need_pyramid, by_atomics ? sum_dtype(pyramid[0]) : dtype);
  const Tensor grad_xy = need_xy ? zeros_of(xy, {inputs.shape.points, 2}) : empty_of(xy, {0});
  if (inputs.is_empty()) return {grad_pyramid, grad_xy};
  const Tensor gradient = as_contiguous(grad_output);
  dispatch_floating("point_sample_backward", "pyramid", dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (need_pyramid && deterministic) run_map_gradients<T>(inputs, scope, gradient, grad_pyramid);
    run_backward<T>(inputs, scope, gradient, by_atomics ? &grad_pyramid : nullptr,
                    need_xy ? &grad_xy : nullptr);
  });
  round_gradients(grad_pyramid, dtype);
  return {grad_pyramid, grad_xy};
}

}  // namespace
}  // namespace effops::sampling

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("point_sample", TORCH_BOX(&effops::sampling::point_sample));
  m.impl("point_sample_backward", TORCH_BOX(&effops::sampling::point_sample_backward));
}
