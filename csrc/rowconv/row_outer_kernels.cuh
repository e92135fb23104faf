// Gradients of the weights and biases of the convolutions over sparse rows. No torch, no launches.
//
//   part[split][tap][o][c] = sum of the split's rows of grad[row, o] * operand[source(row, tap), c]
//   bias_part[split][branch][o] = sum of the split's rows of grad_branch[row, o]
//
// in the accumulator type, summed over the splits in order by the kernels of row_weights_kernels.cuh: no
// atomics, so that results are bit-reproducible.
#pragma once

#include "../common/async_copy.h"
#include "../common/mma.h"
#include "row_gemm.cuh"

namespace effops::rowconv {

constexpr int kOuterStages = 3;
constexpr int kOuterThreads = 256;  // of the kernels without tiles

template <typename T>
struct RowOuter {
  RowSource source;
  BranchList branches;
  OperandRows<T> operand;
  OperandRows<T> grad;            // rows of the gradient
  const int64_t* grad_positions;  // which of them belongs to each row, or null: row r
  int64_t rows;                   // at most
  const int64_t* count;           // how many there are, or null: `rows`
  int32_t groups, outputs, inputs;  // channels of a group
  int64_t splits;
  accumulator_t<T>* parts;       // [splits, taps, groups * outputs, inputs]
  accumulator_t<T>* bias_parts;  // [splits, branches, groups * outputs]

  EFFOPS_DEVICE int64_t grad_row(int64_t row) const {
    return grad_positions == nullptr ? row : grad_positions[row];
  }
};

// The rows of a split: a fixed run, so that results don't depend on the device.
struct RowRun {
  int64_t begin, end;
};
template <typename T>
EFFOPS_DEVICE RowRun rows_of_split(const RowOuter<T>& outer, int64_t split) {
  const int64_t rows = outer.count == nullptr ? outer.rows : min(*outer.count, outer.rows);
  const int64_t each = (rows + outer.splits - 1) / outer.splits;
  return {min(split * each, rows), min((split + 1) * each, rows)};
}

// Parts that each take long enough to be worth a block, and few enough for their memory.
inline int64_t outer_splits(int64_t rows, int64_t tiles) {
  constexpr int64_t kLeastRows = 512, kWantedBlocks = 1024, kMostSplits = 256;
  const int64_t wanted = (kWantedBlocks + tiles - 1) / (tiles > 0 ? tiles : 1);
  const int64_t possible = (rows + kLeastRows - 1) / kLeastRows;
  const int64_t splits = wanted < possible ? wanted : possible;
  return splits < 1 ? 1 : splits < kMostSplits ? splits : kMostSplits;
}

// -------------------------------------------------------------------------------------------- engines

// A stage holds kDepth rows of kTile channels of either matrix. Chunks are placed so that eight rows of one
// chunk lie in different banks.
template <typename T, int kTile>
EFFOPS_DEVICE int outer_at(int row, int chunk) {
  return row * kTile + (chunk ^ (row % 8)) * kPackSize<T>;
}

// On tensor cores; kSide * kSide warps with 32 x 32 each.
template <int kSide>
struct TensorOuter {
  static constexpr bool kNative = kHasHalfMma;
  static constexpr int kTile = 32 * kSide, kThreads = 32 * kSide * kSide;
  static constexpr int kM = 4, kN = 8;

  int lane, row_warp, column_warp;
  EFFOPS_DEVICE explicit TensorOuter(unsigned thread)
      : lane(static_cast<int>(thread) % kWarpSize),
        row_warp(static_cast<int>(thread) / kWarpSize / kSide),
        column_warp(static_cast<int>(thread) / kWarpSize % kSide) {}

  EFFOPS_DEVICE int output(int i) const { return 32 * row_warp + 8 * i + lane / 4; }
  EFFOPS_DEVICE int input(int j) const { return 32 * column_warp + 8 * (j / 2) + 2 * (lane % 4) + j % 2; }

  template <typename T>
  EFFOPS_DEVICE void add(const T* grads, const T* values, float (&sums)[kM][kN]) const {
    const int inner = lane % 8, matrix = lane / 8;
#pragma unroll
    for (int k = 0; k < 32; k += 16) {
      uint32_t rows[2][4], columns[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int grad_chunk = 4 * row_warp + 2 * m + matrix % 2;
        load_matrices<true>(rows[m], grads + outer_at<T, kTile>(k + inner + 8 * (matrix / 2), grad_chunk));
        const int chunk = 4 * column_warp + 2 * m + matrix / 2;
        load_matrices<true>(columns[m], values + outer_at<T, kTile>(k + inner + 8 * (matrix % 2), chunk));
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t column[2] = {columns[n / 2][n % 2 * 2], columns[n / 2][n % 2 * 2 + 1]};
          multiply_add<T>(sums[2 * m][2 * n], sums[2 * m][2 * n + 1], sums[2 * m + 1][2 * n],
                          sums[2 * m + 1][2 * n + 1], rows[m], column);
        }
      }
    }
  }
};

// By plain instructions, 64 x 64; a thread has 4 x 4 neighbours.
template <typename T>
struct ScalarOuter {
  static constexpr bool kNative = true;
  static constexpr int kTile = 64, kThreads = 256;
  static constexpr int kM = 4, kN = 4;
  using A = accumulator_t<T>;

  int x, y;
  EFFOPS_DEVICE explicit ScalarOuter(unsigned thread)
      : x(static_cast<int>(thread) % 16), y(static_cast<int>(thread) / 16) {}

  EFFOPS_DEVICE int output(int i) const { return 4 * y + i; }
  EFFOPS_DEVICE int input(int j) const { return 4 * x + j; }

  EFFOPS_DEVICE static void load(const T* stage, int row, int channel, A (&values)[4]) {
    constexpr int kPack = kPackSize<T> < 4 ? kPackSize<T> : 4;
#pragma unroll
    for (int e = 0; e < 4; e += kPack) {
      const T* at = stage + outer_at<T, kTile>(row, (channel + e) / kPackSize<T>) +
                    (channel + e) % kPackSize<T>;
      A part[kPack];
      widen_pack(*reinterpret_cast<const Pack<T, kPack>*>(at), part);
#pragma unroll
      for (int p = 0; p < kPack; ++p) values[e + p] = part[p];
    }
  }

  EFFOPS_DEVICE void add(const T* grads, const T* values, A (&sums)[kM][kN]) const {
#pragma unroll 4
    for (int row = 0; row < 64 / static_cast<int>(sizeof(T)); ++row) {
      A left[4], right[4];
      load(grads, row, 4 * y, left);
      load(values, row, 4 * x, right);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) sums[i][j] += left[i] * right[j];
      }
    }
  }
};

// -------------------------------------------------------------------------------------------- loading

template <typename T, typename Engine>
struct OuterShared {
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));  // rows of a stage
  static constexpr int kMatrix = kDepth * Engine::kTile;
  T stage[kOuterStages * 2 * kMatrix];

  EFFOPS_DEVICE T* grads(int index) { return stage + 2 * index * kMatrix; }
  EFFOPS_DEVICE T* values(int index) { return grads(index) + kMatrix; }
};

struct OuterWork {
  RowRun run;
  TapWalk tap;
  int32_t group, first_output, first_input;
};

// A row of either matrix: null where there is none. Both are zero then, so that the padding multiplies
// nothing.
template <typename T>
struct OuterRow {
  const T* grad;
  const T* value;
};

template <typename T, typename Engine>
class OuterLoader {
 public:
  static constexpr int kDepth = OuterShared<T, Engine>::kDepth;
  static constexpr int kChunks = Engine::kTile / kPackSize<T>;  // of a row
  static constexpr int kStep = Engine::kThreads / kChunks;      // rows that the block copies at a time
  static constexpr int kLoads = kDepth / kStep;
  static_assert(kLoads >= 1 && kStep * kLoads == kDepth, "");

  EFFOPS_DEVICE OuterLoader(const RowOuter<T>& outer, const OuterWork& work, OuterShared<T, Engine>& shared)
      : outer_(outer), work_(work), shared_(shared), row_(work.run.begin) {
    look_up();
  }

  // Starts to fill a stage with the next rows; closes a group of copies.
  EFFOPS_DEVICE void start(int stage, AsyncCopies& copies) {
    const int chunk = static_cast<int>(threadIdx.x) % kChunks, slot = static_cast<int>(threadIdx.x) / kChunks;
    OuterRow<T> rows[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) rows[i] = next_[i];
    row_ += kDepth;
    look_up();
    const int32_t output = work_.first_output + chunk * kPackSize<T>;
    const int32_t input = work_.first_input + chunk * kPackSize<T>;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = outer_at<T, Engine::kTile>(slot + i * kStep, chunk);
      copy(shared_.grads(stage) + at, rows[i].grad, output, outer_.outputs, outer_.grad.aligned, copies);
      copy(shared_.values(stage) + at, rows[i].value, input, outer_.inputs, outer_.operand.aligned, copies);
    }
    copies.close_group();
  }

 private:
  // The rows after those that are copied: in flight meanwhile.
  EFFOPS_DEVICE void look_up() {
    const int slot = static_cast<int>(threadIdx.x) / kChunks;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      next_[i] = {nullptr, nullptr};
      const int64_t row = row_ + slot + i * kStep;
      if (row >= work_.run.end) continue;
      const int64_t source = outer_.source.row(outer_.source.place(row), outer_.branches, work_.tap);
      if (source == kNoRow) continue;
      const int32_t branch = work_.tap.branch;
      next_[i].grad = outer_.grad.row(outer_.grad_row(row), branch) + int64_t{work_.group} * outer_.outputs;
      next_[i].value = outer_.operand.row(source, 0) + int64_t{work_.group} * outer_.inputs;
    }
  }

  EFFOPS_DEVICE void copy(T* target, const T* row, int32_t channel, int32_t channels, bool aligned,
                          AsyncCopies& copies) const {
    const bool exists = row != nullptr && channel < channels;
    if (!exists || aligned) {
      copies.start(target, exists ? static_cast<const void*>(row + channel) : outer_.parts, exists);
      return;
    }
#pragma unroll 1
    for (int e = 0; e < kPackSize<T>; ++e) target[e] = channel + e < channels ? row[channel + e] : T{};
  }

  const RowOuter<T>& outer_;
  const OuterWork& work_;
  OuterShared<T, Engine>& shared_;
  int64_t row_;
  OuterRow<T> next_[kLoads];
};

// -------------------------------------------------------------------------------------------- kernels

struct OuterTiling {
  int64_t output_tiles, input_tiles, works;
};

template <typename Engine>
OuterTiling make_outer_tiling(int64_t taps, int64_t groups, int64_t outputs, int64_t inputs, int64_t splits) {
  const int64_t output_tiles = (outputs + Engine::kTile - 1) / Engine::kTile;
  const int64_t input_tiles = (inputs + Engine::kTile - 1) / Engine::kTile;
  return {output_tiles, input_tiles, splits * taps * groups * output_tiles * input_tiles};
}

template <typename T, typename Engine>
EFFOPS_DEVICE void make_outer_tile(const RowOuter<T>& outer, const OuterWork& work, int64_t split,
                                   OuterShared<T, Engine>& shared) {
  const Engine engine(threadIdx.x);
  accumulator_t<T> sums[Engine::kM][Engine::kN] = {};
  OuterLoader<T, Engine> loader(outer, work, shared);
  AsyncCopies copies;
  constexpr int kDepth = OuterShared<T, Engine>::kDepth;
  const int64_t steps = (work.run.end - work.run.begin + kDepth - 1) / kDepth;
  int used = 1;  // stages; with three of them, the first step fills the first
  for (int64_t step = 1 - kOuterStages; step < steps; ++step) {
    copies.wait<kOuterStages - 2>();
    __syncthreads();  // the stage is there for all, and the one before has been read
    loader.start(used == 0 ? kOuterStages - 1 : used - 1, copies);
    if (step >= 0) engine.add(shared.grads(used), shared.values(used), sums);
    used = used + 1 < kOuterStages ? used + 1 : 0;
  }
  copies.wait<0>();
  __syncthreads();  // nobody reads shared memory any more
  const int64_t outputs = int64_t{outer.groups} * outer.outputs;
  const int64_t tap = split * outer.branches.taps + work.tap.index;
#pragma unroll
  for (int i = 0; i < Engine::kM; ++i) {
    const int32_t output = work.first_output + engine.output(i);
    if (output >= outer.outputs) continue;
    const int64_t line = tap * outputs + int64_t{work.group} * outer.outputs + output;
#pragma unroll
    for (int j = 0; j < Engine::kN; ++j) {
      const int32_t input = work.first_input + engine.input(j);
      if (input < outer.inputs) outer.parts[line * outer.inputs + input] = sums[i][j];
    }
  }
}

// Parallelism: a block per split, tap, group and tile of 64 x 64 or 128 x 128 channels, which walks over the
// rows of the split, 64 bytes times the tile at a time, copied two stages ahead.
// Bytes: for every tap the gathered rows and the gradient once per tile column and row, from the second-level
// cache; parts written once. Bound: that cache up to about 128 channels, else tensor cores.
template <typename T, typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, 1)
    row_outer_kernel(const __grid_constant__ RowOuter<T> outer, OuterTiling tiling) {
  if constexpr (Engine::kNative) {
    using Shared = OuterShared<T, Engine>;
    EFFOPS_DYNAMIC_SHARED(Shared, shared);
    for (int64_t index = blockIdx.x; index < tiling.works; index += gridDim.x) {
      // Taps of a split are neighbours, so that they find its rows in the caches.
      int64_t rest = index;
      const auto next = [&](int64_t count) {
        const int64_t digit = rest % count;
        rest /= count;
        return static_cast<int32_t>(digit);
      };
      OuterWork work;
      work.first_input = next(tiling.input_tiles) * Engine::kTile;
      work.first_output = next(tiling.output_tiles) * Engine::kTile;
      work.group = next(outer.groups);
      work.tap = TapWalk::at(outer.branches, next(outer.branches.taps));
      work.run = rows_of_split(outer, rest);
      make_outer_tile<T, Engine>(outer, work, rest, *shared);
    }
  }
}

// The same for small groups: a thread per split, tap and weight; bound by the loads of its operands.
template <typename T>
__global__ void __launch_bounds__(kOuterThreads)
    row_outer_direct_kernel(const __grid_constant__ RowOuter<T> outer) {
  const int64_t plane = int64_t{outer.groups} * outer.outputs * outer.inputs;
  const int64_t total = outer.splits * outer.branches.taps * plane, step = int64_t{gridDim.x} * kOuterThreads;
  for (int64_t i = int64_t{blockIdx.x} * kOuterThreads + threadIdx.x; i < total; i += step) {
    const int64_t output = i % plane / outer.inputs, rest = i / plane;
    const int64_t input = output / outer.outputs * outer.inputs + i % outer.inputs;
    const TapWalk tap = TapWalk::at(outer.branches, static_cast<int32_t>(rest % outer.branches.taps));
    const RowRun run = rows_of_split(outer, rest / outer.branches.taps);
    accumulator_t<T> sum = 0;
#pragma unroll 2
    for (int64_t row = run.begin; row < run.end; ++row) {
      const int64_t source = outer.source.row(outer.source.place(row), outer.branches, tap);
      if (source == kNoRow) continue;
      sum += widen(outer.grad.row(outer.grad_row(row), tap.branch)[output]) *
             widen(outer.operand.row(source, 0)[input]);
    }
    outer.parts[i] = sum;
  }
}

// A block per split and 32 channels of a branch; its warps share the rows, and are summed in order.
template <typename T>
__global__ void __launch_bounds__(kOuterThreads) row_bias_kernel(const __grid_constant__ RowOuter<T> outer) {
  using A = accumulator_t<T>;
  constexpr int kWarps = kOuterThreads / kWarpSize;
  EFFOPS_SHARED(A, sums, kOuterThreads);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t channels = int64_t{outer.groups} * outer.outputs;
  const int64_t strips = (channels + kWarpSize - 1) / kWarpSize;
  for (int64_t index = blockIdx.x; index < outer.splits * outer.branches.count * strips; index += gridDim.x) {
    const int64_t channel = index % strips * kWarpSize + lane, rest = index / strips;
    const auto branch = static_cast<int32_t>(rest % outer.branches.count);
    const int64_t split = rest / outer.branches.count;
    const RowRun run = rows_of_split(outer, split);
    A sum = 0;
    if (channel < channels) {
#pragma unroll 4
      for (int64_t row = run.begin + warp; row < run.end; row += kWarps) {
        sum += widen(outer.grad.row(outer.grad_row(row), branch)[channel]);
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && channel < channels) {
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarpSize + lane];
      outer.bias_parts[rest * channels + channel] = sum;
    }
    __syncthreads();  // the next turn fills `sums`
  }
}

}  // namespace effops::rowconv
