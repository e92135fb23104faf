// Runs the CUDA kernels of local_attention in the simulator, with the launches of local_attention_cuda.cu.
#define EFFOPS_SIMULATOR_LARGE
#include "localfilter/local_attention_backward_kernels.cuh"
#include "localfilter/local_attention_kernels.cuh"
#include "simulate_window_tiles.h"

namespace {

using namespace effops;
using namespace effops::localfilter;

// q, k [N, C, H, W], v, grad_output [N, Cv, H, W]; window, dilation, border, scale, budget, channels_last.
// The outputs of the forward pass go into the backward pass.
template <typename T>
class Run {
 public:
  using A = accumulator_t<T>;

  explicit Run(simulator::Call& call)
      : call_(call),
        batch_(call.tensor("q").size(0)),
        window_(same_window(call.tensor("q").size(2), call.tensor("q").size(3), call.integer("window"),
                            call.integer("dilation"), static_cast<int>(call.integer("border")))) {}

  void run() {
    forward();
    backward();
  }

 private:
  int64_t channels(const char* name) const { return call_.tensor(name).size(1); }
  Maps<const T> maps(const char* name) const { return simulator::device_maps<const T>(call_.tensor(name)); }
  A scale() const { return static_cast<A>(call_.real("scale")); }

  void forward() {
    const Tiling tiling = simulator::make_tiling<T>(call_, window_, batch_, false, kAttentionNeeds);
    log_sum_exp_ =
        call_.output("log_sum_exp", simulator::kDTypeOf<A>, {batch_, window_.height, window_.width})
            .template data<A>();
    AttentionArguments<T> arguments{tiling,
                                    maps("q"),
                                    maps("k"),
                                    maps("v"),
                                    simulator::sum_target<T>(call_, tiling, batch_, "output", channels("v")),
                                    log_sum_exp_,
                                    scale()};
    output_ = arguments.output.maps;
    simulator::launch_tiles(&local_attention_kernel<T>, arguments);
  }

  void backward() {
    const int64_t pixels = window_.height * window_.width;
    AttentionGradArguments<T> arguments{};
    arguments.q = maps("q");
    arguments.k = maps("k");
    arguments.v = maps("v");
    arguments.grad_output = maps("grad_output");
    arguments.log_sum_exp = log_sum_exp_;
    arguments.scale = scale();
    A* delta = call_.scratch("delta", simulator::kDTypeOf<A>, {batch_, pixels}).template data<A>();
    const Maps<const T> output{output_.data,           output_.channels,     output_.image_stride,
                               output_.channel_stride, output_.pixel_stride, false};
    simulator::launch(dim3(1), dim3(kDeltaThreads), 0, &attention_delta_kernel<T>, arguments.grad_output,
                      output, batch_, pixels, delta);
    arguments.delta = delta;
    arguments.tiling = simulator::make_tiling<T>(call_, window_, batch_, false, kQueryGradNeeds);
    arguments.grad_q = simulator::sum_target<T>(call_, arguments.tiling, batch_, "grad_q", channels("q"));
    simulator::launch_tiles(&attention_query_grad_kernel<T>, arguments);
    arguments.tiling = simulator::make_tiling<T>(call_, window_, batch_, true, kKeyGradNeeds);
    arguments.need_k = arguments.need_v = true;
    arguments.grad_k = simulator::sum_target<T>(call_, arguments.tiling, batch_, "grad_k", channels("k"));
    arguments.grad_v = simulator::sum_target<T>(call_, arguments.tiling, batch_, "grad_v", channels("v"));
    simulator::launch_tiles(&attention_key_grad_kernel<T>, arguments);
  }

  simulator::Call& call_;
  int64_t batch_;
  Window window_;
  A* log_sum_exp_ = nullptr;
  Maps<T> output_{};
};

void local_attention(simulator::Call& call) {
  simulator::dispatch<float, double, bf16, f16>(
      call.tensor("q").dtype(), [&]<typename T>(std::type_identity<T>) { Run<T>(call).run(); });
}

}  // namespace

EFFOPS_SIMULATE("local_attention", local_attention)
