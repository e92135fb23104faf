// CUDA kernels of pairwise_embedding_loss. No torch, no launches. The gradients are in
// pairwise_embedding_loss_backward_kernels.cuh.
//
// With the points in tiles (loss_points_kernels.cuh), four launches: points, costs of the pairs, costs of the
// points, loss. Positive pairs in a tile pair of one segment go by the closed form, all others pair by pair.
// Sums are made in an order that depends on the shape alone; nothing is added atomically.
#pragma once

#include "loss_pairs.cuh"

namespace effops::pairwise {

// What the pairs cost that are not closed:
//   costs[slot][row] = sum over the columns of w_j (same segment ? 1 - s : max(s - alpha, 0))
// with s = (1 + dot) / 2. NaN stays.
//
// Parallelism: a block per 64 rows and a part of the columns, of which it takes 64 at a time; 256 blocks or
// more from 2048 points on.
// Bytes: N D e per 64 rows from the second-level cache, copied one tile ahead on tensor cores; O(N) out.
// Bound: tensor cores (3 products of bf16 per product) and the instructions per pair, in equal parts at about
// 64 channels; else the plain multiplications. Limits: kSplitMaxChannels on tensor cores.
template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    pair_costs_kernel(const __grid_constant__ LossPoints<typename Engine::A> points, LossTiling tiling,
                      typename Engine::A alpha, typename Engine::A* costs) {
  if constexpr (Engine::kNative) {
    using A = typename Engine::A;
    EFFOPS_DYNAMIC_SHARED(unsigned char, shared);
    Engine engine(points, shared);
    for (int64_t index = blockIdx.x; index < tiling.works(); index += gridDim.x) {
      const LossWork work = tiling.work(index);
      const ColumnTiles columns(points.info, work);
      if (!columns.has_rows()) continue;
      A sums[Engine::kM];
      int32_t segments[Engine::kM];
#pragma unroll
      for (int i = 0; i < Engine::kM; ++i) {
        sums[i] = A(0);
        segments[i] = points.tags[work.row_tile].segment[engine.row(i)];
      }
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
            const A half = A(0.5) * dots[i][j], excess = half + (A(0.5) - alpha);
            const A hinge = excess <= A(0) ? A(0) : excess;
            sums[i] += weight * (segment == segments[i] ? A(0.5) - half : hinge);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < Engine::kM; ++i) {
#pragma unroll
        for (int offset = Engine::kRowLanes / 2; offset > 0; offset /= 2) {
          sums[i] += __shfl_xor_sync(kFullWarp, sums[i], offset);
        }
        if (threadIdx.x % Engine::kRowLanes == 0) costs[work.slot * kTilePoints + engine.row(i)] = sums[i];
      }
    }
  }
}

// What the columns that are closed with a tile add up to: their weight is returned; sum[channels], in shared
// memory, becomes that of w x. By all threads of a block, who may read the sum after a barrier.
template <typename A>
EFFOPS_DEVICE double add_closed_columns(const LossPoints<A>& points, int64_t tile, A* sum) {
  const TileInfo own = points.info[tile];
  const int64_t first = tile / points.tiles * points.tiles;
  const TileInfo* columns = points.info + first;
  for (int32_t d = static_cast<int32_t>(threadIdx.x); d < points.channels; d += kPointThreads) {
    A total = A(0);
#pragma unroll 4
    for (int32_t column = 0; column < points.tiles; ++column) {
      if (own.is_closed_with(columns[column])) total += points.sums[(first + column) * points.channels + d];
    }
    sum[d] = total;
  }
  double weight = 0;
#pragma unroll 4
  for (int32_t column = 0; column < points.tiles; ++column) {
    if (own.is_closed_with(columns[column])) weight += columns[column].weight;
  }
  return weight;
}

// costs[b, place] = sum_j w_j cost_ij of all points; of the tiles, the sums of w c in points.info.
// A block per tile, a warp per point. Bytes: (splits + D) B N e in, B N e out.
template <typename A, bool kSplit>
__global__ void __launch_bounds__(kPointThreads, 4)
    point_costs_kernel(LossPoints<A> points, LossTiling tiling, const A* pair_costs, A* costs) {
  EFFOPS_SHARED(A, sum, kMaxChannels);
  EFFOPS_SHARED(double, weighted, kTilePoints);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int64_t tiles = points.batch * points.tiles;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    __syncthreads();  // the tile before is done
    const A closed = static_cast<A>(add_closed_columns(points, tile, sum));
    const bool has_closed = points.info[tile].has_one_segment();
    __syncthreads();
    for (int row = thread / kWarpSize; row < kTilePoints; row += kPointWarps) {
      const int32_t place = points.places[tile * kTilePoints + row];
      if (lane == 0) weighted[row] = 0;
      if (place < 0) continue;
      A dot = A(0);
      if (has_closed) {
        for (int32_t d = lane; d < points.channels; d += kWarpSize) {
          dot += points.template value<kSplit>(tile, row, d) * sum[d];
        }
        dot = add_lanes(dot);
      }
      A cost = A(0.5) * (closed - dot);
      for (int32_t split = 0; split < tiling.splits; ++split) {
        cost += pair_costs[(split * tiles + tile) * kTilePoints + row];
      }
      if (lane > 0) continue;
      costs[tile / points.tiles * points.points + place] = cost;
      weighted[row] = double{points.tags[tile].weight[row]} * cost;
    }
    __syncthreads();
    if (thread >= kWarpSize) continue;
    const double total = add_lanes(weighted[lane] + weighted[lane + kWarpSize]);
    if (lane == 0) points.info[tile].cost = total;
  }
}

// Of an image.
struct ImageTotals {
  double points, weight, cost;

  // What its loss is divided by. 0: it has none. NaN where the weights do not sum up to a number of A.
  template <typename A>
  EFFOPS_DEVICE double divisor(int64_t normalize) const {
    if (!is_finite(static_cast<A>(weight))) return not_a_number<double>();
    return normalize == kSumWeights ? weight * weight : normalize == kThesis ? points : points > 0 ? 1 : 0;
  }
};

// By one warp.
EFFOPS_DEVICE ImageTotals add_tiles(const TileInfo* info, int32_t tiles, int lane) {
  ImageTotals totals{0, 0, 0};
  for (int32_t tile = lane; tile < tiles; tile += kWarpSize) {
    totals.points += info[tile].points;
    totals.weight += info[tile].weight;
    totals.cost += info[tile].cost;
  }
  return {add_lanes(totals.points), add_lanes(totals.weight), add_lanes(totals.cost)};
}

// The mean over the images. One block, which reads 40 bytes per tile.
template <typename A>
__global__ void __launch_bounds__(kPointThreads)
    embedding_loss_kernel(LossPoints<A> points, int64_t normalize, A* loss) {
  EFFOPS_SHARED(double, sums, kPointWarps);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  double sum = 0;
  for (int64_t image = warp; image < points.batch; image += kPointWarps) {
    const ImageTotals totals = add_tiles(points.info + image * points.tiles, points.tiles, lane);
    const double divisor = totals.divisor<A>(normalize);
    if (divisor != 0) sum += totals.cost / divisor;
  }
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double total = 0;
  for (int i = 0; i < kPointWarps; ++i) total += sums[i];
  *loss = static_cast<A>(total / static_cast<double>(points.batch));
}

}  // namespace effops::pairwise
