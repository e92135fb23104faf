// Runs the CUDA kernels of neighborhood_dot and neighborhood_mix in the simulator, with the launches of
// neighborhood_cuda.cu.
#define EFFOPS_SIMULATOR_LARGE
#include "localfilter/neighborhood_kernels.cuh"
#include "simulate_window_tiles.h"

namespace {

using namespace effops;
using namespace effops::localfilter;

// q, k [N, C, H, W], weights [N, K * K, H, W]; window, dilation, budget, channels_last. One dtype.
template <typename T>
class Run {
 public:
  explicit Run(simulator::Call& call)
      : call_(call),
        batch_(call.tensor("q").size(0)),
        window_(same_window(call.tensor("q").size(2), call.tensor("q").size(3), call.integer("window"),
                            call.integer("dilation"), kZeros)) {}

  // Outputs: dots [N, K * K, H, W], sums and transposed [N, C, H, W].
  void run() {
    dot();
    mix("sums", "k", false);
    mix("transposed", "q", true);
  }

 private:
  void dot() {
    const DotArguments<T> arguments{
        simulator::make_tiling<T>(call_, window_, batch_, false, kDotNeeds),
        simulator::device_maps<const T>(call_.tensor("q")),
        simulator::device_maps<const T>(call_.tensor("k")),
        simulator::output_maps<T>(call_, "dots", batch_, window_.taps(), window_.height, window_.width)};
    simulator::launch_tiles(&neighborhood_dot_kernel<T>, arguments);
  }

  void mix(const std::string& name, const std::string& maps, bool transposed) {
    const Tiling tiling = simulator::make_tiling<T>(call_, window_, batch_, transposed, kMixNeeds);
    const auto& v = call_.tensor(maps);
    const MixArguments<T> arguments{
        tiling, simulator::device_maps<const T>(call_.tensor("weights")), simulator::device_maps<const T>(v),
        simulator::sum_target<T>(call_, tiling, batch_, name, v.size(1)), transposed};
    if (v.size(1) > 0) simulator::launch_tiles(&neighborhood_mix_kernel<T>, arguments);
  }

  simulator::Call& call_;
  int64_t batch_;
  Window window_;
};

void neighborhood(simulator::Call& call) {
  simulator::dispatch<float, double, bf16, f16>(
      call.tensor("q").dtype(), [&]<typename T>(std::type_identity<T>) { Run<T>(call).run(); });
}

}  // namespace

EFFOPS_SIMULATE("neighborhood", neighborhood)
