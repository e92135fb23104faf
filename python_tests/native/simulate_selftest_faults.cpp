// Kernels with one fault each, which the driver must refuse to run to the end. The faults hang on
// arguments, so that no compiler sees them coming.
#include <climits>

#include "common/host_device.h"
#include "simulate.h"

namespace {

using simulator::Call;
using simulator::Fill;
using simulator::Tensor;

constexpr unsigned kAll = 0xffffffffu;

// What the kernels work on: 64 inputs, 64 outputs, and a number that makes the fault.
struct Data {
  const float* x;
  float* y;
  int number;
};

using Kernel = void (*)(Data);

template <Kernel kKernel, unsigned kThreads, unsigned kBlocks = 1>
void run(Call& call) {
  const Tensor& x = call.tensor("x");
  Tensor& y = call.output("y", x.dtype(), {64}, call.has("zeros") ? Fill::kZeros : Fill::kGarbage);
  const Data data{x.data<float>(), y.data<float>(), static_cast<int>(call.integer("number"))};
  simulator::launch(kBlocks, kThreads, 64 * sizeof(float), kKernel, data);
}

// ----------------------------------------------------------------------------------------------- memory

__global__ void read_global(Data data) {
  data.y[threadIdx.x] = data.x[static_cast<int>(threadIdx.x) + data.number];
}
EFFOPS_SIMULATE("fault.read_global", run<read_global, 64>)

__global__ void write_global(Data data) { data.y[static_cast<int>(threadIdx.x) + data.number] = 1; }
EFFOPS_SIMULATE("fault.write_global", run<write_global, 64>)

__global__ void add_global(Data data) {
  atomicAdd(&data.y[static_cast<int>(threadIdx.x) + data.number], 1.0f);
}
EFFOPS_SIMULATE("fault.add_global", run<add_global, 64>)

__global__ void write_dynamic_shared(Data data) {
  EFFOPS_DYNAMIC_SHARED(float, values);
  values[static_cast<int>(threadIdx.x) + data.number] = 1;
}
EFFOPS_SIMULATE("fault.write_dynamic_shared", run<write_dynamic_shared, 64>)

__global__ void write_shared(Data data) {
  EFFOPS_SHARED(float, values, 64);
  float* pointer = values;
  pointer[static_cast<int>(threadIdx.x) + data.number] = 1;
}
EFFOPS_SIMULATE("fault.write_shared", run<write_shared, 64>)

__global__ void index_shared(Data data) {
  EFFOPS_SHARED(float, values, 64);
  values[static_cast<int>(threadIdx.x) + data.number] = 1;
}
EFFOPS_SIMULATE("fault.index_shared", run<index_shared, 64>)

// Its own stack, after a switch of fibers: the red zones must have survived it.
__global__ void write_local(Data data) {
  float values[8] = {};
  float* volatile pointer = values;
  __syncthreads();
  pointer[data.number] = 1;
  data.y[threadIdx.x] = pointer[threadIdx.x % 8];
}
EFFOPS_SIMULATE("fault.write_local", run<write_local, 64>)

// Shared memory of the block before.
__global__ void keep_shared(Data data) {
  static float* kept;
  EFFOPS_SHARED(float, values, 64);
  values[threadIdx.x] = 1;
  if (!kept) kept = values;
  data.y[threadIdx.x] = kept[0];
}
EFFOPS_SIMULATE("fault.keep_shared", run<keep_shared, 1, 2>)

__global__ void read_uninitialised_shared(Data data) {
  EFFOPS_SHARED(float, values, 64);
  if (static_cast<int>(threadIdx.x) != data.number) values[threadIdx.x] = 1;
  __syncthreads();
  data.y[threadIdx.x] = values[63 - threadIdx.x];
}
EFFOPS_SIMULATE("fault.read_uninitialised_shared", run<read_uninitialised_shared, 64>)

__global__ void read_uninitialised_output(Data data) { data.y[threadIdx.x] += 1; }
EFFOPS_SIMULATE("fault.read_uninitialised_output", run<read_uninitialised_output, 64>)

__global__ void misaligned(Data data) {
  const float4 value = *reinterpret_cast<const float4*>(data.x + data.number);
  data.y[0] = value.x + value.w;
}
EFFOPS_SIMULATE("fault.misaligned", run<misaligned, 1>)

__global__ void overflow(Data data) { data.y[0] = static_cast<float>(INT_MAX - 1 + data.number); }
EFFOPS_SIMULATE("fault.overflow", run<overflow, 1>)

// ---------------------------------------------------------------------------------------------- barriers

__global__ void exit_before_barrier(Data data) {
  if (static_cast<int>(threadIdx.x) == data.number) return;
  __syncthreads();
}
EFFOPS_SIMULATE("fault.exit_before_barrier", run<exit_before_barrier, 64>)

__global__ void two_barriers(Data data) {
  if (static_cast<int>(threadIdx.x) < data.number) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
EFFOPS_SIMULATE("fault.two_barriers", run<two_barriers, 64>)

__global__ void two_kinds_of_barriers(Data data) {
  if (static_cast<int>(threadIdx.x) < data.number) {
    __syncthreads();
  } else {
    __syncthreads_count(1);
  }
}
EFFOPS_SIMULATE("fault.two_kinds_of_barriers", run<two_kinds_of_barriers, 64>)

__global__ void barrier_against_shuffle(Data data) {
  if (static_cast<int>(threadIdx.x) < data.number) {
    __syncthreads();
  } else {
    __shfl_sync(kAll, 1, 0);
  }
}
EFFOPS_SIMULATE("fault.barrier_against_shuffle", run<barrier_against_shuffle, 32>)

// ---------------------------------------------------------------------------------------------- warps

__global__ void shuffle_with_exited(Data data) {
  if (static_cast<int>(threadIdx.x) == data.number) return;
  data.y[threadIdx.x] = __shfl_down_sync(kAll, 1.0f, 1);
}
EFFOPS_SIMULATE("fault.shuffle_with_exited", run<shuffle_with_exited, 32>)

__global__ void shuffle_with_missing(Data data) { data.y[threadIdx.x] = __shfl_down_sync(kAll, 1.0f, 1); }
EFFOPS_SIMULATE("fault.shuffle_with_missing", run<shuffle_with_missing, 16>)

__global__ void shuffle_without_self(Data data) {
  data.y[threadIdx.x] = __shfl_down_sync(static_cast<unsigned>(data.number), 1.0f, 1);
}
EFFOPS_SIMULATE("fault.shuffle_without_self", run<shuffle_without_self, 32>)

__global__ void shuffle_width(Data data) { data.y[threadIdx.x] = __shfl_sync(kAll, 1.0f, 1, data.number); }
EFFOPS_SIMULATE("fault.shuffle_width", run<shuffle_width, 32>)

// The value is undefined in CUDA: here NaN.
__global__ void shuffle_from_outside(Data data) {
  const unsigned mask = threadIdx.x < 16 ? 0xffffu : 0xffff0000u;
  data.y[threadIdx.x] = __shfl_sync(mask, data.x[threadIdx.x], data.number);
}
EFFOPS_SIMULATE("fault.shuffle_from_outside", run<shuffle_from_outside, 32>)

__global__ void different_masks(Data data) {
  const unsigned mask = static_cast<int>(threadIdx.x) < data.number ? kAll : 0xffff0000u;
  data.y[threadIdx.x] = static_cast<float>(__ballot_sync(mask, 1));
}
EFFOPS_SIMULATE("fault.different_masks", run<different_masks, 32>)

// Takes the active lanes for all of them.
__global__ void trust_active_mask(Data data) {
  if (static_cast<int>(threadIdx.x) >= data.number) return;
  data.y[threadIdx.x] = static_cast<float>(__activemask());
}
EFFOPS_SIMULATE("fault.trust_active_mask", run<trust_active_mask, 32>)

// ----------------------------------------------------------------------------------------------- races

__global__ void race_of_blocks(Data data) { data.y[data.number] = static_cast<float>(blockIdx.x); }
EFFOPS_SIMULATE("fault.race_of_blocks", run<race_of_blocks, 1, 2>)

__global__ void race_with_atomic(Data data) {
  if (threadIdx.x == 0) {
    data.y[0] = 5;
  } else {
    atomicAdd(&data.y[0], 1.0f);
  }
}
EFFOPS_SIMULATE("fault.race_with_atomic", run<race_with_atomic, 2>)

// The write comes after two reads; only the first of them races.
__global__ void race_with_read(Data data) {
  EFFOPS_SHARED(float, value, 1);
  if (threadIdx.x == 0) value[0] = 1;
  __syncthreads();
  data.y[threadIdx.x] = value[0];
  if (data.number) __syncthreads();
  if (threadIdx.x == 63) value[0] = 2;
}
EFFOPS_SIMULATE("fault.race_with_read", run<race_with_read, 64>)

__global__ void trap(Data data) {
  if (blockIdx.x == 1 && static_cast<int>(threadIdx.x) == data.number) __trap();
}
EFFOPS_SIMULATE("fault.trap", run<trap, 64, 2>)

void bad_launch(Call& call) {
  const auto threads = static_cast<unsigned>(call.integer("number"));
  simulator::launch(1, threads, 0, trap, Data{});
}
EFFOPS_SIMULATE("fault.launch", bad_launch)

}  // namespace
