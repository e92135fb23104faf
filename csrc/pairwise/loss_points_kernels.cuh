// The points of pairwise_embedding_loss in tiles of 64, as its kernels read them. No torch, no launches.
//
// Points are in the order of their segments (instances), the ignored ones first, and normalised; the last
// tile of an image is filled up with ignored points. What a tile pair costs is known without its pairs where
// both tiles lie in one and the same segment ("closed" pairs):
//   sum_j w_j (1 - s_ij) = (W - x_i . sum_j w_j x_j) / 2
// Nothing is assumed of `order` and `segments`: a point whose place or segment is out of range is ignored,
// and points that are not sorted make fewer closed pairs.
#pragma once

#include "points_kernels.cuh"
#include "scalar_tile.cuh"
#include "split_tile.cuh"

namespace effops::pairwise {

// What the kernels of pairs need of the points of a tile. It is copied by 16 bytes.
template <typename A>
struct alignas(16) TileTags {
  int32_t segment[kTilePoints];  // -1: ignored
  A weight[kTilePoints];         // 0 at ignored points
};

struct TileInfo {
  int32_t first, last;          // segments of its points; first > last: all are ignored
  double points, weight, cost;  // how many are not ignored, sum of w, sum of w c (of the backward pass)

  EFFOPS_HD bool is_empty() const { return first > last; }
  EFFOPS_HD bool has_one_segment() const { return first == last; }
  EFFOPS_HD bool is_closed_with(const TileInfo& other) const {
    return has_one_segment() && other.first == first && other.last == first;
  }
};

template <typename A>
struct LossInputs {
  const A* x;              // [B, N, D]
  const int64_t* order;    // [B, N]
  const int64_t* segments; // [B, N], in that order
  const A* weights;        // [B, N], in the order of x
  const A* costs;          // the same, or null
};

template <typename A>
struct LossPoints {
  int64_t batch, points;    // B, N
  int32_t channels, pitch;  // D, elements of a row
  int32_t tiles;            // of an image
  void* rows;               // [B, tiles, 64, pitch] of A, or as split_tile.cuh says
  TileTags<A>* tags;        // [B, tiles]
  TileInfo* info;           // [B, tiles]
  int32_t* places;          // [B, tiles, 64]: where in x a point is; -1: ignored
  A* sums;                  // [B, tiles, D]: sum of w x where all points are of one segment

  int64_t all_tiles() const { return batch * tiles; }
  int64_t row_bytes() const { return all_tiles() * kTilePoints * pitch * int64_t{sizeof(A)}; }

  // The rows of tile number `tile` of all images.
  EFFOPS_DEVICE A* plain_rows(int64_t tile) const {
    return static_cast<A*>(rows) + tile * kTilePoints * pitch;
  }
  EFFOPS_DEVICE bf16* split_rows(int64_t tile) const {
    return static_cast<bf16*>(rows) + tile * kTilePoints * split_elements(pitch);
  }

  template <bool kSplit>
  EFFOPS_DEVICE A value(int64_t tile, int row, int32_t d) const {
    if constexpr (kSplit) {
      const bf16* tile_rows = split_rows(tile);
      const int32_t at = split_at(row, d, pitch);
      return widen(tile_rows[at]) + widen(tile_rows[split_low(at)]);
    } else {
      return plain_rows(tile)[int64_t{row} * pitch + d];
    }
  }
};

// A row of a tile, by one warp; zeros where there is no point.
template <typename A, bool kSplit>
EFFOPS_DEVICE void write_row(const LossPoints<A>& points, const A* x, int64_t tile, int row, int lane) {
  const double scale = x != nullptr ? 1 / divisor_of(row_norm(x, lane, points.channels)) : 0;
  for_lane_channels(lane, points.pitch, [&](int, int64_t channel) {
    const auto d = static_cast<int32_t>(channel);
    const A value = x != nullptr && d < points.channels ? static_cast<A>(x[d] * scale) : A(0);
    if constexpr (kSplit) {
      bf16* rows = points.split_rows(tile);
      const int32_t at = split_at(row, d, points.pitch);
      const bf16 high = narrow<bf16>(value);
      rows[at] = high;
      rows[split_low(at)] = narrow<bf16>(value - widen(high));
    } else {
      points.plain_rows(tile)[int64_t{row} * points.pitch + d] = value;
    }
  });
}

// By one warp, of 64 points.
template <typename A>
EFFOPS_DEVICE TileInfo make_tile_info(const TileTags<A>& tags, const double* costs, int lane) {
  TileInfo info{INT32_MAX, -1, 0, 0, 0};
  for (int i = lane; i < kTilePoints; i += kWarpSize) {
    if (tags.segment[i] < 0) continue;
    info.first = min(info.first, tags.segment[i]);
    info.last = max(info.last, tags.segment[i]);
    info.points += 1;
    info.weight += tags.weight[i];
    info.cost += costs[i];
  }
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    info.first = min(info.first, __shfl_xor_sync(kFullWarp, info.first, offset));
    info.last = max(info.last, __shfl_xor_sync(kFullWarp, info.last, offset));
  }
  info.points = add_lanes(info.points);
  info.weight = add_lanes(info.weight);
  info.cost = add_lanes(info.cost);
  return info;
}

// Sorts, normalises and sums up the points. A block per tile, a warp per point.
// Bytes: B N D e in, as much out, as much again from the caches for the sums; they bound it.
template <typename A, bool kSplit>
__global__ void __launch_bounds__(kPointThreads, 4)
    loss_points_kernel(LossInputs<A> inputs, LossPoints<A> points) {
  EFFOPS_SHARED(TileTags<A>, tags, 1);
  EFFOPS_SHARED(int32_t, places, kTilePoints);
  EFFOPS_SHARED(double, costs, kTilePoints);
  EFFOPS_SHARED(TileInfo, info, 1);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  for (int64_t tile = blockIdx.x; tile < points.batch * points.tiles; tile += gridDim.x) {
    const int64_t first = tile / points.tiles * points.points;  // of the image
    __syncthreads();  // the tile before is done
    if (thread < kTilePoints) {
      const int64_t p = tile % points.tiles * kTilePoints + thread;
      const int64_t place = p < points.points ? inputs.order[first + p] : -1;
      const int64_t segment = p < points.points ? inputs.segments[first + p] : -1;
      const bool counts = place >= 0 && place < points.points && segment >= 0 && segment < points.points;
      const A weight = counts ? inputs.weights[first + place] : A(0);
      places[thread] = counts ? static_cast<int32_t>(place) : -1;
      tags[0].segment[thread] = counts ? static_cast<int32_t>(segment) : -1;
      tags[0].weight[thread] = weight;
      costs[thread] = counts && inputs.costs != nullptr ? double{weight} * inputs.costs[first + place] : 0;
      points.places[tile * kTilePoints + thread] = places[thread];
      points.tags[tile].segment[thread] = tags[0].segment[thread];
      points.tags[tile].weight[thread] = weight;
    }
    __syncthreads();
    for (int row = thread / kWarpSize; row < kTilePoints; row += kPointWarps) {
      const A* x = places[row] < 0 ? nullptr : inputs.x + (first + places[row]) * points.channels;
      write_row<A, kSplit>(points, x, tile, row, lane);
    }
    if (thread < kWarpSize) {
      const TileInfo own = make_tile_info(tags[0], costs, lane);
      if (lane == 0) info[0] = points.info[tile] = own;
    }
    __syncthreads();
    if (!info[0].has_one_segment()) continue;
    for (int32_t d = thread; d < points.channels; d += kPointThreads) {
      A sum = A(0);
      for (int row = 0; row < kTilePoints; ++row) {
        if (places[row] >= 0) sum += tags[0].weight[row] * points.template value<kSplit>(tile, row, d);
      }
      points.sums[tile * points.channels + d] = sum;
    }
  }
}

}  // namespace effops::pairwise
