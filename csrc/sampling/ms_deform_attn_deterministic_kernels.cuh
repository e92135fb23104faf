// Deterministic gradient of ms_deform_attn's value. No torch, no launches.
#pragma once

#include "ms_deform_attn_kernels.cuh"

namespace effops::sampling {

constexpr int kOwnerWarps = 4;
constexpr int kOwnerThreads = kOwnerWarps * kWarpSize;
constexpr int kTileBytes = 40 * 1024;  // of all warps; with the level table below 48 KB
constexpr int kOwnerBlocks = 5;        // per multiprocessor: shared memory of sm_90 has no room for more

// Rows of value that a block owns: every warp has a tile of kOwnedRows x 32 channels.
template <typename T>
constexpr int kOwnedRows = kTileBytes / (kOwnerThreads * static_cast<int>(sizeof(accumulator_t<T>)));

template <typename T>
struct OwnerArguments {
  PointArguments<T> points;
  const T* grad_output;  // [B, Q, M * D]
  T* grad_value;         // [B, S, M, D]
  int64_t heads, queries, channels;
  int64_t row_tiles;       // per head: ceil(S / kOwnedRows)
  int64_t channel_chunks;  // ceil(D / 32)
  int64_t works;           // images * heads * row_tiles * channel_chunks
};

// What a block owns, and where its lanes read and write.
template <typename T>
struct Owned {
  uint32_t first_row, num_rows;
  int64_t query_stride;       // elements of grad_output between queries
  const T* grad_output;       // query 0 of the image and head, channel of the lane
  int64_t first_point;        // index of the image's and head's first point in [B, Q, M, L, P]
  int64_t point_stride;       // points between queries
  bool has_channel;
  accumulator_t<T>* column;   // the lane's channel in row 0 of the warp's tile
};

constexpr uint32_t kNoRows = 0xffffffffu;

// A point with corners in the owned rows, held by the lane that found it.
template <typename A>
struct FoundPoint {
  uint32_t rows;  // one byte per corner: owned row, or 0xff
  A weight[4];    // corner weight times attention
  int64_t query;
};

// Looks at one point. Most are elsewhere, so that attention is read only for those found.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE FoundPoint<A> find_point(const PointArguments<T>& arguments, const Level& level,
                                       const Owned<T>& owned, A x, A y, bool exists, int64_t query,
                                       int64_t point_index) {
  FoundPoint<A> found{kNoRows, {}, query};
  CornerRows rows{};
  PointDetails<A> details{};
  if (exists) locate_corners(x, y, level, rows, found.weight, details);
  bool valid[4];
  rows.valid_corners(valid);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t row = rows.row(k) - owned.first_row;  // wraps to a large number for rows before
    if (valid[k] && row < owned.num_rows) found.rows ^= (row ^ 0xffu) << (8 * k);
  }
  if (found.rows != kNoRows) {
    scale_weights(found.weight, load_scalar<T>(arguments.weights, arguments.weights_as_value, point_index));
  }
  return found;
}

// The warp adds one found point to its tile, a channel per lane. The corners' rows differ, so all can be
// read before the first is written.
template <typename A>
EFFOPS_DEVICE void add_found_point(const FoundPoint<A>& own, int source, A gradient, A* column) {
  const uint32_t rows = __shfl_sync(kFullWarp, own.rows, source);
  A sums[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const A weight = __shfl_sync(kFullWarp, own.weight[k], source);
    const uint32_t row = rows >> (8 * k) & 0xff;
    if (row != 0xff) sums[k] = column[row * kWarpSize] + weight * gradient;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t row = rows >> (8 * k) & 0xff;
    if (row != 0xff) column[row * kWarpSize] = sums[k];
  }
}

// Adds the points of the lanes in `found_lanes`, lowest lane first. The gradients of four points are
// loaded together, which hides their latency.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE void add_found_points(const Owned<T>& owned, const FoundPoint<A>& own, uint32_t found_lanes) {
  constexpr int kTogether = 4;
  while (found_lanes != 0) {
    int source[kTogether];
    A gradient[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      source[u] = found_lanes ? lowest_bit(found_lanes) : -1;
      found_lanes &= found_lanes - 1;
      gradient[u] = A(0);
      if (source[u] < 0) continue;
      const int64_t query = __shfl_sync(kFullWarp, own.query, source[u]);
      if (owned.has_channel) {
        gradient[u] = widen(load_pack<1>(owned.grad_output + query * owned.query_stride).data[0]);
      }
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (source[u] >= 0) add_found_point(own, source[u], gradient[u], owned.column);
    }
  }
}

// Adds all points of one level. A warp takes every kOwnerWarps-th group of 32 points, one per lane.
template <typename T>
EFFOPS_DEVICE void add_level(const OwnerArguments<T>& arguments, const Owned<T>& owned, int64_t level_index,
                             const Level& level) {
  using A = accumulator_t<T>;
  const PointArguments<T>& points = arguments.points;
  const int64_t level_point = owned.first_point + level_index * points.points;
  const int32_t query_step = kOwnerThreads / points.points, point_step = kOwnerThreads % points.points;
  int64_t query = static_cast<int64_t>(threadIdx.x) / points.points;
  int32_t point = static_cast<int32_t>(static_cast<int64_t>(threadIdx.x) % points.points);
  const auto index = [&] { return level_point + query * owned.point_stride + point; };
  const auto load = [&](A& x, A& y) {
    if (query < arguments.queries) load_pair<T>(points.locations, points.locations_as_value, index(), x, y);
  };
  A x = A(0), y = A(0), next_x = A(0), next_y = A(0);
  load(x, y);
  const int64_t total = arguments.queries * points.points;
  const int64_t warp_begin = static_cast<int64_t>(threadIdx.x) / kWarpSize * kWarpSize;
  for (int64_t begin = warp_begin; begin < total; begin += kOwnerThreads) {
    const int64_t this_query = query, this_index = index();
    query += query_step;
    point += point_step;
    if (point >= points.points) {
      point -= points.points;
      ++query;
    }
    load(next_x, next_y);  // of the next turn: in flight during this one
    const FoundPoint<A> found =
        find_point(points, level, owned, x, y, this_query < arguments.queries, this_query, this_index);
    add_found_points(owned, found, __ballot_sync(kFullWarp, found.rows != kNoRows));
    x = next_x;
    y = next_y;
  }
}

// Sums the warps' tiles in a fixed order and stores the owned rows.
template <typename T>
EFFOPS_DEVICE void store_owned_rows(const Owned<T>& owned, const accumulator_t<T>* tiles, T* grad_value,
                                    int64_t row_stride) {
  using A = accumulator_t<T>;
  const uint32_t lane = threadIdx.x % kWarpSize;
  for (uint32_t row = threadIdx.x / kWarpSize; row < owned.num_rows; row += kOwnerWarps) {
    A sum = tiles[row * kWarpSize + lane];
#pragma unroll
    for (int warp = 1; warp < kOwnerWarps; ++warp) {
      sum += tiles[(warp * kOwnedRows<T> + row) * kWarpSize + lane];
    }
    if (owned.has_channel) grad_value[row * row_stride] = narrow<T>(sum);
  }
}

// grad_value[b, r, m, :] = sum over the points of (b, m) with a corner in row r, in their order, of
// attention * w_k * grad_output[b, q, m, :]. Bit-reproducible: no atomics, every element written once.
//
// Parallelism: a block owns kOwnedRows consecutive rows of one (image, head) and 32 channels. It looks at
// all Q * P points of every level that has some of these rows. Its warps share the points and have a tile
// each (a coarse level has many points per row: one warp would take too long), summed at the end.
// Bytes: S / kOwnedRows * Q * P locations per head and level from the second-level cache, grad_output once
// per found corner tile, grad_value written once. Example (see forward): 278 tiles of 16 heads x 88,892
// points x 8 bytes = 3.2 GB and 5.7 M points found 1.3 times: about 1.5 ms estimated, bound by the
// instructions of the search. Not measured.
// Limits: fits_kernels. If all points fall into a few rows, few blocks do all the work.
template <typename T>
__global__ void __launch_bounds__(kOwnerThreads, kOwnerBlocks)
    ms_deform_attn_value_gradient_kernel(OwnerArguments<T> arguments) {
  using A = accumulator_t<T>;
  EFFOPS_DYNAMIC_SHARED(unsigned char, shared);
  A* tiles = reinterpret_cast<A*>(shared);
  Level* levels = reinterpret_cast<Level*>(shared + kTileBytes);
  const Pyramid& pyramid = arguments.points.pyramid;
  fill_levels(pyramid, levels);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t row_stride = arguments.heads * arguments.channels;
  for (int64_t work = blockIdx.x; work < arguments.works; work += gridDim.x) {
    const int64_t chunk = work % arguments.channel_chunks, rest = work / arguments.channel_chunks;
    const int64_t first_row = rest % arguments.row_tiles * kOwnedRows<T>;
    const int64_t head_index = rest / arguments.row_tiles;
    const int64_t image = head_index / arguments.heads, head = head_index % arguments.heads;
    const int64_t num_rows = pyramid.rows - first_row < kOwnedRows<T> ? pyramid.rows - first_row
                                                                      : kOwnedRows<T>;
    const int64_t channel = chunk * kWarpSize + lane, element = head * arguments.channels + channel;
    const int64_t total_points = arguments.points.total_points;
    const Owned<T> owned{static_cast<uint32_t>(first_row),
                         static_cast<uint32_t>(num_rows),
                         row_stride,
                         arguments.grad_output + image * arguments.queries * row_stride + element,
                         (image * arguments.queries * arguments.heads + head) * total_points,
                         arguments.heads * total_points,
                         channel < arguments.channels,
                         tiles + warp * kOwnedRows<T> * kWarpSize + lane};
    for (int row = 0; row < kOwnedRows<T>; ++row) owned.column[row * kWarpSize] = A(0);
    for (int64_t level_index = 0; level_index < pyramid.levels; ++level_index) {
      const Level level = level_at(pyramid, levels, level_index);
      const int64_t end = level.start + static_cast<int64_t>(level.height) * level.width;
      const bool overlaps = level.width > 0 && level.start < first_row + num_rows && end > first_row;
      if (overlaps) add_level(arguments, owned, level_index, level);
    }
    __syncthreads();
    store_owned_rows(owned, tiles,
                     arguments.grad_value + (image * pyramid.rows + first_row) * row_stride + element,
                     row_stride);
    __syncthreads();  // the next work clears the tiles
  }
}

template <typename T>
OwnerArguments<T> make_owner_arguments(const MsDeformAttnShape& shape, const PointArguments<T>& points,
                                       const T* grad_output, T* grad_value) {
  const int64_t row_tiles = (shape.rows + kOwnedRows<T> - 1) / kOwnedRows<T>;
  const int64_t chunks = (shape.channels + kWarpSize - 1) / kWarpSize;
  return {points,      grad_output,   grad_value,
          shape.heads, shape.queries, shape.channels,
          row_tiles,   chunks,        shape.batch * shape.heads * row_tiles * chunks};
}

}  // namespace effops::sampling
