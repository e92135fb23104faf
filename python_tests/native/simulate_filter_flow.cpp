// Runs the CUDA kernels of filter_flow in the simulator, with the launches of filter_flow_cuda.cu and
// filter_flow_backward_cuda.cu.
#define EFFOPS_SIMULATOR_LARGE  // see host_device.h
#include <algorithm>
#include <optional>

#include "localfilter/filter_flow_image_kernels.cuh"
#include "localfilter/filter_gradient_quad_kernels.cuh"
#include "simulate.h"

namespace {

using namespace effops;
using namespace effops::localfilter;
using simulator::DType;

FloatType type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return FloatType::kDouble;
    case DType::kBFloat16: return FloatType::kBFloat16;
    case DType::kFloat16: return FloatType::kHalf;
    default: return FloatType::kFloat;
  }
}

// Of an argument [N, C, H, W] in any memory format.
DeviceMaps maps_of(const simulator::Tensor& maps) {
  return {maps.raw(), type_of(maps.dtype()), maps.stride(0), maps.stride(1), maps.stride(2), maps.stride(3)};
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int64_t works, int threads, int64_t bytes, const Arguments&... arguments) {
  constexpr int64_t kMaxBlocks = 2;  // small, so that kernels loop over the rest of the work
  const auto blocks = static_cast<unsigned>(std::min(works, kMaxBlocks));
  simulator::launch(dim3(blocks), dim3(static_cast<unsigned>(threads)), static_cast<size_t>(bytes), kernel,
                    arguments...);
}

enum Engine { kQuads = 0, kPixels = 1, kDirect = 2 };

// image, filters, grad_output, grad_flow (optional: with flow), the settings of the op, the engine; with
// channels_last, maps that are results are [N, H, W, C].
template <typename F>
class Run {
 public:
  using A = accumulator_t<F>;

  explicit Run(simulator::Call& call)
      : call_(call), image_(call.tensor("image")), filters_(call.tensor("filters")) {
    const auto setting = [&](const char* name) { return call.integer(name); };
    groups_ = setting("groups");
    channels_ = image_.size(1) / groups_;
    int64_t kernel = 1;
    while (groups_ * kernel * kernel < filters_.size(1)) ++kernel;
    const auto padding = static_cast<int>(setting("padding_mode"));
    window_ = {image_.size(2),      image_.size(3),    filters_.size(2),    filters_.size(3), kernel,
               setting("dilation"), setting("stride"), setting("upsample"), padding};
    normalize_ = static_cast<int>(setting("normalize"));
    if (normalize_ == kNone && padding == kRenormalize) normalize_ = kSum;

    arguments_.window = make_device_window(window_);
    arguments_.normalize = normalize_;
    arguments_.batch = batch();
    arguments_.groups = groups_;
    arguments_.group_channels = channels_;
    arguments_.filters = filters_.template data<const F>();
    arguments_.image = maps_of(image_);
    arguments_.output =
        output("output", image_.dtype(), image_.size(1), window_.out_height, window_.out_width);
    if (call.has("grad_flow")) {
      arguments_.flow = output("flow", kSums, 2 * groups_, window_.out_height, window_.out_width);
    }
    if (normalize_ != kNone) {
      arguments_.normalizer =
          call.output("normalizer", kSums, {batch(), groups_, window_.out_height, window_.out_width})
              .template data<A>();
    }
  }

  template <int kChannels>
  void quads() {
    const TilePlan plan = plan_quad_tile(window_, kChannels, sizeof(A), kLimit);
    const TileGrid grid =
        make_tile_grid(window_, batch(), groups_, run_count(channels_, kChannels), kQuadRows, kQuadColumns);
    launch(&filter_flow_quad_kernel<F, kChannels>, grid.works, kQuadThreads, plan.bytes, arguments_, grid,
           plan.shape);
  }

  template <int kChannels, bool kTiled>
  void pixels() {
    TilePlan plan;
    if (kTiled) plan = plan_pixel_tile(window_, window_.kernel, kChannels, sizeof(A), kLimit);
    const TileGrid grid =
        make_tile_grid(window_, batch(), groups_, run_count(channels_, kChannels), kPixelRows, kPixelColumns);
    launch(&filter_flow_pixel_kernel<F, kChannels, kTiled>, grid.works, kPixelThreads, plan.bytes, arguments_,
           grid, plan.shape);
  }

  void prepare_backward() {
    static_cast<FilterFlowArguments<F>&>(gradient_) = arguments_;
    gradient_.grad_output = maps_of(call_.tensor("grad_output"));
    if (call_.has("grad_flow")) gradient_.grad_flow = maps_of(call_.tensor("grad_flow"));
  }

  // Both gradients, that of the image by another name than gather() gives it.
  template <int kChannels>
  void quad_gradients() {
    make_grad_filters();
    const TilePlan plan = plan_quad_tile(window_, 2 * kChannels, sizeof(float), kLimit);
    const TileGrid grid = make_tile_grid(window_, batch(), groups_, 1, kQuadRows, kQuadColumns);
    float* halo = call_.scratch("halo", DType::kFloat32, {grid.works, channels_, plan.shape.plane()})
                      .template data<float>();
    launch(&filter_gradient_quad_kernel<F, kChannels>, grid.works, kQuadThreads, plan.bytes, gradient_, grid,
           plan.shape, halo);
    const DeviceMaps target =
        output("folded_grad_image", image_.dtype(), image_.size(1), window_.height, window_.width);
    if (image_.numel() == 0) return;
    launch(&fold_tiles_kernel<float>, tile_count(image_.numel(), kPixelThreads), kPixelThreads, 0, halo,
           arguments_.window, grid, plan.shape, channels_, target, image_.numel());
  }

  template <int kChannels, bool kTiled>
  void pixel_gradients() {
    make_grad_filters();
    const int64_t tap_rows = gradient_tap_rows(window_, channels_, kChannels);
    TilePlan plan;
    if (kTiled) plan = plan_pixel_tile(window_, tap_rows, kChannels, sizeof(A), kLimit);
    const TileGrid grid =
        make_tile_grid(window_, batch(), groups_, window_.kernel / tap_rows, kPixelRows, kPixelColumns);
    launch(&filter_gradient_pixel_kernel<F, kChannels, kTiled>, grid.works, kPixelThreads, plan.bytes,
           gradient_, grid, plan.shape, static_cast<int32_t>(tap_rows));
  }

  void gather() {
    const DeviceMaps target =
        output("grad_image", image_.dtype(), image_.size(1), window_.height, window_.width);
    if (image_.numel() == 0) return;
    const int64_t runs = run_count(channels_, kGatherChannels);
    const int64_t blocks = tile_count(window_.height * window_.width, kGatherThreads);
    const int64_t works = batch() * groups_ * runs * blocks;
    launch(&image_gradient_gather_kernel<F>, works, kGatherThreads, 0, gradient_, target, runs, blocks,
           works);
  }

  int64_t channels() const { return channels_; }

 private:
  static constexpr DType kSums = simulator::kDTypeOf<A>;
  static constexpr int64_t kLimit = 200 << 10;

  int64_t batch() const { return filters_.size(0); }

  void make_grad_filters() {
    gradient_.grad_filters =
        call_.output("grad_filters", filters_.dtype(), filters_.sizes()).template data<F>();
  }

  DeviceMaps output(const char* name, DType dtype, int64_t channels, int64_t height, int64_t width) {
    const bool last = call_.flag("channels_last");
    auto sizes = last ? std::vector<int64_t>{batch(), height, width, channels}
                      : std::vector<int64_t>{batch(), channels, height, width};
    const simulator::Tensor& tensor = call_.output(name, dtype, std::move(sizes));
    return make_device_maps(tensor.raw(), type_of(dtype), last, channels, height, width);
  }

  simulator::Call& call_;
  const simulator::Tensor &image_, &filters_;
  Window window_;
  int normalize_;
  int64_t groups_, channels_;  // of a group
  FilterFlowArguments<F> arguments_{};
  FilterGradientArguments<F> gradient_{};
};

// The instances of kernels that are run: not all, they take long to compile.
void run(Run<float>& run, Engine) {
  run.quads<3>();
  run.prepare_backward();
  if (run.channels() <= 3) run.quad_gradients<3>();
  run.gather();
}

void run(Run<bf16>& run, Engine) {
  run.quads<4>();
  run.prepare_backward();
  run.quad_gradients<4>();
}

void run(Run<double>& run, Engine engine) {
  engine == kPixels ? run.pixels<4, true>() : run.pixels<4, false>();
  run.prepare_backward();
  engine == kPixels ? run.pixel_gradients<4, true>() : run.pixel_gradients<4, false>();
  run.gather();
}

void filter_flow(simulator::Call& call) {
  simulator::dispatch<float, double, bf16>(call.tensor("filters").dtype(),
                                           [&]<typename F>(std::type_identity<F>) {
                                             Run<F> filter(call);
                                             run(filter, static_cast<Engine>(call.integer("engine")));
                                           });
}

}  // namespace

EFFOPS_SIMULATE("filter_flow", filter_flow)
