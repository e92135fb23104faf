// Which engine the pairs of mean_shift go through, how they are cut up, and the memory that needs. No torch:
// the simulator runs the same plans.
//
// A Device is where they run:
//   device.template allocate<U>(count, zeros)                     -> U*, aligned to 16 bytes
//   device.launch(kernel, blocks, threads, shared_bytes, arguments...)
//   device.multiprocessors, device.has_tensor_cores
#pragma once

#include <type_traits>

#include "mean_shift_scalar_kernels.cuh"
#include "mean_shift_small_kernels.cuh"
#include "mean_shift_tensor_kernels.cuh"

namespace effops::pairwise {

// Contiguous, on the device but for the numbers.
template <typename T>
struct MeanShiftCall {
  int64_t batch, points, rows, channels, iterations;
  const T* x;        // [B, N, D]
  const T* weights;  // [B, N], or null
  const T* seeds;    // [B, M, D], or null
  const T* kappa_tensor;  // or null
  double kappa, eta, tol;
  int64_t precision;
};

constexpr int64_t kSmallChannels = 3, kTensorChannels = 128;

enum class EngineKind { kSmall, kTensor, kScalar };

struct PairLayout {
  EngineKind engine;
  int parts;         // of a number, kTensor
  int64_t channels;  // padded
};

template <typename T>
PairLayout make_pair_layout(int64_t channels, bool has_tensor_cores, int64_t precision) {
  if (channels <= kSmallChannels) return {EngineKind::kSmall, 0, 4};
  if (sizeof(T) == 4 && has_tensor_cores && channels <= kTensorChannels) {
    int64_t padded = 16;
    while (padded < channels) padded *= 2;
    return {EngineKind::kTensor, precision == kHigh ? 2 : 1, padded};
  }
  return {EngineKind::kScalar, 0, round_up(channels, 16)};
}

// Calls run(engine) with an object of the engine's type. kSets: see TensorEngine.
template <typename T, int kSets, typename Run>
void with_pair_engine(const PairLayout& layout, const Run& run) {
  if (layout.engine == EngineKind::kSmall) return run(SmallEngine{});
  if (layout.engine == EngineKind::kScalar) return run(ScalarEngine<T>(0));
  if constexpr (sizeof(T) == 4) {
    const auto choose = [&](auto parts) {
      constexpr int kParts = decltype(parts)::value;
      switch (layout.channels) {
        case 16: return run(TensorEngine<16, kParts, kSets>{});
        case 32: return run(TensorEngine<32, kParts, kSets>{});
        case 64: return run(TensorEngine<64, kParts, kSets>{});
        default: return run(TensorEngine<128, kParts, kSets>{});
      }
    };
    if (layout.parts == 1) return choose(std::integral_constant<int, 1>{});
    return choose(std::integral_constant<int, 2>{});
  }
}

// The kernels of an engine, their shared memory, and the channels that a block makes sums of.
template <typename T, typename Engine>
struct ShiftKernel {  // TensorEngine
  static constexpr int64_t kShared = Engine::kSharedBytes, kSlice = Engine::kChannels;
  static auto get() { return &mean_shift_tensor_kernel<Engine>; }
};
template <typename T>
struct ShiftKernel<T, SmallEngine> {
  static constexpr int64_t kShared = 0, kSlice = 4;
  static auto get() { return &mean_shift_small_kernel<T>; }
};
template <typename T>
struct ShiftKernel<T, ScalarEngine<T>> {
  static constexpr int64_t kShared = sizeof(ScalarShared<T>), kSlice = ScalarEngine<T>::kSlice;
  static auto get() { return &mean_shift_scalar_kernel<T>; }
};

template <typename T, typename Engine>
struct ShiftGradKernel {  // TensorEngine
  static constexpr int64_t kShared = Engine::kSharedBytes;
  static auto get() { return &mean_shift_tensor_grad_kernel<Engine>; }
};
template <typename T>
struct ShiftGradKernel<T, SmallEngine> {
  static constexpr int64_t kShared = 0;
  static auto get() { return &mean_shift_small_grad_kernel<T>; }
};
template <typename T>
struct ShiftGradKernel<T, ScalarEngine<T>> {
  static constexpr int64_t kShared = sizeof(ScalarGradShared<T>);
  static auto get() { return &mean_shift_scalar_grad_kernel<T>; }
};

// slots: blocks that the device runs at a time. Columns are split where rows alone leave some of them empty;
// a block's start and end take about as long as two tiles.
inline PairTiling make_pair_tiling(int64_t batch, int64_t row_tiles, int64_t slices, int64_t tiles,
                                   int64_t slots) {
  constexpr int64_t kMaxSplits = 64;
  const int64_t blocks = batch * row_tiles * slices;
  double best_time = 0;
  PairTiling best{};
  for (int64_t splits = 1; splits <= kMaxSplits && (splits <= tiles || splits == 1); ++splits) {
    const int64_t each = divide_up(tiles, splits);
    if (each > 0 && divide_up(tiles, each) != splits) continue;  // some would have nothing to do
    const double waves = static_cast<double>(divide_up(blocks * splits, slots));
    const double time = waves * static_cast<double>(each + 2) + static_cast<double>(splits) / 8;
    if (splits > 1 && time >= best_time) continue;
    best_time = time;
    best = {batch, row_tiles, slices, splits, tiles, each};
  }
  return best;
}

template <typename T, int kSets>
PairTiling make_pair_tiling(const PairLayout& layout, int64_t batch, int64_t rows, int64_t columns,
                            int64_t multiprocessors) {
  PairTiling tiling{};
  with_pair_engine<T, kSets>(layout, [&](auto engine) {
    using Engine = decltype(engine);
    tiling = make_pair_tiling(batch, divide_up(rows, Engine::kRows),
                              divide_up(layout.channels, ShiftKernel<T, Engine>::kSlice),
                              divide_up(columns, Engine::kColumns), Engine::kBlocks * multiprocessors);
  });
  return tiling;
}

// A set of points, moving or not, as the kernels on pairs read it; zeros at first.
template <typename T>
struct PointBuffers {
  PaddedPoints<T> x{}, h{};
  PointScalars<T> weights{}, tau{};

  template <typename Device>
  PointBuffers(Device& device, const PairLayout& layout, int64_t batch, int64_t count, bool has_h) {
    const int64_t rows = round_up(count, kPointPad), numbers = batch * rows * layout.channels;
    const auto make_points = [&](PaddedPoints<T>& points) {
      points.rows = rows;
      points.channels = layout.channels;
      if (layout.engine == EngineKind::kTensor) {
        points.high = device.template allocate<bf16>(layout.parts * numbers, true);
        if (layout.parts == 2) points.low = points.high + numbers;
      } else {
        points.values = device.template allocate<T>(numbers, true);
      }
    };
    make_points(x);
    if (has_h) make_points(h);
    if (layout.engine == EngineKind::kSmall) {  // the fourth number of a point
      weights = {x.values + 3, rows, 4};
      if (has_h) tau = {h.values + 3, rows, 4};
      return;
    }
    weights = {device.template allocate<T>(batch * rows, true), rows, 1};
    tau = {device.template allocate<T>(batch * rows, true), rows, 1};
  }
};

// Writes unit rows of x [batch, count, channels] to `buffers`, and to `unit` if it isn't null.
template <typename T, typename Device>
void normalize_points(Device& device, const T* x, int64_t batch, int64_t count, int64_t channels,
                      const int32_t* lost, T* unit, const PaddedPoints<T>& padded) {
  const Normalization<T> arguments{x, batch, count, channels, lost, unit, padded};
  if (batch * count == 0) return;
  device.launch(&normalize_points_kernel<T>, point_blocks(batch * count), kPointThreads, 0, arguments);
}

}  // namespace effops::pairwise
