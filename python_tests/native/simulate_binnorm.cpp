// Runs the CUDA kernels of binnorm in the simulator, with the launches of binnorm_cuda.cu.
#include "binary/binnorm_kernels.cuh"
#include "simulate_rows.h"

namespace {

using namespace effops;
using namespace effops::binary;

template <typename T>
void run(simulator::Call& call) {
  const simulator::Tensor& x = call.tensor("x");  // [rows, length]
  const int64_t rows = x.size(0), length = x.size(1), k = call.integer("k");
  T* y = call.output("output", x.dtype(), x.sizes()).template data<T>();
  T* grad_x = call.output("grad_x", x.dtype(), x.sizes()).template data<T>();
  choose_row_threads(length, [&](auto group, auto per_thread) {
    using Group = decltype(group);
    constexpr int kPerThread = decltype(per_thread)::value;
    simulator::launch_rows<Group>(&binnorm_kernel<T, Group, kPerThread>, rows, x.data<const T>(), rows,
                                  length, k, y);
    simulator::launch_rows<Group>(&binnorm_backward_kernel<T, Group, kPerThread>, rows,
                                  call.tensor("grad_output").data<const T>(), static_cast<const T*>(y), rows,
                                  length, grad_x);
  });
}

void binnorm(simulator::Call& call) {
  simulator::dispatch<float, double, bf16, f16>(call.tensor("x").dtype(),
                                                [&]<typename T>(std::type_identity<T>) { run<T>(call); });
}

}  // namespace

EFFOPS_SIMULATE("binnorm", binnorm)
