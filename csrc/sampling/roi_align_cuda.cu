// roi_align on CUDA: arguments, grids, launches.
#include "../common/dtype_switch.h"
#include "pyramid_cuda.cuh"
#include "roi_align.h"
#include "roi_align_kernels.cuh"

namespace effops::sampling {
namespace {

// Checked inputs, laid out as the kernels read them.
struct Inputs : RoiAlignInputs {
  DevicePyramid maps;

  Inputs(const std::vector<Tensor>& pyramid_in, const Tensor& rois_in, const Tensor& level_in,
         const RoiSettings& settings_in, const std::vector<double>& strides_in)
      : RoiAlignInputs(pyramid_in, rois_in, level_in, settings_in, strides_in),
        maps(make_device_pyramid("roi_align", pyramid)) {
    const double elements = static_cast<double>(shape.pyramid.channels) *
                            static_cast<double>(settings.height) * static_cast<double>(settings.width);
    if (elements > INT32_MAX) {
      fail("roi_align: expected fewer than 2^31 elements C * h * w per RoI on CUDA, got ", elements);
    }
  }

  int64_t blocks_per_roi() const { return roi_blocks(shape.pyramid.channels, settings); }

  template <typename T>
  RoiAlignArguments<T> arguments() const {
    RoiAlignArguments<T> result{};
    result.pyramid = maps;
    for (size_t l = 0; l < strides.size(); ++l) result.strides[l] = strides[l];
    result.rois = rois.const_data_ptr();
    result.level = level.const_data_ptr<int64_t>();
    result.rois_as_value = rois.scalar_type() == pyramid[0].scalar_type();
    result.settings = settings;
    result.rois_count = shape.rois;
    return result;
  }
};

template <typename T>
void run_forward(const Inputs& inputs, const CudaScope& scope, const Tensor& output) {
  T* out = static_cast<T*>(output.mutable_data_ptr());
  if (has_channel_vectors(inputs.pyramid, 1) && inputs.shape.pyramid.channels >= kWarpSize / 2) {
    const RoiTiling tiling =
        make_roi_tiling(inputs.shape.rois, inputs.shape.pyramid.channels, inputs.settings);
    scope.launch(&roi_align_forward_channels_last_kernel<T>, tiling.works, kMapThreads, 0,
                 inputs.arguments<T>(), tiling, out);
  } else {
    const int64_t blocks = inputs.blocks_per_roi(), works = blocks * inputs.shape.rois;
    scope.launch(&roi_align_forward_kernel<T>, works, kMapThreads, 0, inputs.arguments<T>(), blocks, works,
                 out);
  }
}

// gradients: zeros in the accumulator type.
template <typename T>
void run_backward(const Inputs& inputs, const CudaScope& scope, const Tensor& grad_output,
                  const std::vector<Tensor>& gradients) {
  const int64_t blocks = inputs.blocks_per_roi(), works = blocks * inputs.shape.rois;
  scope.launch(&roi_align_backward_kernel<T>, works, kMapThreads, 0, inputs.arguments<T>(), blocks, works,
               static_cast<const T*>(grad_output.const_data_ptr()), make_device_gradients(gradients));
}

template <typename T>
void run_map_gradients(const Inputs& inputs, const CudaScope& scope, const Tensor& grad_output,
                       const std::vector<Tensor>& gradients) {
  using Roi = DeviceRoi<accumulator_t<T>>;
  const RoiAlignArguments<T> arguments = inputs.arguments<T>();
  constexpr int64_t warps = kMapThreads / kWarpSize;
  const Tensor table =
      empty_of(inputs.rois, {inputs.shape.rois, static_cast<int64_t>(sizeof(Roi))}, ScalarType::Byte);
  Roi* rois = static_cast<Roi*>(table.mutable_data_ptr());
  scope.launch(&roi_table_kernel<T>, (inputs.shape.rois + kMapThreads - 1) / kMapThreads, kMapThreads, 0,
               arguments, rois);
  for (size_t l = 0; l < gradients.size(); ++l) {
    const Tensor& gradient = gradients[l];
    const int64_t batch = gradient.size(0), channels = gradient.size(1);
    const int64_t pixels = gradient.size(2) * gradient.size(3);
    if (!fits_roi_map_tiling(batch, channels, pixels)) {
      fail(
          "roi_align_backward: expected maps of fewer than 2^31 pixels for the deterministic CUDA kernel, got ",
          shape_text(gradient));
    }
    const RoiMapTiling tiling = make_roi_map_tiling(static_cast<int64_t>(l), batch, channels, pixels);
    if (tiling.works == 0) continue;
    scope.launch(&roi_align_map_gradient_kernel<T>, (int64_t{tiling.works} + warps - 1) / warps, kMapThreads,
                 0, arguments, tiling, rois, static_cast<const T*>(grad_output.const_data_ptr()),
                 static_cast<T*>(gradient.mutable_data_ptr()));
  }
}

Tensor roi_align(const std::vector<Tensor>& pyramid,  // L x [B, C, H_l, W_l]
                 const Tensor& rois,                  // [R, 5]
                 const Tensor& level,                 // [R]
                 int64_t output_height, int64_t output_width, int64_t sampling_ratio, bool aligned,
                 const std::vector<double>& strides) {
  const Inputs inputs(pyramid, rois, level,
                      make_roi_settings(output_height, output_width, sampling_ratio, aligned), strides);
  const CudaScope scope(pyramid[0]);
  const Tensor output =
      empty_of(pyramid[0], {inputs.shape.rois, inputs.shape.pyramid.channels, output_height, output_width});
  if (inputs.is_empty()) return output;
  dispatch_floating("roi_align", "pyramid", pyramid[0].scalar_type(),
                    [&](auto tag) { run_forward<typename decltype(tag)::type>(inputs, scope, output); });
  return output;
}

std::vector<Tensor> roi_align_backward(const Tensor& grad_output,           // [R, C, h, w]
                                       const std::vector<Tensor>& pyramid,  // L x [B, C, H_l, W_l]
                                       const Tensor& rois,                  // [R, 5]
                                       const Tensor& level,                 // [R]
                                       int64_t output_height, int64_t output_width, int64_t sampling_ratio,
                                       bool aligned, const std::vector<double>& strides, bool deterministic) {
  const Inputs inputs(pyramid, rois, level,
                      make_roi_settings(output_height, output_width, sampling_ratio, aligned), strides);
  const CudaScope scope(pyramid[0]);
  check_roi_align_grad(grad_output, pyramid[0], inputs.shape, inputs.settings);
  const ScalarType dtype = pyramid[0].scalar_type();
  const bool by_atomics = !deterministic && !inputs.is_empty();
  std::vector<Tensor> gradients =
      new_pyramid_gradients(pyramid, true, by_atomics ? sum_dtype(pyramid[0]) : dtype);
  if (inputs.is_empty()) return gradients;
  const Tensor gradient = as_contiguous(grad_output);
  dispatch_floating("roi_align_backward", "pyramid", dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (deterministic) {
      run_map_gradients<T>(inputs, scope, gradient, gradients);
    } else {
      run_backward<T>(inputs, scope, gradient, gradients);
    }
  });
  round_gradients(gradients, dtype);
  return gradients;
}

}  // namespace
}  // namespace effops::sampling

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("roi_align", TORCH_BOX(&effops::sampling::roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&effops::sampling::roi_align_backward));
}
