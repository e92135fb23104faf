// What the drivers of the convolutions over sparse rows share: arguments from tensors, launches.
// To be included first.
#pragma once

#define EFFOPS_SIMULATOR_LARGE  // see host_device.h

#include <algorithm>

#include "rowconv/row_gemm_kernels.cuh"
#include "rowconv/row_outer_kernels.cuh"
#include "rowconv/row_setup.h"
#include "rowconv/row_weights_kernels.cuh"
#include "simulate_scan.h"

namespace simulator {

using effops::accumulator_t;
using effops::bf16;
using effops::f16;
namespace rowconv = effops::rowconv;

inline int64_t blocks_of(int64_t items, int64_t threads) { return (items + threads - 1) / threads; }

inline rowconv::IdMap id_map(const Tensor& tensor) { return {tensor.raw(), tensor.dtype() == DType::kInt64}; }

// Calls run(engine) with the engine of the argument "engine": 0 scalar, 1, 2, 4 tensor cores with so many
// warps side by side. The tensor engines that a driver names in kWarps; each takes seconds to compile.
template <typename T, int... kWarps, typename Run>
void with_engine(int64_t engine, const Run& run) {
  bool found = false;
  if constexpr (sizeof(T) == 2) {
    ((engine == kWarps && (run(rowconv::TensorEngine<kWarps>(0)), found = true)) || ...);
  }
  if constexpr (sizeof(T) >= 4) {
    if (engine == 0) {
      run(rowconv::ScalarEngine<T>(0));
      found = true;
    }
  }
  if (!found) fail("this driver has no such engine");
}

template <typename T, int... kWarps>
void run_gemm(Call& call, const rowconv::RowGemm<T>& gemm) {
  const int64_t engine = call.integer("engine");
  if (engine < 0) {
    launch_few_blocks(&rowconv::row_direct_kernel<T>, blocks_of(gemm.rows * gemm.channels(), 8 * 256),
                      rowconv::kDirectThreads, gemm);
    return;
  }
  with_engine<T, kWarps...>(engine, [&](auto chosen) {
    using Engine = decltype(chosen);
    const auto tiling = rowconv::make_gemm_tiling<Engine>(gemm.rows, gemm.groups, gemm.columns);
    if (tiling.works == 0) return;
    launch(dim3(static_cast<unsigned>(std::min(tiling.works, int64_t{2}))), dim3(Engine::kThreads),
           sizeof(rowconv::GemmShared<T, Engine>), &rowconv::row_gemm_kernel<T, Engine>, gemm, tiling);
  });
}

// Packs the branches' weights [groups * outputs, inputs, kh, kw].
template <typename T>
void pack_weights(Call& call, const std::string& name, const std::vector<const T*>& weights, bool transposed,
                  int64_t outputs, int64_t inputs, rowconv::RowGemm<T>& gemm) {
  rowconv::WeightPack<T> pack{};
  pack.branches = gemm.branches;
  std::copy(weights.begin(), weights.end(), pack.weight);
  pack.groups = gemm.groups;
  pack.outputs = outputs;
  pack.inputs = inputs;
  pack.transposed = transposed;
  gemm.depth = static_cast<int32_t>(pack.depth());
  gemm.columns = static_cast<int32_t>(pack.columns());
  pack.padded_depth = rowconv::padded_depth(gemm.depth, sizeof(T), call.integer("engine") < 0);
  gemm.padded_depth = static_cast<int32_t>(pack.padded_depth);
  const int64_t lines = gemm.branches.taps * gemm.channels();
  Tensor& packed = call.scratch(name, kDTypeOf<T>, {lines, gemm.padded_depth});
  Tensor& flags = call.scratch(name + "_flags", DType::kInt32, {rowconv::kFlagBlocks});
  launch(dim3(rowconv::kFlagBlocks), dim3(rowconv::kWeightThreads), 0, &rowconv::pack_weights_kernel<T>, pack,
         packed.data<T>(), flags.data<int32_t>());
  gemm.weights = packed.data<T>();
  gemm.not_finite = flags.data<int32_t>();
}

// How gradients of weights are computed, on tensor cores with kSide * kSide warps.
template <typename T, int kSide, typename Run>
void with_outer_engine(int64_t engine, const Run& run) {
  if constexpr (sizeof(T) == 2) {
    if (engine > 0) return run(rowconv::TensorOuter<kSide>(0));
  }
  if constexpr (sizeof(T) >= 4) return run(rowconv::ScalarOuter<T>(0));
  fail("this driver has no such engine");
}

// The gradients of the branches' weights, and of the biases if they are not null, from all but the parts.
template <typename T, int kSide>
void run_outer(Call& call, rowconv::RowOuter<T> outer, const std::vector<T*>& weights,
               const std::vector<T*>& biases) {
  using A = accumulator_t<T>;
  const int64_t outputs = outer.groups * outer.outputs, splits = call.integer("splits");
  outer.splits = splits;
  outer.parts = call.scratch("parts", kDTypeOf<A>, {splits, outer.branches.taps, outputs, outer.inputs})
                    .template data<A>();
  outer.bias_parts =
      call.scratch("bias_parts", kDTypeOf<A>, {splits, outer.branches.count, outputs}).template data<A>();
  if (call.integer("engine") < 0) {
    launch_few_blocks(&rowconv::row_outer_direct_kernel<T>, 2, rowconv::kOuterThreads, outer);
  } else {
    with_outer_engine<T, kSide>(call.integer("engine"), [&](auto chosen) {
      using Engine = decltype(chosen);
      const auto tiling = rowconv::make_outer_tiling<Engine>(outer.branches.taps, outer.groups, outer.outputs,
                                                             outer.inputs, splits);
      launch(dim3(2), dim3(Engine::kThreads), sizeof(rowconv::OuterShared<T, Engine>),
             &rowconv::row_outer_kernel<T, Engine>, outer, tiling);
    });
  }
  rowconv::WeightSums<T> sums{};
  sums.branches = outer.branches;
  std::copy(weights.begin(), weights.end(), sums.weight);
  sums.outputs = outputs;
  sums.inputs = outer.inputs;
  sums.splits = splits;
  sums.parts = outer.parts;
  launch_few_blocks(&rowconv::sum_weights_kernel<T>, 2, rowconv::kWeightThreads, sums);
  launch_few_blocks(&rowconv::row_bias_kernel<T>, 2, rowconv::kOuterThreads, outer);
  rowconv::BiasSums<T> bias_sums{};
  std::copy(biases.begin(), biases.end(), bias_sums.bias);
  bias_sums.branches = outer.branches.count;
  bias_sums.outputs = outputs;
  bias_sums.splits = splits;
  bias_sums.parts = outer.bias_parts;
  launch_few_blocks(&rowconv::sum_biases_kernel<T>, 1, rowconv::kWeightThreads, bias_sums);
}

}  // namespace simulator
