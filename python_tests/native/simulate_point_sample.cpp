// Runs the CUDA kernels of point_sample in the simulator, with the launches of point_sample_cuda.cu.
#include "sampling/point_sample_kernels.cuh"
#include "simulate_pyramid.h"

namespace {

using namespace effops;
using namespace effops::sampling;

template <typename T>
class Run {
 public:
  explicit Run(simulator::Call& call)
      : call_(call),
        map_(call.tensor("map0")),
        xy_(call.tensor("xy")),
        arguments_{simulator::read_pyramid(call),
                   call.tensor("batch").data<int64_t>(),
                   call.tensor("level").data<int64_t>(),
                   xy_.raw(),
                   xy_.dtype() == map_.dtype(),
                   0,
                   xy_.size(0)} {}

  void run() {
    call_.flag("vectors") ? forward<kPackSize<T>>() : forward<1>();
    backward<true, true>("both_");
    backward<true, false>("map_");
    backward<false, true>("xy_");
    map_gradients();
  }

 private:
  int64_t blocks(int vector) {
    arguments_.lanes_log2 = point_lanes_log2(arguments_.pyramid.channels, vector);
    return point_blocks(arguments_.points, arguments_.lanes_log2);
  }

  template <int kVector>
  void forward() {
    const simulator::Tensor& output =
        call_.output("output", map_.dtype(), {arguments_.points, arguments_.pyramid.channels});
    const int64_t works = blocks(kVector);
    simulator::launch_few_blocks(&point_sample_forward_kernel<T, kVector>, works, kMapThreads, arguments_,
                                 output.data<T>());
  }

  template <bool kScatter, bool kNeedXy>
  void backward(const std::string& prefix) {
    using A = accumulator_t<T>;
    DeviceGradients gradients{};
    if (kScatter) gradients = simulator::make_gradients<A>(call_, prefix, simulator::Fill::kZeros);
    void* grad_xy = kNeedXy ? call_.output(prefix + "grad_xy", xy_.dtype(), xy_.sizes()).raw() : nullptr;
    const int64_t works = blocks(1);
    simulator::launch_few_blocks(&point_sample_backward_kernel<T, kScatter, kNeedXy>, works, kMapThreads,
                                 arguments_, call_.tensor("grad_output").data<const T>(), gradients, grad_xy);
  }

  void map_gradients() {
    const DeviceGradients gradients =
        simulator::make_gradients<T>(call_, "deterministic_", simulator::Fill::kGarbage);
    const DevicePyramid& p = arguments_.pyramid;
    for (int64_t l = 0; l < p.levels; ++l) {
      const int64_t pixels = int64_t{p.maps[l].height} * p.maps[l].width;
      const MapTiling tiling = make_map_tiling(l, p.batch, pixels, p.channels, kOwnedPixels, kWarpSize);
      simulator::launch_few_blocks(&point_sample_map_gradient_kernel<T>, tiling.works, kMapThreads,
                                   arguments_, tiling, call_.tensor("grad_output").data<const T>(),
                                   static_cast<T*>(gradients.maps[l]));
    }
  }

  simulator::Call& call_;
  const simulator::Tensor& map_;
  const simulator::Tensor& xy_;
  PointSampleArguments<T> arguments_;
};

void point_sample(simulator::Call& call) {
  simulator::dispatch<float, double, bf16, f16>(
      call.tensor("map0").dtype(), [&]<typename T>(std::type_identity<T>) { Run<T>(call).run(); });
}

}  // namespace

EFFOPS_SIMULATE("point_sample", point_sample)
