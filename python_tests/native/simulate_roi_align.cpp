// Runs the CUDA kernels of roi_align in the simulator, with the launches of roi_align_cuda.cu.
#include "sampling/roi_align_kernels.cuh"
#include "simulate_pyramid.h"

namespace {

using namespace effops;
using namespace effops::sampling;

template <typename T>
class Run {
 public:
  explicit Run(simulator::Call& call) : call_(call), rois_(call.tensor("rois")) {
    arguments_.pyramid = simulator::read_pyramid(call);
    for (int64_t l = 0; l < arguments_.pyramid.levels; ++l) {
      arguments_.strides[l] = call.tensor("strides").data<double>()[l];
    }
    arguments_.rois = rois_.raw();
    arguments_.level = call.tensor("level").data<int64_t>();
    arguments_.rois_as_value = rois_.dtype() == call.tensor("map0").dtype();
    arguments_.settings = {static_cast<int32_t>(call.integer("height")),
                           static_cast<int32_t>(call.integer("width")),
                           static_cast<int32_t>(call.integer("sampling_ratio")), call.flag("aligned")};
    arguments_.rois_count = rois_.size(0);
  }

  void run() {
    forward();
    backward();
    map_gradients();
  }

 private:
  int64_t channels() const { return arguments_.pyramid.channels; }
  int64_t blocks_per_roi() const { return roi_blocks(channels(), arguments_.settings); }

  void forward() {
    const RoiSettings& s = arguments_.settings;
    T* output = call_
                    .output("output", call_.tensor("map0").dtype(),
                            {arguments_.rois_count, channels(), s.height, s.width})
                    .template data<T>();
    if (call_.flag("channels_last")) {
      const RoiTiling tiling = make_roi_tiling(arguments_.rois_count, channels(), s);
      simulator::launch_few_blocks(&roi_align_forward_channels_last_kernel<T>, tiling.works, kMapThreads,
                                   arguments_, tiling, output);
    } else {
      const int64_t works = blocks_per_roi() * arguments_.rois_count;
      simulator::launch_few_blocks(&roi_align_forward_kernel<T>, works, kMapThreads, arguments_,
                                   blocks_per_roi(), works, output);
    }
  }

  void backward() {
    using A = accumulator_t<T>;
    const DeviceGradients gradients = simulator::make_gradients<A>(call_, "", simulator::Fill::kZeros);
    const int64_t works = blocks_per_roi() * arguments_.rois_count;
    simulator::launch_few_blocks(&roi_align_backward_kernel<T>, works, kMapThreads, arguments_,
                                 blocks_per_roi(), works, call_.tensor("grad_output").data<const T>(),
                                 gradients);
  }

  void map_gradients() {
    using Roi = DeviceRoi<accumulator_t<T>>;
    static_assert(alignof(Roi) <= 16);
    auto* table = static_cast<Roi*>(call_
                                        .scratch("table", simulator::DType::kUInt8,
                                                 {arguments_.rois_count * static_cast<int64_t>(sizeof(Roi))})
                                        .raw());
    simulator::launch_few_blocks(&roi_table_kernel<T>, arguments_.rois_count, kMapThreads, arguments_, table);
    const DeviceGradients gradients =
        simulator::make_gradients<T>(call_, "deterministic_", simulator::Fill::kGarbage);
    const DevicePyramid& p = arguments_.pyramid;
    for (int64_t l = 0; l < p.levels; ++l) {
      const int64_t pixels = int64_t{p.maps[l].height} * p.maps[l].width;
      const RoiMapTiling tiling = make_roi_map_tiling(l, p.batch, p.channels, pixels);
      simulator::launch_few_blocks(&roi_align_map_gradient_kernel<T>, tiling.works, kMapThreads, arguments_,
                                   tiling, static_cast<const Roi*>(table),
                                   call_.tensor("grad_output").data<const T>(),
                                   static_cast<T*>(gradients.maps[l]));
    }
  }

  simulator::Call& call_;
  const simulator::Tensor& rois_;
  RoiAlignArguments<T> arguments_{};
};

void roi_align(simulator::Call& call) {
  simulator::dispatch<float, double, bf16, f16>(
      call.tensor("map0").dtype(), [&]<typename T>(std::type_identity<T>) { Run<T>(call).run(); });
}

}  // namespace

EFFOPS_SIMULATE("roi_align", roi_align)
