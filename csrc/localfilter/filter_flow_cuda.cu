// filter_flow and expected_flow on CUDA: arguments, grids, launches.
#include "filter_flow_cuda.cuh"
#include "filter_flow_quad_kernels.cuh"

namespace effops::localfilter {
namespace {

// What chooses a kernel.
template <typename F>
struct Launch {
  const CudaScope& scope;
  const FilterFlowArguments<F>& arguments;
  const Window& window;
  int64_t limit;  // bytes of shared memory

  int64_t channels() const { return arguments.group_channels; }

  // Of the channels in runs of kChannels.
  template <int kChannels>
  TileGrid grid(int rows, int columns) const {
    return make_tile_grid(window, arguments.batch, arguments.groups, run_count(channels(), kChannels), rows,
                          columns);
  }

  // Returns false where the tile does not fit. Several blocks should share a multiprocessor if the channels
  // can be cut further instead.
  template <int kChannels>
  bool run_quads() const {
    const TilePlan plan = plan_quad_tile(window, kChannels, sizeof(float), kChannels > 4 ? limit / 2 : limit);
    if (!plan.fits) return false;
    const TileGrid tiles = grid<kChannels>(kQuadRows, kQuadColumns);
    scope.launch(&filter_flow_quad_kernel<F, kChannels>, tiles.works, kQuadThreads, plan.bytes, arguments,
                 tiles, plan.shape);
    return true;
  }

  template <int kChannels>
  bool run_pixels() const {
    const TilePlan plan = plan_pixel_tile(window, window.kernel, kChannels, sizeof(accumulator_t<F>),
                                          kChannels > 4 ? limit / 2 : limit);
    if (!plan.fits) return false;
    const TileGrid tiles = grid<kChannels>(kPixelRows, kPixelColumns);
    scope.launch(&filter_flow_pixel_kernel<F, kChannels, true>, tiles.works, kPixelThreads, plan.bytes,
                 arguments, tiles, plan.shape);
    return true;
  }

  void run_directly() const {
    const TileGrid tiles = grid<kDirectChannels>(kPixelRows, kPixelColumns);
    scope.launch(&filter_flow_pixel_kernel<F, kDirectChannels, false>, tiles.works, kPixelThreads, 0,
                 arguments, tiles, TileShape{});
  }

  void run() const {
    if constexpr (!std::is_same_v<F, double>) {
      if (takes_quads(window)) {
        if (channels() <= 1 && run_quads<1>()) return;
        if (channels() <= 3 && run_quads<3>()) return;
        if (channels() > 4 && run_quads<8>()) return;
        if (run_quads<4>()) return;
      }
      if (channels() > 4 && run_pixels<8>()) return;
    }
    if (!run_pixels<4>()) run_directly();
  }
};

template <typename F>
void run_forward(const CudaScope& scope, const FilterShape& shape, const std::optional<Tensor>& image,
                 const Tensor& filters, const Tensor& output, const Tensor& flow, const Tensor& normalizer) {
  auto arguments = make_filter_arguments<FilterFlowArguments<F>>(shape, filters);
  if (image) {
    arguments.image = device_maps_of(*image);
    arguments.output = device_maps_of(output);
  }
  if (shape.flow) arguments.flow = device_maps_of(flow);
  if (shape.normalizer()) {
    arguments.normalizer = static_cast<accumulator_t<F>*>(normalizer.mutable_data_ptr());
  }
  Launch<F>{scope, arguments, shape.window, shared_memory_limit(filters)}.run();
}

// `like`: whose format the results have.
std::tuple<Tensor, Tensor, Tensor> filter(const char* op, const FilterShape& shape,
                                          const std::optional<Tensor>& image, const Tensor& filters) {
  const CudaScope scope(filters);
  const Tensor& like = image ? *image : filters;
  const ScalarType sums = accumulator_dtype(filters);
  const Tensor output = image ? new_maps(like, out_sizes(shape, shape.channels)) : empty_of(like, {0});
  const Tensor flow = shape.flow ? new_maps(like, out_sizes(shape, 2 * shape.groups), sums)
                                 : empty_of(like, {0}, sums);
  const Tensor normalizer =
      empty_of(like, shape.normalizer() ? out_sizes(shape, shape.groups) : std::vector<int64_t>{0}, sums);
  if (filters.numel() > 0) {
    const auto maps = image ? std::optional<Tensor>(as_maps(*image)) : std::nullopt;
    const Tensor weights = as_aligned(filters, 16);
    dispatch_floating(op, "filters", filters.scalar_type(), [&](auto tag) {
      run_forward<typename decltype(tag)::type>(scope, shape, maps, weights, output, flow, normalizer);
    });
  }
  return {output, flow, normalizer};
}

std::tuple<Tensor, Tensor, Tensor> filter_flow(const Tensor& image,    // [N, C, H, W]
                                               const Tensor& filters,  // [N, G * K * K, Ho, Wo]
                                               int64_t normalize, int64_t padding_mode, int64_t stride,
                                               int64_t upsample, int64_t dilation, int64_t groups,
                                               bool return_flow) {
  const FilterShape shape = check_filter_flow(image, filters, normalize, padding_mode, stride, upsample,
                                              dilation, groups, return_flow);
  return filter("filter_flow", shape, image, filters);
}

std::tuple<Tensor, Tensor> expected_flow(const Tensor& filters,  // [N, G * K * K, H, W]
                                         int64_t normalize, int64_t dilation, int64_t groups) {
  const FilterShape shape = check_expected_flow(filters, normalize, dilation, groups);
  const auto [output, flow, normalizer] = filter("expected_flow", shape, std::nullopt, filters);
  return {flow, normalizer};
}

}  // namespace
}  // namespace effops::localfilter

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("filter_flow", TORCH_BOX(&effops::localfilter::filter_flow));
  m.impl("expected_flow", TORCH_BOX(&effops::localfilter::expected_flow));
}
