// Weights in the order in which the kernels read them, and back. No torch, no launches.
#pragma once

#include "row_gemm.cuh"

namespace effops::rowconv {

constexpr int kWeightThreads = 256;

template <typename T>
struct WeightPack {
  BranchList branches;
  const T* weight[kMaxBranches];  // of each branch [groups * outputs, inputs, kernel_height, kernel_width]
  int64_t groups, outputs, inputs;  // the latter: channels of a group
  bool transposed;  // columns are the inputs, depth the outputs: for the gradient of the operand
  int64_t padded_depth;

  EFFOPS_HD int64_t columns() const { return transposed ? inputs : outputs; }
  EFFOPS_HD int64_t depth() const { return transposed ? outputs : inputs; }
};

// packed[tap][group][column][k] = the weight, zeros from the depth on. not_finite[block]: whether the block
// has packed an infinity or NaN. A thread per element; kFlagBlocks blocks. Bytes: the weights, read in steps
// of kernel_height * kernel_width elements, and written.
template <typename T>
__global__ void __launch_bounds__(kWeightThreads)
    pack_weights_kernel(const __grid_constant__ WeightPack<T> pack, T* packed, int32_t* not_finite) {
  const int64_t lines = pack.groups * pack.columns(), total = pack.branches.taps * lines * pack.padded_depth;
  bool found = false;
  const int64_t step = int64_t{gridDim.x} * kWeightThreads;
  for (int64_t i = int64_t{blockIdx.x} * kWeightThreads + threadIdx.x; i < total; i += step) {
    const int64_t line = i / pack.padded_depth, k = i - line * pack.padded_depth;
    const TapWalk tap = TapWalk::at(pack.branches, static_cast<int32_t>(line / lines));
    const int64_t group_column = line % lines;
    T value{};
    if (k < pack.depth()) {
      const int64_t group = group_column / pack.columns(), column = group_column % pack.columns();
      const int64_t output = pack.transposed ? group * pack.outputs + k : group_column;
      const int64_t input = pack.transposed ? column : k;
      const Branch& branch = pack.branches.branch[tap.branch];
      const int64_t taps = int64_t{branch.taps()};
      value = pack.weight[tap.branch][(output * pack.inputs + input) * taps +
                                      int64_t{tap.y} * branch.kernel_width + tap.x];
      const auto wide = widen(value);
      found = found || !(wide - wide == 0);
    }
    packed[i] = value;
  }
  const int any = __syncthreads_or(found);
  if (threadIdx.x == 0) not_finite[blockIdx.x] = any;
}

template <typename T>
struct WeightSums {
  BranchList branches;
  T* weight[kMaxBranches];  // of each branch [outputs, inputs, kernel_height, kernel_width]
  int64_t outputs, inputs;  // all outputs, inputs of a group
  int64_t splits;
  const accumulator_t<T>* parts;  // [splits, taps, outputs, inputs]
};

// weight = the sum of the parts, in order. A thread per element; bound by reading the parts.
template <typename T>
__global__ void __launch_bounds__(kWeightThreads)
    sum_weights_kernel(const __grid_constant__ WeightSums<T> sums) {
  const int64_t plane = sums.outputs * sums.inputs, total = sums.branches.taps * plane;
  const int64_t step = int64_t{gridDim.x} * kWeightThreads;
  for (int64_t i = int64_t{blockIdx.x} * kWeightThreads + threadIdx.x; i < total; i += step) {
    accumulator_t<T> sum = 0;
#pragma unroll 4
    for (int64_t split = 0; split < sums.splits; ++split) sum += sums.parts[split * total + i];
    const TapWalk tap = TapWalk::at(sums.branches, static_cast<int32_t>(i / plane));
    const Branch& branch = sums.branches.branch[tap.branch];
    const int64_t taps = int64_t{branch.taps()};
    sums.weight[tap.branch][i % plane * taps + int64_t{tap.y} * branch.kernel_width + tap.x] = narrow<T>(sum);
  }
}

template <typename T>
struct BiasSums {
  T* bias[kMaxBranches];  // of each branch [outputs], or null
  int32_t branches;
  int64_t outputs, splits;
  const accumulator_t<T>* parts;  // [splits, branches, outputs]
};

// The same for biases.
template <typename T>
__global__ void __launch_bounds__(kWeightThreads)
    sum_biases_kernel(const __grid_constant__ BiasSums<T> sums) {
  const int64_t total = sums.branches * sums.outputs, step = int64_t{gridDim.x} * kWeightThreads;
  for (int64_t i = int64_t{blockIdx.x} * kWeightThreads + threadIdx.x; i < total; i += step) {
    accumulator_t<T> sum = 0;
#pragma unroll 4
    for (int64_t split = 0; split < sums.splits; ++split) sum += sums.parts[split * total + i];
    T* bias = sums.bias[i / sums.outputs];
    if (bias != nullptr) bias[i % sums.outputs] = narrow<T>(sum);
  }
}

// branch_grad[branch][row][o] = grad[row][o] where the branch has passed its relu, else 0.
//
// Parallelism: a thread per row and 8 channels. Bytes: the gradient, a bit per branch and channel, and the
// branches' gradients; bound by writing them.
template <typename T>
__global__ void __launch_bounds__(kWeightThreads)
    split_gradient_kernel(const T* grad, const uint8_t* signs, int64_t rows, int64_t channels,
                          int32_t branches, T* branch_grad) {
  constexpr int kOctet = 8;
  const int64_t octets = (channels + kOctet - 1) / kOctet, step = int64_t{gridDim.x} * kWeightThreads;
  const bool aligned = channels % kOctet == 0 && reinterpret_cast<uintptr_t>(grad) % 16 == 0;
  for (int64_t i = int64_t{blockIdx.x} * kWeightThreads + threadIdx.x; i < rows * octets; i += step) {
    const int64_t row = i / octets, first = (i - row * octets) * kOctet, at = row * channels + first;
    for (int32_t branch = 0; branch < branches; ++branch) {
      const uint32_t bits = signs[branch * rows * octets + i];
      T* target = branch_grad + branch * rows * channels + at;
      constexpr int kPack = kPackSize<T>;
      if (aligned) {
#pragma unroll
        for (int p = 0; p < kOctet; p += kPack) {
          Pack<T, kPack> pack = load_pack<kPack>(grad + at + p);
#pragma unroll
          for (int e = 0; e < kPack; ++e) {
            if ((bits >> (p + e) & 1u) == 0) pack.data[e] = T{};
          }
          *reinterpret_cast<Pack<T, kPack>*>(target + p) = pack;
        }
      } else {
#pragma unroll
        for (int e = 0; e < kOctet; ++e) {
          if (first + e < channels) target[e] = (bits >> e & 1u) != 0 ? grad[at + e] : T{};
        }
      }
    }
  }
}

}  // namespace effops::rowconv
