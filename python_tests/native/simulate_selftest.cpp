// Kernels that are right, and use everything the simulator offers: test_simulator_selftest.py compares
// their results with the same computed in PyTorch.
#include <cstring>
#include <limits>

#include "common/dtype.h"
#include "common/host_device.h"
#include "simulate.h"

namespace {

using simulator::Call;
using simulator::DType;
using simulator::Tensor;

static_assert(alignof(float2) == 8 && alignof(float4) == 16 && alignof(double2) == 16 &&
              alignof(uchar4) == 4);
static_assert(sizeof(float3) == 12 && alignof(float3) == 4 && sizeof(double4) == 32 &&
              alignof(double4) == 16);

// --------------------------------------------------------------------------------------- block reduction

// With `barrier` false the barrier between the steps is missing.
template <typename T>
__global__ void __launch_bounds__(1024) block_sum_kernel(const T* __restrict__ x, T* sums, bool barrier) {
  EFFOPS_SHARED(T, partial, 1024);
  const unsigned thread = threadIdx.x;
  partial[thread] = x[blockIdx.x * blockDim.x + thread];
  __syncthreads();
#pragma unroll 1
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (thread < half) partial[thread] += partial[thread + half];
    if (barrier) __syncthreads();
  }
  if (thread == 0) sums[blockIdx.x] = partial[0];
}

void block_sum(Call& call) {
  const Tensor& x = call.tensor("x");  // [blocks, threads]
  Tensor& sums = call.output("sums", x.dtype(), {x.size(0)});
  const dim3 blocks(static_cast<unsigned>(x.size(0))), threads(static_cast<unsigned>(x.size(1)));
  simulator::dispatch<float, double, int32_t, int64_t>(x.dtype(), [&]<typename T>(std::type_identity<T>) {
    simulator::launch(blocks, threads, 0, block_sum_kernel<T>, x.data<const T>(), sums.data<T>(),
                      call.flag("barrier"));
  });
}
EFFOPS_SIMULATE("selftest.block_sum", block_sum)

// Each thread reads what its partner wrote; `barrier`: 0 none, 1 of the block, 2 of the warp, 3 a shuffle.
__global__ void exchange_kernel(const float* x, float* y, int partner_bit, int barrier) {
  EFFOPS_DYNAMIC_SHARED(float, values);
  const int thread = static_cast<int>(threadIdx.x);
  values[thread] = x[thread];
  if (barrier == 1) __syncthreads();
  if (barrier == 2) __syncwarp();
  if (barrier == 3) __shfl_sync(0xffffffffu, thread, 0);
  y[thread] = values[thread ^ partner_bit];
}

void exchange(Call& call) {
  const Tensor& x = call.tensor("x");
  Tensor& y = call.output("y", x.dtype(), x.sizes());
  simulator::launch(1, static_cast<unsigned>(x.numel()), x.bytes(), exchange_kernel, x.data<float>(),
                    y.data<float>(), static_cast<int>(call.integer("partner_bit")),
                    static_cast<int>(call.integer("barrier")));
}
EFFOPS_SIMULATE("selftest.exchange", exchange)

// ---------------------------------------------------------------------------------------- warp exchange

template <typename T>
__global__ void shuffle_kernel(const T* x, T* y, int argument, int width) {
  const unsigned thread = threadIdx.x, all = 0xffffffffu;
  const T value = x[thread];
  y[4 * thread] = __shfl_sync(all, value, argument, width);
  y[4 * thread + 1] = __shfl_up_sync(all, value, static_cast<unsigned>(argument), width);
  y[4 * thread + 2] = __shfl_down_sync(all, value, static_cast<unsigned>(argument), width);
  y[4 * thread + 3] = __shfl_xor_sync(all, value, argument, width);
}

void shuffle(Call& call) {
  const Tensor& x = call.tensor("x");
  Tensor& y = call.output("y", x.dtype(), {x.numel(), 4});
  simulator::dispatch<float, double, int32_t, int64_t>(x.dtype(), [&]<typename T>(std::type_identity<T>) {
    simulator::launch(1, static_cast<unsigned>(x.numel()), 0, shuffle_kernel<T>, x.data<T>(), y.data<T>(),
                      static_cast<int>(call.integer("argument")), static_cast<int>(call.integer("width")));
  });
}
EFFOPS_SIMULATE("selftest.shuffle", shuffle)

// Every other type that shuffles take.
__global__ void shuffle_types_kernel(int* y) {
  const unsigned all = 0xffffffffu, lane = threadIdx.x;
  int right = __shfl_sync(all, lane + 0x80000000u, 7) == 0x80000007u;
  right += __shfl_sync(all, lane + (1ul << 63), 7) == 7 + (1ul << 63);
  right += __shfl_sync(all, lane + (1ull << 63), 7) == 7 + (1ull << 63);
  right += __shfl_xor_sync(all, static_cast<short>(-static_cast<int>(lane)), 1) ==
           -static_cast<int>(lane ^ 1);
  right += __shfl_down_sync(all, lane % 2 == 0, 1) == (lane == 31 ? 0 : static_cast<int>(lane % 2));
  y[lane] = right;
}

void shuffle_types(Call& call) {
  Tensor& y = call.output("y", DType::kInt32, {32});
  simulator::launch(1, 32, 0, shuffle_types_kernel, y.data<int>());
}
EFFOPS_SIMULATE("selftest.shuffle_types", shuffle_types)

constexpr int kVotes = 8;

__global__ void vote_kernel(const int* x, unsigned* y) {
  const unsigned all = 0xffffffffu, thread = threadIdx.x;
  unsigned* votes = y + thread * kVotes;
  votes[0] = __ballot_sync(all, x[thread] & 1);
  votes[1] = static_cast<unsigned>(__any_sync(all, x[thread] > 90));
  votes[2] = static_cast<unsigned>(__all_sync(all, x[thread] >= 0));
  votes[3] = __match_any_sync(all, x[thread] % 3);
  // Eight lanes each take a path of their own length, and vote among themselves.
  const unsigned group = thread % 32 / 8, mask = 0xffu << (8 * group);
  unsigned rounds = 0;
  for (unsigned round = 0; round <= group; ++round) rounds += __ballot_sync(mask, x[thread] & 1) & mask;
  votes[4] = rounds;
  votes[5] = static_cast<unsigned>(__syncthreads_count(x[thread] & 1));
  votes[6] = static_cast<unsigned>(__syncthreads_or(x[thread] == 3));
  votes[7] = static_cast<unsigned>(__syncthreads_and(x[thread] >= 0));
}

void vote(Call& call) {
  const Tensor& x = call.tensor("x");
  Tensor& y = call.output("y", DType::kInt32, {x.numel(), kVotes});
  simulator::launch(1, static_cast<unsigned>(x.numel()), 0, vote_kernel, x.data<int>(),
                    static_cast<unsigned*>(y.raw()));
}
EFFOPS_SIMULATE("selftest.vote", vote)

// Lanes with odd x count themselves, one atomic per group that meets: any grouping is right.
__global__ void count_odd_kernel(const int* x, int* count) {
  if (x[threadIdx.x] % 2 == 0) return;
  const unsigned active = __activemask();
  const int leader = __ffs(static_cast<int>(active)) - 1;
  if (static_cast<int>(threadIdx.x % 32) == leader) atomicAdd(count, __popc(active));
}

void count_odd(Call& call) {
  const Tensor& x = call.tensor("x");
  Tensor& count = call.output("count", DType::kInt32, {}, simulator::Fill::kZeros);
  simulator::launch(1, static_cast<unsigned>(x.numel()), 0, count_odd_kernel, x.data<int>(),
                    count.data<int>());
}
EFFOPS_SIMULATE("selftest.count_odd", count_odd)

// ---------------------------------------------------------------------------------------------- atomics

constexpr int kAtomics = 9;

template <typename T>
__global__ void atomic_kernel(const T* x, T* y) {
  const T value = x[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(&y[0], value);
  if constexpr (std::is_integral_v<T>) {
    atomicMax(&y[1], value);
    atomicMin(&y[2], value);
    atomicAnd(&y[3], value);
    atomicOr(&y[4], value);
    atomicXor(&y[5], value);
    T old = atomicExch(&y[6], T(1));
    if (old == 0) atomicAdd(&y[7], T(1));  // exactly one thread sees the zero
    // The sum once more, the slow way.
    T expected;
    do {
      expected = old;
      old = atomicCAS(&y[8], expected, static_cast<T>(expected + value));
    } while (old != expected);
  }
}

// x as T; the integer types that PyTorch lacks come as the signed ones.
template <typename T>
void run_atomics(const Tensor& x, Tensor& y) {
  T* result = static_cast<T*>(y.raw());
  if constexpr (std::is_integral_v<T>) {
    result[2] = std::numeric_limits<T>::max();
    result[3] = static_cast<T>(-1);
  }
  simulator::launch(static_cast<unsigned>(x.size(0)), static_cast<unsigned>(x.size(1)), 0, atomic_kernel<T>,
                    static_cast<const T*>(x.raw()), result);
}

void atomics(Call& call) {
  const Tensor& x = call.tensor("x");
  Tensor& y = call.output("y", x.dtype(), {kAtomics}, simulator::Fill::kZeros);
  const bool is_unsigned = call.flag("unsigned");
  if (x.dtype() == DType::kFloat32) return run_atomics<float>(x, y);
  if (x.dtype() == DType::kFloat64) return run_atomics<double>(x, y);
  if (x.dtype() == DType::kInt64) return run_atomics<unsigned long long>(x, y);
  return is_unsigned ? run_atomics<unsigned>(x, y) : run_atomics<int>(x, y);
}
EFFOPS_SIMULATE("selftest.atomics", atomics)

// ---------------------------------------------------------------------- indices, memory, plain functions

// Every thread of a 3-D grid writes its coordinates to its own place.
__global__ void index_kernel(int* y) {
  const unsigned x = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y;
  const unsigned plane = blockIdx.z * blockDim.z + threadIdx.z;
  const unsigned place = (plane * gridDim.y * blockDim.y + row) * gridDim.x * blockDim.x + x;
  y[place] = static_cast<int>(x + 100 * row + 10000 * plane);
}

void indices(Call& call) {
  const std::vector<int64_t> g = call.integers("grid"), b = call.integers("block");
  auto size = [](const std::vector<int64_t>& v) {
    return dim3(static_cast<unsigned>(v[0]), static_cast<unsigned>(v[1]), static_cast<unsigned>(v[2]));
  };
  Tensor& y = call.output("y", DType::kInt32, {g[2] * b[2], g[1] * b[1], g[0] * b[0]});
  simulator::launch(size(g), size(b), 0, index_kernel, y.data<int>());
}
EFFOPS_SIMULATE("selftest.indices", indices)

// Reverses rows through shared arrays that must be each block's own: two of this kernel (one of an array
// type, one in a nested scope), one of a function, and the dynamic one.
EFFOPS_DEVICE int* function_array() {
  EFFOPS_SHARED(int, kept, 4);
  return kept;
}

__global__ void shared_kernel(const float4* x, float4* y, int* seen) {
  using Row = float[4];
  EFFOPS_SHARED(Row, rows, 32);
  EFFOPS_DYNAMIC_SHARED(float4, copies);
  const unsigned thread = threadIdx.x, last = blockDim.x - 1;
  if (thread == 0) {
    // Garbage, whatever the block before left here.
    seen[2 * blockIdx.x] = function_array()[2];
    EFFOPS_SHARED(int, nested, 1);
    seen[2 * blockIdx.x + 1] = nested[0];
    nested[0] = function_array()[2] = 1;
  }
  const float4 value = __ldg(&x[blockIdx.x * blockDim.x + thread]);
  *reinterpret_cast<float4*>(rows[thread]) = value;
  copies[thread] = make_float4(value.w, value.z, value.y, value.x);
  __syncthreads();
  const float* row = rows[last - thread];
  const float4 copy = copies[last - thread];
  y[blockIdx.x * blockDim.x + thread] = make_float4(row[0], copy.z, row[2], copy.x);
}

void shared_arrays(Call& call) {
  const Tensor& x = call.tensor("x");  // [blocks, threads, 4]
  Tensor& y = call.output("y", x.dtype(), x.sizes());
  Tensor& seen = call.output("seen", DType::kInt32, {x.size(0), 2});
  const auto threads = static_cast<unsigned>(x.size(1));
  simulator::launch(static_cast<unsigned>(x.size(0)), threads, threads * sizeof(float4), shared_kernel,
                    static_cast<const float4*>(x.raw()), static_cast<float4*>(y.raw()), seen.data<int>());
}
EFFOPS_SIMULATE("selftest.shared_arrays", shared_arrays)

__global__ void function_kernel(const float* x, float* y) {
  int i = 0;
  y[i++] = static_cast<float>(__popc(0xf0f0u) + __popcll(~0ull) + __clz(1) + __clzll(1) + __ffs(0) +
                              __ffs(8) + __ffsll(1ll << 40));
  y[i++] = static_cast<float>(__brev(1u) == 0x80000000u) + static_cast<float>(__umulhi(1u << 31, 6u));
  y[i++] = min(x[0], x[1]) + max(3, 4) + static_cast<float>(min(5u, 2u)) +
           static_cast<float>(max(int64_t{7}, int64_t{-7}));
  y[i++] = fminf(x[2], 1.5f) + max(x[2], 2.0f);  // x[2] is NaN
  y[i++] = rsqrtf(4.0f) + static_cast<float>(rsqrt(16.0));
  y[i++] = __expf(1.0f) + __logf(2.0f) + __sinf(0.5f) + __cosf(0.5f) + __powf(2.0f, 3.0f) +
           __fdividef(1.0f, 8.0f);
  y[i++] = static_cast<float>(__float2int_rn(2.5f) + 10 * __float2int_rd(-0.5f) + 100 * __float2int_ru(0.5f) +
                              1000 * __float2int_rz(-1.5f));
  y[i++] = static_cast<float>(__float2int_rz(x[2])) + static_cast<float>(__float2int_rz(1e30f) == INT32_MAX);
  y[i++] = __int_as_float(__float_as_int(x[0])) + __uint_as_float(__float_as_uint(x[1])) + __saturatef(7.0f);
}

void functions(Call& call) {
  Tensor& y = call.output("y", DType::kFloat32, {9});
  simulator::launch(1, 1, 0, function_kernel, call.tensor("x").data<float>(), y.data<float>());
}
EFFOPS_SIMULATE("selftest.functions", functions)

// ------------------------------------------------------------------------------------------ the archive

// Copies element by element, with the strides of x; says what else it has got.
void archive(Call& call) {
  const Tensor& x = call.tensor("x");
  Tensor& y = call.output("y", x.dtype(), x.sizes());
  const size_t bytes = simulator::size_of(x.dtype());
  for (int64_t i = 0; i < y.numel(); ++i) {
    int64_t rest = i, from = 0;
    for (auto d = static_cast<int64_t>(x.sizes().size()) - 1; d >= 0; --d) {
      from += rest % x.size(d) * x.stride(d);
      rest /= x.size(d);
    }
    std::memcpy(static_cast<char*>(y.raw()) + static_cast<size_t>(i) * bytes,
                static_cast<char*>(x.raw()) + static_cast<size_t>(from) * bytes, bytes);
  }
  Tensor& integer = call.output("integer", DType::kInt64, {});
  *integer.data<int64_t>() = call.integer("integer") + call.flag("flag") + call.has("absent");
  *call.output("real", DType::kFloat64, {}).data<double>() = call.real("real") + call.real("integer");
  *call.output("offset", DType::kInt64, {}).data<int64_t>() = reinterpret_cast<intptr_t>(x.raw()) % 16;
}
EFFOPS_SIMULATE("selftest.archive", archive)

}  // namespace
