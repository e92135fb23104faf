// Kernels on pairs by plain instructions, for float and double and all numbers of channels. No torch, no
// launches.
//
// A block has 64 rows and walks over tiles of 32 columns. Of both it stages 64 bytes of channels at a time in
// shared memory to compute the similarities, 4 x 4 of them per thread; the weights of the pairs go through
// shared memory; then the columns pass a second time, to be added up in registers. Beyond 8 stages of
// channels a block makes a slice of the sums only, and similarities are computed again for every slice.
#pragma once

#include "mean_shift_pairs.cuh"

namespace effops::pairwise {

template <typename T>
struct ScalarEngine {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 64, kColumns = 32;
  static constexpr int kBlocks = sizeof(T) == 4 ? 3 : 2;  // of a multiprocessor
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));  // channels of a stage
  static constexpr int kStages = 8;  // of a slice
  static constexpr int kSlice = kStages * kDepth;
  static constexpr int kAdjacent = kDepth / 8;  // channels of a stage that a thread adds up
  static constexpr int kStride = kDepth + kPackSize<T>;  // of a staged point: 8 of them touch each bank once
  static constexpr int kWeightStride = kColumns + kPackSize<T>;

  using Pack = effops::Pack<T, kPackSize<T>>;
  using Sums = T[kStages][4][kAdjacent];

  // A thread has rows y + 16 i and columns x + 8 j.
  int x, y;
  EFFOPS_DEVICE explicit ScalarEngine(unsigned thread)
      : x(static_cast<int>(thread) % 8), y(static_cast<int>(thread) / 8) {}
  EFFOPS_DEVICE int row(int i) const { return y + 16 * i; }
  EFFOPS_DEVICE int column(int j) const { return x + 8 * j; }

  EFFOPS_DEVICE static Pack pack_at(const T* from) { return *reinterpret_cast<const Pack*>(from); }

  // Copies a stage of kCount points to shared memory.
  template <int kCount>
  EFFOPS_DEVICE static void stage(const PaddedPoints<T>& points, int64_t image, int64_t first,
                                  int64_t channel, T* to) {
    constexpr int kPacks = kDepth / kPackSize<T>;
#pragma unroll
    for (int i = 0; i < kCount * kPacks; i += kThreads) {
      const int index = i + static_cast<int>(threadIdx.x), point = index / kPacks;
      const int at = index % kPacks * kPackSize<T>;
      const T* from = points.values + points.offset(image, first + point) + channel + at;
      const Pack pack = load_pack<kPackSize<T>>(from);
      *reinterpret_cast<Pack*>(to + point * kStride + at) = pack;
    }
  }

  // sums[i][j] += row i . column j, of the staged channels.
  EFFOPS_DEVICE void add_products(const T* rows, const T* columns, T (&sums)[4][4]) const {
#pragma unroll 1
    for (int at = 0; at < kDepth; at += kPackSize<T>) {
      Pack row_packs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) row_packs[i] = pack_at(rows + row(i) * kStride + at);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Pack column_pack = pack_at(columns + column(j) * kStride + at);
#pragma unroll
        for (int k = 0; k < kPackSize<T>; ++k) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[i][j] += row_packs[i].data[k] * column_pack.data[k];
        }
      }
    }
  }

  // sums[i][c] += sum_j weights[row i][j] columns[j][this thread's channel c], of the staged channels.
  EFFOPS_DEVICE void mix(const T* weights, const T* columns, T (&sums)[4][kAdjacent]) const {
#pragma unroll 2
    for (int j = 0; j < kColumns; j += kPackSize<T>) {
      Pack packs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) packs[i] = pack_at(weights + row(i) * kWeightStride + j);
#pragma unroll
      for (int k = 0; k < kPackSize<T>; ++k) {
#pragma unroll
        for (int c = 0; c < kAdjacent; ++c) {
          const T value = columns[(j + k) * kStride + kAdjacent * x + c];
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[i][c] += packs[i].data[k] * value;
        }
      }
    }
  }

  // Writes the sums of a slice; `adds`: to what is there.
  EFFOPS_DEVICE void store(const PairArguments<T>& arguments, const PairWork& work, const Sums& sums,
                           bool adds) const {
    const int64_t channels = arguments.rows.channels;
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      const int64_t channel = int64_t{work.slice} * kSlice + s * kDepth + kAdjacent * x;
      if (channel >= channels) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T* to = arguments.sums + arguments.row_index(work, work.row_tile * kRows + row(i)) * channels +
                channel;
#pragma unroll
        for (int c = 0; c < kAdjacent; ++c) to[c] = adds ? to[c] + sums[s][i][c] : sums[s][i][c];
      }
    }
  }
};

// The sum over the eight threads that share their rows. All of them get the same bits.
template <typename T>
EFFOPS_DEVICE T add_row_threads(T value) {
#pragma unroll
  for (int offset = 1; offset < 8; offset *= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

template <typename T>
struct ScalarShared {
  using Engine = ScalarEngine<T>;
  T rows[Engine::kRows * Engine::kStride], columns[Engine::kColumns * Engine::kStride];
  T weights[Engine::kRows * Engine::kWeightStride];
};

// Parallelism: see the top. Bound: multiply-adds, 2 N^2 D of them in up to 128 channels (64 of double), of
// which a thread makes 8 per load from shared memory for the similarities, 4 for the sums.
template <typename T>
__global__ void __launch_bounds__(ScalarEngine<T>::kThreads, ScalarEngine<T>::kBlocks)
    mean_shift_scalar_kernel(const __grid_constant__ ShiftArguments<T> arguments) {
  using Engine = ScalarEngine<T>;
  EFFOPS_DYNAMIC_SHARED(ScalarShared<T>, shared);
  const PairWork work = arguments.tiling.work(blockIdx.x);
  if (arguments.stop.stops(work.image)) return;
  const Engine engine(threadIdx.x);
  const KernelWeight<T> kernel = arguments.kernel();
  const int64_t channels = arguments.rows.channels, first_row = work.row_tile * Engine::kRows;
  typename Engine::Sums sums = {};
  T totals[4] = {};
  for (int64_t tile = work.first_tile; tile < work.end_tile; ++tile) {
    const int64_t first_column = tile * Engine::kColumns;
    T similarity[4][4] = {};
    for (int64_t channel = 0; channel < channels; channel += Engine::kDepth) {
      __syncthreads();  // nobody reads the stage any more
      Engine::template stage<Engine::kRows>(arguments.rows, work.image, first_row, channel, shared->rows);
      Engine::template stage<Engine::kColumns>(arguments.columns, work.image, first_column, channel,
                                               shared->columns);
      __syncthreads();
      engine.add_products(shared->rows, shared->columns, similarity);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T column_weight = arguments.column_weights.at(work.image, first_column + engine.column(j));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T weight = kernel(similarity[i][j]) * column_weight;
        shared->weights[engine.row(i) * Engine::kWeightStride + engine.column(j)] = weight;
        totals[i] += weight;
      }
    }
#pragma unroll
    for (int s = 0; s < Engine::kStages; ++s) {
      const int64_t channel = int64_t{work.slice} * Engine::kSlice + s * Engine::kDepth;
      if (channel >= channels) break;
      __syncthreads();
      Engine::template stage<Engine::kColumns>(arguments.columns, work.image, first_column, channel,
                                               shared->columns);
      __syncthreads();
      engine.mix(shared->weights, shared->columns, sums[s]);
    }
  }
  engine.store(arguments, work, sums, false);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T total = add_row_threads(totals[i]);
    const int64_t index = arguments.row_index(work, first_row + engine.row(i));
    if (work.slice == 0 && engine.x == 0) arguments.totals[index] = total;
  }
}

// ------------------------------------------------------------------------------------------ backward

template <typename T>
struct ScalarGradShared {
  using Engine = ScalarEngine<T>;
  T rows[Engine::kRows * Engine::kStride], columns[Engine::kColumns * Engine::kStride];
  T row_h[Engine::kRows * Engine::kStride], column_h[Engine::kColumns * Engine::kStride];
  T of_x[Engine::kRows * Engine::kWeightStride], of_h[Engine::kRows * Engine::kWeightStride];
};

// Of a thread.
template <typename T>
struct ScalarProducts {
  T similarity[4][4], from_column[4][4], from_row[4][4];
};

// x_i . x_j, x_i . h_j and h_i . x_j.
template <typename T>
EFFOPS_DEVICE void add_products(const ShiftGradArguments<T>& arguments, const PairWork& work,
                                int64_t first_row, int64_t first_column, ScalarGradShared<T>& shared,
                                ScalarProducts<T>& products) {
  using Engine = ScalarEngine<T>;
  const Engine engine(threadIdx.x);
  const bool rows_moved = arguments.row_h.exists(), columns_moved = arguments.column_h.exists();
  for (int64_t channel = 0; channel < arguments.rows.channels; channel += Engine::kDepth) {
    __syncthreads();  // nobody reads the stage any more
    const auto stage_rows = [&](const PaddedPoints<T>& points, T* to) {
      Engine::template stage<Engine::kRows>(points, work.image, first_row, channel, to);
    };
    const auto stage_columns = [&](const PaddedPoints<T>& points, T* to) {
      Engine::template stage<Engine::kColumns>(points, work.image, first_column, channel, to);
    };
    stage_rows(arguments.rows, shared.rows);
    stage_columns(arguments.columns, shared.columns);
    if (rows_moved) stage_rows(arguments.row_h, shared.row_h);
    if (columns_moved) stage_columns(arguments.column_h, shared.column_h);
    __syncthreads();
    engine.add_products(shared.rows, shared.columns, products.similarity);
    if (columns_moved) engine.add_products(shared.rows, shared.column_h, products.from_column);
    if (rows_moved) engine.add_products(shared.row_h, shared.columns, products.from_row);
  }
}

// Weights of the pairs to shared memory. Adds to the gradients of the weights of the thread's rows, and
// returns the sum of those of kappa.
template <typename T>
EFFOPS_DEVICE T weigh_gradients(const ShiftGradArguments<T>& arguments, const PairWork& work,
                                int64_t first_row, int64_t first_column, const KernelWeight<T>& kernel,
                                const ScalarProducts<T>& products, ScalarGradShared<T>& shared,
                                T (&weight_sums)[4]) {
  using Engine = ScalarEngine<T>;
  const Engine engine(threadIdx.x);
  T kappa_sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t column = first_column + engine.column(j);
    const T column_weight = arguments.column_weights.at(work.image, column);
    const T column_tau = arguments.column_tau.at(work.image, column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first_row + engine.row(i);
      const PairGradient<T> pair(kernel, products.similarity[i][j], products.from_column[i][j] - column_tau,
                                 products.from_row[i][j] - arguments.row_tau.at(work.image, row),
                                 arguments.row_weights.at(work.image, row), column_weight);
      const int at = engine.row(i) * Engine::kWeightStride + engine.column(j);
      shared.of_x[at] = pair.of_x;
      shared.of_h[at] = pair.of_h;
      weight_sums[i] += pair.weight;
      kappa_sum += pair.kappa;
    }
  }
  return kappa_sum;
}

// Parallelism: see the top. Bound: multiply-adds, 5 N^2 D of them in up to 128 channels (64 of double).
template <typename T>
__global__ void __launch_bounds__(ScalarEngine<T>::kThreads, 2)
    mean_shift_scalar_grad_kernel(const __grid_constant__ ShiftGradArguments<T> arguments) {
  using Engine = ScalarEngine<T>;
  EFFOPS_DYNAMIC_SHARED(ScalarGradShared<T>, shared);
  const PairWork work = arguments.tiling.work(blockIdx.x);
  if (arguments.skips(work.image)) return;
  const Engine engine(threadIdx.x);
  const KernelWeight<T> kernel = arguments.kernel();
  const int64_t first_row = work.row_tile * Engine::kRows;
  const bool columns_moved = arguments.column_h.exists();
  typename Engine::Sums sums = {};
  T weight_sums[4] = {};
  double kappa_sum = 0;
  for (int64_t tile = work.first_tile; tile < work.end_tile; ++tile) {
    const int64_t first_column = tile * Engine::kColumns;
    ScalarProducts<T> products = {};
    add_products(arguments, work, first_row, first_column, *shared, products);
    kappa_sum +=
        weigh_gradients(arguments, work, first_row, first_column, kernel, products, *shared, weight_sums);
#pragma unroll
    for (int s = 0; s < Engine::kStages; ++s) {
      const int64_t channel = int64_t{work.slice} * Engine::kSlice + s * Engine::kDepth;
      if (channel >= arguments.rows.channels) break;
      __syncthreads();
      Engine::template stage<Engine::kColumns>(arguments.columns, work.image, first_column, channel,
                                               shared->columns);
      if (columns_moved) {
        Engine::template stage<Engine::kColumns>(arguments.column_h, work.image, first_column, channel,
                                                 shared->column_h);
      }
      __syncthreads();
      engine.mix(shared->of_x, shared->columns, sums[s]);
      if (columns_moved) engine.mix(shared->of_h, shared->column_h, sums[s]);
    }
  }
  engine.store(arguments, work, sums, arguments.adds);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T sum = add_row_threads(weight_sums[i]);
    const int64_t index = arguments.row_index(work, first_row + engine.row(i));
    if (arguments.weight_sums != nullptr && work.slice == 0 && engine.x == 0)
      arguments.weight_sums[index] += sum;
  }
  if (arguments.kappa_sums != nullptr) {
    add_block<Engine::kThreads>(work.slice == 0 ? kappa_sum : 0, arguments.kappa_sums + blockIdx.x);
  }
}

}  // namespace effops::pairwise
