// CUDA kernels of the gradients of pairwise_embedding_loss. No torch, no launches.
//
// Three launches: points, sums over the pairs, gradients. With the divisor n of an image's loss, its cost C
// and weight W, and the gradient g of the loss over B:
//   grad x^_i = g w_i / n sum_j w_j c_ij x^_j     c_ij = same segment ? -1 : s > alpha ? 1 : 0
//   grad w_i  = g (2 cost_i / n - 2 C / W^3)      the last where n = W^2
// (half of 1/2 (c_ij + c_ji)), then back through the normalisation of x.
#pragma once

#include "pairwise_embedding_loss_kernels.cuh"

namespace effops::pairwise {

// sums[slot][row] = sum over the columns of w_j c_ij x^_j, of all pairs that are not closed. NaN stays.
//
// Parallelism, bytes, limits: as pair_costs_kernel, and N D e out per part of the columns. Bound: tensor
// cores (6 products of bf16); else the plain multiplications.
template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    pair_gradient_kernel(const __grid_constant__ LossPoints<typename Engine::A> points, LossTiling tiling,
                         typename Engine::A alpha, typename Engine::A* sums) {
  if constexpr (Engine::kNative) {
    using A = typename Engine::A;
    EFFOPS_DYNAMIC_SHARED(unsigned char, shared);
    Engine engine(points, shared);
    for (int64_t index = blockIdx.x; index < tiling.works(); index += gridDim.x) {
      const LossWork work = tiling.work(index);
      const ColumnTiles columns(points.info, work);
      if (!columns.has_rows()) continue;
      int32_t segments[Engine::kM];
#pragma unroll
      for (int i = 0; i < Engine::kM; ++i) {
        segments[i] = points.tags[work.row_tile].segment[engine.row(i)];
      }
      A* rows = sums + work.slot * kTilePoints * points.pitch;
      typename Engine::Sums own = engine.begin_sums(rows);
      int32_t tile = columns.from(work.begin);
      if (tile < columns.end()) engine.open(work, tile);
      while (tile < columns.end()) {
        tile = columns.from(tile + 1);
        A dots[Engine::kM][Engine::kN];
        engine.multiply(tile, dots);
        const TileTags<A>& tags = engine.tags();
#pragma unroll
        for (int j = 0; j < Engine::kN; ++j) {
          const int32_t segment = tags.segment[engine.column(j)];
          const A weight = tags.weight[engine.column(j)];
#pragma unroll
          for (int i = 0; i < Engine::kM; ++i) {
            const A excess = A(0.5) * dots[i][j] + (A(0.5) - alpha);
            const A pushes = excess <= A(0) ? A(0) : weight;
            dots[i][j] = segment == segments[i] ? -weight : pushes;
          }
        }
        engine.add(own, dots);
      }
      engine.store(own, rows);
    }
  }
}

template <typename A>
struct LossGradients {
  const A* grad_loss;  // one number
  const A* costs;      // [B, N]
  int64_t normalize;
  A* x;        // [B, N, D], zeros before; or null
  A* weights;  // [B, N], zeros before; or null
};

// A row of the gradient of x from that of its unit vector, by one warp.
template <typename A>
EFFOPS_DEVICE void write_row_gradient(const A* x, const A (&unit_gradient)[kLaneChannels], double factor,
                                      int32_t channels, int lane, A* gradient) {
  const double norm = row_norm(x, lane, channels), scale = 1 / divisor_of(norm);
  double dot = 0;
  for_lane_channels(lane, channels, [&](int i, int64_t d) { dot += x[d] * scale * unit_gradient[i]; });
  dot = norm < kSmallestNorm ? 0 : add_lanes(dot);  // there the row is divided by a constant
  for_lane_channels(lane, channels, [&](int i, int64_t d) {
    gradient[d] = static_cast<A>(factor * scale * (unit_gradient[i] - x[d] * scale * dot));
  });
}

// The gradients of the points of a tile, where they are in x. A block per tile, a warp per point.
// Bytes: (splits + 2) B N D e in, B N D e out.
template <typename A>
__global__ void __launch_bounds__(kPointThreads, 2)
    loss_gradient_kernel(LossPoints<A> points, LossTiling tiling, const A* x, const A* pair_sums,
                         LossGradients<A> gradients) {
  EFFOPS_SHARED(A, closed, kMaxChannels);
  EFFOPS_SHARED(ImageTotals, totals, 1);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int64_t tiles = points.batch * points.tiles;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t image = tile / points.tiles;
    if (points.info[tile].is_empty()) continue;
    __syncthreads();  // the tile before is done
    if (gradients.x != nullptr) add_closed_columns(points, tile, closed);
    if (thread < kWarpSize) {
      const ImageTotals own = add_tiles(points.info + image * points.tiles, points.tiles, lane);
      if (lane == 0) totals[0] = own;
    }
    __syncthreads();
    const double divisor = totals[0].template divisor<A>(gradients.normalize);
    if (divisor == 0) continue;
    const double factor = double{*gradients.grad_loss} / (divisor * static_cast<double>(points.batch));
    for (int row = thread / kWarpSize; row < kTilePoints; row += kPointWarps) {
      const int32_t place = points.places[tile * kTilePoints + row];
      if (place < 0) continue;
      const int64_t at = image * points.points + place;
      if (gradients.weights != nullptr && lane == 0) {
        const double shrink = gradients.normalize == kSumWeights ? totals[0].cost / totals[0].weight : 0;
        gradients.weights[at] = static_cast<A>(2 * factor * (double{gradients.costs[at]} - shrink));
      }
      if (gradients.x == nullptr) continue;
      A sum[kLaneChannels];
      for_lane_channels(lane, points.channels, [&](int i, int64_t d) {
        sum[i] = -closed[d];
        for (int32_t split = 0; split < tiling.splits; ++split) {
          sum[i] += pair_sums[((split * tiles + tile) * kTilePoints + row) * points.pitch + d];
        }
      });
      write_row_gradient(x + at * points.channels, sum, factor * points.tags[tile].weight[row],
                         points.channels, lane, gradients.x + at * points.channels);
    }
  }
}

}  // namespace effops::pairwise
