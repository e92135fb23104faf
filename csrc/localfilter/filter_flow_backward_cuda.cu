// filter_flow_backward and expected_flow_backward on CUDA: arguments, grids, launches. All is deterministic.
#include "filter_flow_cuda.cuh"
#include "filter_flow_image_kernels.cuh"
#include "filter_gradient_quad_kernels.cuh"

namespace effops::localfilter {
namespace {

// What chooses the kernels.
template <typename F>
struct Launch {
  using A = accumulator_t<F>;

  const CudaScope& scope;
  const FilterGradientArguments<F>& arguments;
  const Window& window;
  const Tensor& like;        // for the device
  const Tensor* grad_image;  // null: not wanted
  int64_t limit;             // bytes of shared memory

  int64_t channels() const { return arguments.group_channels; }

  TileGrid grid(int64_t parts, int rows, int columns) const {
    return make_tile_grid(window, arguments.batch, arguments.groups, parts, rows, columns);
  }

  // Both gradients, in one pass over the weights. Returns false where the tiles don't fit.
  template <int kChannels>
  bool run_quads() const {
    const int64_t tiles_held = grad_image == nullptr ? 1 : 2;
    const TilePlan plan = plan_quad_tile(window, tiles_held * kChannels, sizeof(float), limit);
    if (!plan.fits) return false;
    const TileGrid tiles = grid(1, kQuadRows, kQuadColumns);
    const auto run = [&](float* halo) {
      scope.launch(&filter_gradient_quad_kernel<F, kChannels>, tiles.works, kQuadThreads, plan.bytes,
                   arguments, tiles, plan.shape, halo);
    };
    if (grad_image == nullptr) {
      run(nullptr);
      return true;
    }
    const Tensor halo = empty_of(like, {tiles.works, channels(), plan.shape.plane()}, ScalarType::Float);
    float* sums = static_cast<float*>(halo.mutable_data_ptr());
    run(sums);
    const int64_t elements = grad_image->numel();
    scope.launch(&fold_tiles_kernel<float>, tile_count(elements, kPixelThreads), kPixelThreads, 0, sums,
                 arguments.window, tiles, plan.shape, channels(), device_maps_of(*grad_image), elements);
    return true;
  }

  bool run_quads() const {
    if constexpr (std::is_same_v<F, double>) return false;
    if constexpr (!std::is_same_v<F, double>) {
      if (!takes_quads(window) || channels() > 4) return false;
      if (channels() <= 1) return run_quads<1>();
      return channels() <= 3 ? run_quads<3>() : run_quads<4>();
    }
  }

  template <int kChannels, bool kTiled>
  bool run_pixels() const {
    const int64_t tap_rows = gradient_tap_rows(window, channels(), kChannels);
    TilePlan plan;
    if constexpr (kTiled) {
      plan = plan_pixel_tile(window, tap_rows, kChannels, sizeof(A), kChannels > 4 ? limit / 2 : limit);
      if (!plan.fits) return false;
    }
    const TileGrid tiles = grid(window.kernel / tap_rows, kPixelRows, kPixelColumns);
    scope.launch(&filter_gradient_pixel_kernel<F, kChannels, kTiled>, tiles.works, kPixelThreads, plan.bytes,
                 arguments, tiles, plan.shape, static_cast<int32_t>(tap_rows));
    return true;
  }

  void run_filters() const {
    if constexpr (!std::is_same_v<F, double>) {
      if (channels() > 4 && run_pixels<8, true>()) return;
    }
    if (!run_pixels<4, true>()) run_pixels<kDirectChannels, false>();
  }

  void run_image() const {
    const int64_t runs = run_count(channels(), kGatherChannels);
    const int64_t blocks = tile_count(window.height * window.width, kGatherThreads);
    const int64_t works = arguments.batch * arguments.groups * runs * blocks;
    scope.launch(&image_gradient_gather_kernel<F>, works, kGatherThreads, 0, arguments,
                 device_maps_of(*grad_image), runs, blocks, works);
  }

  void run(bool need_filters) const {
    if (need_filters && run_quads()) return;
    if (need_filters) run_filters();
    if (grad_image != nullptr) run_image();
  }
};

struct Saved {  // maps (as_maps), and the contiguous normalizer
  std::optional<Tensor> grad_output, grad_flow, image, output, flow;
  Tensor normalizer;
};

// grad_filters, contiguous, and grad_image are null where they are not wanted.
template <typename F>
void run_backward(const CudaScope& scope, const FilterShape& shape, const Saved& saved, const Tensor& filters,
                  const Tensor* grad_image, const Tensor* grad_filters) {
  auto arguments = make_filter_arguments<FilterGradientArguments<F>>(shape, filters);
  const auto set = [](DeviceMaps& maps, const std::optional<Tensor>& tensor) {
    if (tensor) maps = device_maps_of(*tensor);
  };
  set(arguments.image, saved.image);
  set(arguments.output, saved.output);
  set(arguments.flow, saved.flow);
  set(arguments.grad_output, saved.grad_output);
  set(arguments.grad_flow, saved.grad_flow);
  arguments.normalizer = static_cast<accumulator_t<F>*>(const_cast<void*>(saved.normalizer.const_data_ptr()));
  if (grad_filters != nullptr) arguments.grad_filters = static_cast<F*>(grad_filters->mutable_data_ptr());
  const Launch<F> launch{scope, arguments, shape.window, filters, grad_image, shared_memory_limit(filters)};
  launch.run(grad_filters != nullptr);
}

// The gradients of an image, which may be missing, and of the filters; [0] where they are not wanted.
std::tuple<Tensor, Tensor> backward(const char* op, const FilterShape& shape, const Saved& saved,
                                    const Tensor& filters, bool need_image, bool need_filters) {
  const CudaScope scope(filters);
  const Tensor grad_image = need_image ? new_maps(*saved.image, {shape.batch, shape.channels,
                                                                 shape.window.height, shape.window.width})
                                       : empty_of(saved.image ? *saved.image : filters, {0});
  // The kernels write it contiguously.
  Tensor grad_filters = need_filters ? empty_of(filters, out_sizes(shape, filters.size(1)))
                                     : empty_of(filters, {0});
  if (grad_image.numel() > 0 || grad_filters.numel() > 0) {
    const Tensor weights = as_aligned(filters, 16);
    dispatch_floating(op, "filters", filters.scalar_type(), [&](auto tag) {
      run_backward<typename decltype(tag)::type>(scope, shape, saved, weights,
                                                 grad_image.numel() > 0 ? &grad_image : nullptr,
                                                 need_filters ? &grad_filters : nullptr);
    });
  }
  if (need_filters && is_channels_last(filters)) {
    grad_filters = torch::stable::contiguous(grad_filters, torch::headeronly::MemoryFormat::ChannelsLast);
  }
  return {grad_image, grad_filters};
}

std::optional<Tensor> as_maps(const std::optional<Tensor>& maps) {
  return maps ? std::optional<Tensor>(effops::as_maps(*maps)) : std::nullopt;
}

std::tuple<Tensor, Tensor> filter_flow_backward(const Tensor& grad_output,               // [N, C, Ho, Wo]
                                                const std::optional<Tensor>& grad_flow,  // [N, 2 G, Ho, Wo]
                                                const Tensor& image,  // [N, C, H, W]
                                                const Tensor& filters,  // [N, G * K * K, Ho, Wo]
                                                const std::optional<Tensor>& output,  // [N, C, Ho, Wo]
                                                const std::optional<Tensor>& flow,  // [N, 2 G, Ho, Wo]
                                                const Tensor& normalizer,  // [N, G, Ho, Wo], or [0]
                                                int64_t normalize, int64_t padding_mode, int64_t stride,
                                                int64_t upsample, int64_t dilation, int64_t groups,
                                                bool need_image, bool need_filters) {
  const FilterShape shape = check_filter_flow_grad(grad_output, grad_flow, image, filters, output, flow,
                                                   normalizer, normalize, padding_mode, stride, upsample,
                                                   dilation, groups);
  const Saved saved{effops::as_maps(grad_output),
                    as_maps(grad_flow),
                    effops::as_maps(image),
                    as_maps(output),
                    as_maps(flow),
                    as_contiguous(normalizer)};
  return backward("filter_flow_backward", shape, saved, filters, need_image, need_filters);
}

Tensor expected_flow_backward(const Tensor& grad_flow,  // [N, 2 G, H, W]
                              const Tensor& filters,  // [N, G * K * K, H, W]
                              const Tensor& flow,  // [N, 2 G, H, W]
                              const Tensor& normalizer,  // [N, G, H, W], or [0]
                              int64_t normalize, int64_t dilation, int64_t groups) {
  const FilterShape shape =
      check_expected_flow_grad(grad_flow, filters, flow, normalizer, normalize, dilation, groups);
  const Saved saved{std::nullopt, effops::as_maps(grad_flow), std::nullopt,
                    std::nullopt, effops::as_maps(flow),      as_contiguous(normalizer)};
  return std::get<1>(backward("expected_flow_backward", shape, saved, filters, false, true));
}

}  // namespace
}  // namespace effops::localfilter

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("filter_flow_backward", TORCH_BOX(&effops::localfilter::filter_flow_backward));
  m.impl("expected_flow_backward", TORCH_BOX(&effops::localfilter::expected_flow_backward));
}
