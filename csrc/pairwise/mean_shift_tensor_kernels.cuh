// Kernels on pairs by tensor cores: float32, up to 128 channels. No torch, no launches.
#pragma once

#include "mean_shift_tensor.cuh"

namespace effops::pairwise {

// ------------------------------------------------------------------------------------------ forward

// Similarities of the rows and kN * 8 columns.
template <typename Engine>
EFFOPS_DEVICE void multiply_columns(const TensorRows<Engine>& rows, const bf16* points,
                                    typename Engine::Sums& sums) {
  const ColumnReader<Engine> reader;
#pragma unroll
  for (int k = 0; k < Engine::kDepthSteps; ++k) {
    uint32_t fragments[Engine::kM][Engine::kParts][4];
#pragma unroll
    for (int m = 0; m < Engine::kM; ++m) rows.get(m, k, fragments[m]);
#pragma unroll
    for (int part = 0; part < Engine::kParts; ++part) {
#pragma unroll
      for (int n = 0; n < Engine::kN / 2; ++n) {
        uint32_t columns[4];
        reader.read(points, n, k, part, columns);
#pragma unroll
        for (int m = 0; m < Engine::kM; ++m) {
          add_part(fragments[m], columns, part, sums[m][2 * n], sums[m][2 * n + 1]);
        }
      }
    }
  }
}

// Similarities become weights w_j K; their sums over the columns of this lane are added to totals.
template <typename Engine>
EFFOPS_DEVICE void weigh_pairs(const KernelWeight<float>& kernel, const float* column_weights,
                               typename Engine::Sums& sums, float (&totals)[Engine::kM][2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int n = 0; n < Engine::kN; ++n) {
    const auto weights = *reinterpret_cast<const Pack<float, 2>*>(column_weights + 8 * n + 2 * (lane % 4));
#pragma unroll
    for (int m = 0; m < Engine::kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[m][n][i] = kernel(sums[m][n][i]) * weights.data[i % 2];
        totals[m][i / 2] += sums[m][n][i];
      }
    }
  }
}

// Parallelism: a block per 128 rows and part of the columns, 32 rows (16 of 128 channels) per warp; columns
// in tiles of 64, the next of which is copied meanwhile. Bytes: 2 D (high: 4 D) per column and block, from
// the second-level cache. Bound: N = 16384, D = 64 are 69 GFLOP an iteration, at the 60 % of 989 TFLOP/s that
// mma.sync reaches on an H100 0.12 ms (high: 0.35 ms), beside 2.7e8 exponentials, 0.07 ms, and 0.13 GB (0.27)
// from the cache, 0.05 ms: predicted 1.3 to 2 ms for ten iterations (high: 4 to 5 ms), not measured.
template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    mean_shift_tensor_kernel(const __grid_constant__ ShiftArguments<float> arguments) {
  if constexpr (kHasHalfMma) {
    EFFOPS_DYNAMIC_SHARED(typename Engine::Stage, stages);
    const PairWork work = arguments.tiling.work(blockIdx.x);
    if (arguments.stop.stops(work.image)) return;
    const KernelWeight<float> kernel = arguments.kernel();
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int64_t first_row = work.row_tile * Engine::kRows + warp * 16 * Engine::kM;
    const TensorRows<Engine> rows(arguments.rows, work.image, first_row);
    typename Engine::ChannelSums channel_sums = {};
    float totals[Engine::kM][2] = {};
    for_column_tiles<Engine>(arguments, work, stages, [&](const typename Engine::Stage& stage) {
#pragma unroll 1
      for (int first = 0; first < Engine::kColumns; first += 8 * Engine::kN) {
        const bf16* points = stage.points[0][0] + first * Engine::kChannels;
        typename Engine::Sums sums = {};
        multiply_columns<Engine>(rows, points, sums);
        weigh_pairs<Engine>(kernel, stage.weights + first, sums, totals);
        mix_columns<Engine>(sums, points, channel_sums);
      }
    });
    store_sums<Engine>(arguments, work, first_row, channel_sums, false);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int i = 0; i < 2 * Engine::kM; ++i) {
      const float total = add_quad(totals[i / 2][i % 2]);
      if (lane % 4 == 0) arguments.totals[arguments.row_index(work, first_row + 8 * i) + lane / 4] = total;
    }
  }
}

// ------------------------------------------------------------------------------------------ backward

// Of 16 rows and kN * 8 columns.
template <typename Engine>
struct TensorProducts {
  typename Engine::Sums similarity, from_column, from_row;
};

// x_i . x_j, x_i . h_j and h_i . x_j.
template <typename Engine>
EFFOPS_DEVICE void multiply_columns(const TensorRows<Engine>& x, const TensorRows<Engine>& h, bool rows_moved,
                                    bool columns_moved, const typename Engine::Stage& stage,
                                    TensorProducts<Engine>& products) {
  const ColumnReader<Engine> reader;
#pragma unroll
  for (int k = 0; k < Engine::kDepthSteps; ++k) {
    uint32_t x_rows[Engine::kParts][4], h_rows[Engine::kParts][4];
    x.get(0, k, x_rows);
    if (rows_moved) h.get(0, k, h_rows);
#pragma unroll
    for (int part = 0; part < Engine::kParts; ++part) {
#pragma unroll
      for (int n = 0; n < Engine::kN / 2; ++n) {
        const auto add = [&](const uint32_t (&rows)[Engine::kParts][4], const uint32_t (&columns)[4],
                             typename Engine::Sums& sums) {
          add_part(rows, columns, part, sums[0][2 * n], sums[0][2 * n + 1]);
        };
        uint32_t columns[4];
        reader.read(stage.points[0][0], n, k, part, columns);
        add(x_rows, columns, products.similarity);
        if (rows_moved) add(h_rows, columns, products.from_row);
        if (!columns_moved) continue;
        reader.read(stage.points[1][0], n, k, part, columns);
        add(x_rows, columns, products.from_column);
      }
    }
  }
}

// What a lane knows of its two rows, and sums of them.
struct GradRows {
  float weight[2], tau[2];
  float weight_sum[2] = {};

  EFFOPS_DEVICE GradRows(const ShiftGradArguments<float>& arguments, int64_t image, int64_t first_row) {
    const int64_t row = first_row + threadIdx.x % kWarpSize / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weight[i] = arguments.row_weights.at(image, row + 8 * i);
      tau[i] = arguments.row_tau.at(image, row + 8 * i);
    }
  }
};

// similarity becomes C, from_column w_i K. Returns the sum of the gradients of kappa.
template <typename Engine>
EFFOPS_DEVICE float weigh_gradients(const KernelWeight<float>& kernel, const typename Engine::Stage& stage,
                                    GradRows& rows, TensorProducts<Engine>& products) {
  float kappa_sum = 0;
#pragma unroll
  for (int n = 0; n < Engine::kN; ++n) {
    const int column = 8 * n + 2 * (static_cast<int>(threadIdx.x) % 4);
    const auto weights = *reinterpret_cast<const Pack<float, 2>*>(stage.weights + column);
    const auto tau = *reinterpret_cast<const Pack<float, 2>*>(stage.tau + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& similarity = products.similarity[0][n][i];
      float& from_column = products.from_column[0][n][i];
      const PairGradient<float> pair(kernel, similarity, from_column - tau.data[i % 2],
                                     products.from_row[0][n][i] - rows.tau[i / 2], rows.weight[i / 2],
                                     weights.data[i % 2]);
      similarity = pair.of_x;
      from_column = pair.of_h;
      rows.weight_sum[i / 2] += pair.weight;
      kappa_sum += pair.kappa;
    }
  }
  return kappa_sum;
}

// Parallelism: as forward, with 16 rows per warp and tiles of 32 columns. Five products of the size of the
// two of the forward kernel: N = 16384, D = 64 are 172 GFLOP an iteration, 0.29 ms at the same rate (high:
// 0.87 ms); predicted 2.5 to 3 times the forward's time, not measured. With 128 channels and precision high
// the rows do not stay in registers but are read from the first-level cache for each tile.
template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    mean_shift_tensor_grad_kernel(const __grid_constant__ ShiftGradArguments<float> arguments) {
  if constexpr (kHasHalfMma) {
    EFFOPS_DYNAMIC_SHARED(typename Engine::Stage, stages);
    const PairWork work = arguments.tiling.work(blockIdx.x);
    if (arguments.skips(work.image)) return;
    const KernelWeight<float> kernel = arguments.kernel();
    const bool rows_moved = arguments.row_h.exists(), columns_moved = arguments.column_h.exists();
    const int64_t first_row = work.row_tile * Engine::kRows + threadIdx.x / kWarpSize * 16;
    TensorRows<Engine> x(arguments.rows, work.image, first_row);
    TensorRows<Engine> h(rows_moved ? arguments.row_h : arguments.rows, work.image, first_row);
    GradRows rows(arguments, work.image, first_row);
    typename Engine::ChannelSums channel_sums = {};
    double kappa_sum = 0;
    for_column_tiles<Engine>(arguments, work, stages, [&](const typename Engine::Stage& stage) {
      TensorProducts<Engine> products = {};
      x.refresh();
      h.refresh();
      multiply_columns<Engine>(x, h, rows_moved, columns_moved, stage, products);
      kappa_sum += weigh_gradients<Engine>(kernel, stage, rows, products);
      mix_columns<Engine>(products.similarity, stage.points[0][0], channel_sums);
      if (columns_moved) mix_columns<Engine>(products.from_column, stage.points[1][0], channel_sums);
    });
    store_sums<Engine>(arguments, work, first_row, channel_sums, arguments.adds);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = add_quad(rows.weight_sum[i]);
      if (arguments.weight_sums != nullptr && threadIdx.x % 4 == 0) {
        arguments.weight_sums[arguments.row_index(work, first_row + 8 * i) + threadIdx.x % kWarpSize / 4] +=
            sum;
      }
    }
    if (arguments.kappa_sums != nullptr) {
      add_block<Engine::kThreads>(kappa_sum, arguments.kappa_sums + blockIdx.x);
    }
  }
}

}  // namespace effops::pairwise
