// Runs the CUDA kernels of mean_shift in the simulator, by the same plans as on a device.
#define EFFOPS_SIMULATOR_LARGE  // see host_device.h
#include "pairwise/mean_shift_backward.cuh"
#include "pairwise/mean_shift_forward.cuh"
#include "simulate.h"

namespace {

using namespace effops;
using namespace effops::pairwise;

// See mean_shift_plan.cuh.
class SimulatedDevice {
 public:
  explicit SimulatedDevice(simulator::Call& call)
      : multiprocessors(call.integer("multiprocessors")),
        has_tensor_cores(call.flag("has_tensor_cores")),
        call_(call) {}

  template <typename U>
  U* allocate(int64_t count, bool zeros) {
    const auto fill = zeros ? simulator::Fill::kZeros : simulator::Fill::kGarbage;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(U));
    return static_cast<U*>(call_.scratch("scratch", simulator::DType::kUInt8, {bytes}, fill).raw());
  }

  template <typename Kernel, typename... Arguments>
  void launch(Kernel kernel, int64_t works, int threads, int64_t shared_bytes,
              const Arguments&... arguments) {
    simulator::launch(dim3(static_cast<unsigned>(works)), dim3(static_cast<unsigned>(threads)),
                      static_cast<size_t>(shared_bytes), kernel, arguments...);
  }

  int64_t multiprocessors;
  bool has_tensor_cores;

 private:
  simulator::Call& call_;
};

// x [B, N, D]; or not: weights [B, N], seeds [B, M, D], kappa_tensor [1], grad_output as the result; kappa,
// eta, tol, iterations, precision, return_all.
template <typename T>
class Run {
 public:
  explicit Run(simulator::Call& call)
      : call_(call),
        rows_(call.tensor(call.has("seeds") ? "seeds" : "x").size(1)),
        batch_(call.tensor("x").size(0)),
        channels_(call.tensor("x").size(2)),
        iterations_(call.integer("iterations")) {}

  void run() {
    SimulatedDevice device(call_);
    const MeanShiftCall<T> arguments = make_call();
    const bool of_all = call_.flag("return_all");
    MeanShiftResult<T> result{};
    if (!of_all) result.output = output("output", {batch_, rows_, channels_});
    if (of_all || call_.has("grad_output")) {
      result.iterates = output("iterates", {iterations_ + 1, batch_, rows_, channels_});
      result.sums = output("sums", {iterations_, 2, batch_, rows_});
    }
    result.steps = call_.output("steps", simulator::DType::kInt64, {batch_}).data<int64_t>();
    MeanShiftForward<T, SimulatedDevice>(device, arguments, result).run();
    if (!call_.has("grad_output")) return;
    const MeanShiftSaved<T> saved{data("grad_output"), of_all, result.iterates, result.sums, result.steps};
    MeanShiftGradients<T> gradients{};
    gradients.x = output("grad_x", call_.tensor("x").sizes());
    if (call_.has("weights")) gradients.weights = output("grad_weights", call_.tensor("weights").sizes());
    if (call_.has("seeds")) gradients.seeds = output("grad_seeds", call_.tensor("seeds").sizes());
    if (call_.has("kappa_tensor")) gradients.kappa = output("grad_kappa", {1});
    MeanShiftBackward<T, SimulatedDevice>(device, arguments, saved, gradients).run();
  }

 private:
  const T* data(const char* name) const {
    return call_.has(name) ? call_.tensor(name).template data<const T>() : nullptr;
  }
  T* output(const char* name, const std::vector<int64_t>& sizes) {
    return call_.output(name, simulator::kDTypeOf<T>, sizes).template data<T>();
  }

  MeanShiftCall<T> make_call() const {
    MeanShiftCall<T> arguments{};
    arguments.batch = batch_;
    arguments.points = call_.tensor("x").size(1);
    arguments.rows = rows_;
    arguments.channels = channels_;
    arguments.iterations = iterations_;
    arguments.x = data("x");
    arguments.weights = data("weights");
    arguments.seeds = data("seeds");
    arguments.kappa_tensor = data("kappa_tensor");
    arguments.kappa = call_.real("kappa");
    arguments.eta = call_.real("eta");
    arguments.tol = call_.real("tol");
    arguments.precision = call_.integer("precision");
    return arguments;
  }

  simulator::Call& call_;
  int64_t rows_, batch_, channels_, iterations_;
};

void mean_shift(simulator::Call& call) {
  simulator::dispatch<float, double>(call.tensor("x").dtype(),
                                     [&]<typename T>(std::type_identity<T>) { Run<T>(call).run(); });
}

}  // namespace

EFFOPS_SIMULATE("mean_shift", mean_shift)
