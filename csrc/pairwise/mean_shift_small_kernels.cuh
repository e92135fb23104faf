// Kernels on pairs of points of up to three channels: rows in registers. No torch, no launches.
//
// A padded point is (x, y, z, weight), and h is (x, y, z, tau): one 16-byte load of float, the same for all
// threads, which the first-level cache answers.
#pragma once

#include "mean_shift_pairs.cuh"

namespace effops::pairwise {

struct SmallEngine {
  static constexpr int kThreads = 64;
  static constexpr int kRows = 128, kColumns = 128;
  static constexpr int kThreadRows = kRows / kThreads;
  static constexpr int kBlocks = 16;  // of a multiprocessor
};

template <typename T>
struct SmallPoint {
  T x[4];

  EFFOPS_DEVICE explicit SmallPoint(const T* from) {
    constexpr int kPack = kPackSize<T>;
#pragma unroll
    for (int i = 0; i < 4; i += kPack) {
      const auto pack = load_pack<kPack>(from + i);
#pragma unroll
      for (int j = 0; j < kPack; ++j) x[i + j] = pack.data[j];
    }
  }

  EFFOPS_DEVICE T dot(const SmallPoint& other) const {
    return x[0] * other.x[0] + x[1] * other.x[1] + x[2] * other.x[2];
  }
};

// Parallelism: a thread per two rows. Bound: issue, 11 instructions and one special function per pair; N =
// 16384 takes 0.09 clocks per pair and multiprocessor, or 0.1 ms an iteration on an H100 (not measured).
template <typename T>
__global__ void __launch_bounds__(SmallEngine::kThreads)
    mean_shift_small_kernel(ShiftArguments<T> arguments) {
  const PairWork work = arguments.tiling.work(blockIdx.x);
  if (arguments.stop.stops(work.image)) return;
  const KernelWeight<T> kernel = arguments.kernel();
  const int64_t first_row = work.row_tile * SmallEngine::kRows + threadIdx.x;
  const T* row = arguments.rows.values + arguments.rows.offset(work.image, first_row);
  const SmallPoint<T> rows[2] = {SmallPoint<T>(row), SmallPoint<T>(row + 4 * SmallEngine::kThreads)};
  T sums[2][4] = {};
  const T* columns = arguments.columns.values + arguments.columns.offset(work.image, 0);
  const int64_t end = work.end_tile * SmallEngine::kColumns;
#pragma unroll 4
  for (int64_t j = work.first_tile * SmallEngine::kColumns; j < end; ++j) {
    const SmallPoint<T> column(columns + 4 * j);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const T weight = kernel(rows[r].dot(column)) * column.x[3];
#pragma unroll
      for (int c = 0; c < 3; ++c) sums[r][c] += weight * column.x[c];
      sums[r][3] += weight;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t index = arguments.row_index(work, first_row + r * SmallEngine::kThreads);
#pragma unroll
    for (int c = 0; c < 3; ++c) arguments.sums[4 * index + c] = sums[r][c];
    arguments.totals[index] = sums[r][3];
  }
}

// Parallelism, bound: the same, with about 24 instructions per pair.
template <typename T>
__global__ void __launch_bounds__(SmallEngine::kThreads)
    mean_shift_small_grad_kernel(ShiftGradArguments<T> arguments) {
  const PairWork work = arguments.tiling.work(blockIdx.x);
  if (arguments.skips(work.image)) return;
  const KernelWeight<T> kernel = arguments.kernel();
  const bool rows_moved = arguments.row_h.exists(), columns_moved = arguments.column_h.exists();
  const int64_t first_row = work.row_tile * SmallEngine::kRows + threadIdx.x;
  const int64_t begin = arguments.columns.offset(work.image, 0);
  double kappa_sum = 0;
#pragma unroll 1
  for (int r = 0; r < SmallEngine::kThreadRows; ++r) {
    const int64_t row = first_row + r * SmallEngine::kThreads, at = arguments.rows.offset(work.image, row);
    const SmallPoint<T> x(arguments.rows.values + at);
    const SmallPoint<T> h((rows_moved ? arguments.row_h : arguments.rows).values + at);
    T sums[3] = {}, weight_sum = 0;
    for (int64_t tile = work.first_tile; tile < work.end_tile; ++tile) {
      T kappa_part = 0;
#pragma unroll 2
      for (int64_t j = tile * SmallEngine::kColumns; j < (tile + 1) * SmallEngine::kColumns; ++j) {
        const SmallPoint<T> y(arguments.columns.values + begin + 4 * j);
        const SmallPoint<T> g((columns_moved ? arguments.column_h : arguments.columns).values + begin +
                              4 * j);
        const T from_column = columns_moved ? x.dot(g) - g.x[3] : T(0);
        const T from_row = rows_moved ? y.dot(h) - h.x[3] : T(0);
        const PairGradient<T> pair(kernel, x.dot(y), from_column, from_row, x.x[3], y.x[3]);
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          sums[c] += pair.of_x * y.x[c];
          if (columns_moved) sums[c] += pair.of_h * g.x[c];
        }
        weight_sum += pair.weight;
        kappa_part += pair.kappa;
      }
      kappa_sum += kappa_part;
    }
    const int64_t index = arguments.row_index(work, row);
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      T* to = arguments.sums + 4 * index + c;
      *to = arguments.adds ? *to + sums[c] : sums[c];
    }
    if (arguments.weight_sums != nullptr) arguments.weight_sums[index] += weight_sum;
  }
  if (arguments.kappa_sums != nullptr) {
    add_block<SmallEngine::kThreads>(kappa_sum, arguments.kappa_sums + blockIdx.x);
  }
}

}  // namespace effops::pairwise
