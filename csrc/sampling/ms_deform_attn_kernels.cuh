// What the CUDA kernels of ms_deform_attn share: arguments, the level table, and sampling points that
// one lane locates and its group of lanes uses.
//
// Geometry. One (image, head, query) belongs to a group of 2..32 lanes, each with kVector consecutive
// channels. The lanes split the L * P points: each locates one (coordinates, corners, weights), then all
// of them walk over the group's points, received by shuffle. A block works on consecutive queries of one
// head: neighbours sample neighbouring pixels, and all blocks that run at one time read the same head,
// so that its coarse levels stay in the first-level caches.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/dtype.h"
#include "../common/warp.h"
#include "ms_deform_attn_math.h"

namespace effops::sampling {

constexpr int kThreads = 128;
template <typename T>
constexpr int kMinBlocks = sizeof(T) == 8 ? 3 : 4;  // per multiprocessor: up to 168 or 128 registers
constexpr int kLevelsByValue = 16;  // levels that travel in the kernel's arguments
constexpr int kSharedLevels = 256;  // levels that fit the blocks' shared memory; beyond, `table` is used

// Where the sizes of the levels come from. They are user data: invalid levels are marked, see read_level.
struct Pyramid {
  int64_t levels;
  int64_t rows;           // of value
  const int64_t* shapes;  // [levels, 2] on the device, or null: shape_values
  const int64_t* starts;  // [levels] on the device, or null: consecutive if shapes is set, else start_values
  const Level* table;  // [levels] on the device, made by level_table_kernel, or null
  int64_t shape_values[kLevelsByValue][2];
  int64_t start_values[kLevelsByValue];
};

template <typename T>
struct PointArguments {
  Pyramid pyramid;
  const void* locations;  // [B, Q, M, L, P, 2], aligned to pairs
  const void* weights;  // [B, Q, M, L, P]
  bool locations_as_value;  // of type T, else float
  bool weights_as_value;
  int32_t points;  // P
  int32_t total_points;  // L * P
};

// How the work is cut: blocks take (image, head, tile of queries), tiles first.
struct Tiling {
  int64_t heads, queries;
  int64_t tiles;  // of queries, per head
  int64_t works;  // images * heads * tiles
  int32_t channels;
  uint32_t row_bytes;  // of value: heads * channels elements
  int32_t lanes_log2;  // lanes of a group
};

// ---------------------------------------------------------------------------------------------- levels

// A level that no point is active on, wherever it lies: -1 < x < -1 never holds.
EFFOPS_DEVICE Level no_level() { return {0, -1, -1}; }

EFFOPS_DEVICE Level read_level(const Pyramid& pyramid, int64_t level) {
  const int64_t* shapes = pyramid.shapes;
  const int64_t height = shapes ? shapes[2 * level] : pyramid.shape_values[level][0];
  const int64_t width = shapes ? shapes[2 * level + 1] : pyramid.shape_values[level][1];
  uint64_t start = 0;  // unsigned: sums of meaningless sizes may wrap
  if (pyramid.starts) {
    start = static_cast<uint64_t>(pyramid.starts[level]);
  } else if (!shapes) {
    start = static_cast<uint64_t>(pyramid.start_values[level]);
  } else {
#pragma unroll 1
    for (int64_t i = 0; i < level; ++i) {
      start += static_cast<uint64_t>(shapes[2 * i]) * static_cast<uint64_t>(shapes[2 * i + 1]);
    }
  }
  const int64_t signed_start = static_cast<int64_t>(start);
  if (!is_valid_level(signed_start, height, width, pyramid.rows)) return no_level();
  return {signed_start, static_cast<int32_t>(height), static_cast<int32_t>(width)};
}

// Fills the block's table; a barrier follows. Does nothing where the table is in global memory.
EFFOPS_DEVICE void fill_levels(const Pyramid& pyramid, Level* shared) {
  if (!pyramid.table) {
    for (int64_t level = threadIdx.x; level < pyramid.levels; level += blockDim.x) {
      shared[level] = read_level(pyramid, level);
    }
  }
  __syncthreads();
}

EFFOPS_DEVICE Level level_at(const Pyramid& pyramid, const Level* shared, int64_t level) {
  return pyramid.table ? pyramid.table[level] : shared[level];
}

// For more than kSharedLevels levels. One thread per level.
template <int kUnused = 0>
__global__ void level_table_kernel(Pyramid pyramid, Level* table) {
  const int64_t level = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (level < pyramid.levels) table[level] = read_level(pyramid, level);
}

// ---------------------------------------------------------------------------------------------- points

template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE A load_scalar(const void* data, bool as_value, int64_t index) {
  if (as_value) return static_cast<A>(widen(load_pack_once<1>(static_cast<const T*>(data) + index).data[0]));
  return static_cast<A>(load_pack_once<1>(static_cast<const float*>(data) + index).data[0]);
}

template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE void load_pair(const void* data, bool as_value, int64_t index, A& x, A& y) {
  if (as_value) {
    const Pack<T, 2> pair = load_pack_once<2>(static_cast<const T*>(data) + 2 * index);
    x = widen(pair.data[0]);
    y = widen(pair.data[1]);
  } else {
    const Pack<float, 2> pair = load_pack_once<2>(static_cast<const float*>(data) + 2 * index);
    x = static_cast<A>(pair.data[0]);
    y = static_cast<A>(pair.data[1]);
  }
}

EFFOPS_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
EFFOPS_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

// Rows of the four corners of a point, and which corners are inside the level, in two words to shuffle.
// Corners outside share the row of a neighbour inside: a step of 0.
struct CornerRows {
  uint32_t first;  // row of corner 0
  uint32_t steps;  // rows to the corners below (a width, < 2^24), then kColumnStep...

  static constexpr uint32_t kColumnStep = 1u << 28, kLeft = 1u << 29, kTop = 1u << 30, kActive = 1u << 31;

  EFFOPS_DEVICE bool active() const { return (steps & kActive) != 0; }
  EFFOPS_DEVICE bool two_columns() const { return (steps & kColumnStep) != 0; }
  EFFOPS_DEVICE bool two_rows() const { return (steps & 0xffffffu) != 0; }
  EFFOPS_DEVICE uint32_t row(int corner) const {
    return first + (corner & 1 ? steps >> 28 & 1 : 0) + (corner & 2 ? steps & 0xffffffu : 0);
  }
  EFFOPS_DEVICE CornerRows from_lane(int lane) const {
    return {__shfl_sync(kFullWarp, first, lane), __shfl_sync(kFullWarp, steps, lane)};
  }
  // Inactive points have no valid corner.
  EFFOPS_DEVICE void valid_corners(bool (&valid)[4]) const {
    const bool left = active() && (steps & kLeft),
               right = active() && (steps & (kColumnStep | kLeft)) != kLeft;
    const bool top = steps & kTop, bottom = two_rows() || !top;
    valid[0] = left && top;
    valid[1] = right && top;
    valid[2] = left && bottom;
    valid[3] = right && bottom;
  }
};

// A point as its group uses it. Weights are corner weight times attention, 0 for corners outside.
template <typename A>
struct SharedPoint {
  CornerRows rows;
  A weight[4];

  EFFOPS_DEVICE SharedPoint from_lane(int lane) const {
    SharedPoint point;
    point.rows = rows.from_lane(lane);
#pragma unroll
    for (int k = 0; k < 4; ++k) point.weight[k] = __shfl_sync(kFullWarp, weight[k], lane);
    return point;
  }
};

// What backward needs besides, in the lane that located the point.
template <typename A>
struct PointDetails {
  A fx, fy, attention, width, height;
};

// Corner rows and corner weights (without attention) of the point (x, y), given in [0, 1]. An inactive
// point keeps the zeros that the caller has put there: NaN has no integer.
template <typename A>
EFFOPS_DEVICE void locate_corners(A x, A y, const Level& level, CornerRows& rows, A (&weight)[4],
                                  PointDetails<A>& details) {
  details.width = static_cast<A>(level.width);
  details.height = static_cast<A>(level.height);
  x = fused(x, details.width, A(-0.5));
  y = fused(y, details.height, A(-0.5));
  if (!is_active(x, y, level.height, level.width)) return;
  const Corners<A> corners = corners_at(x, y, level.height, level.width);
  corner_weights(corners, weight);
  rows.first = static_cast<uint32_t>(level.start + corners.index[0]);
  rows.steps = static_cast<uint32_t>(corners.index[2] - corners.index[0]) | CornerRows::kActive |
               (corners.index[1] != corners.index[0] ? CornerRows::kColumnStep : 0) |
               (corners.valid[0] || corners.valid[2] ? CornerRows::kLeft : 0) |
               (corners.valid[0] || corners.valid[1] ? CornerRows::kTop : 0);
  details.fx = corners.fx;
  details.fy = corners.fy;
}

// Corners outside keep the weight 0, also beside an infinite attention.
template <typename A>
EFFOPS_DEVICE void scale_weights(A (&weight)[4], A attention) {
#pragma unroll
  for (int k = 0; k < 4; ++k) weight[k] = weight[k] == A(0) ? A(0) : weight[k] * attention;
}

// Locates point `index` (of L * P) of the query whose points begin at `first_point`. A point that does
// not exist is inactive.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE void locate_point(const PointArguments<T>& arguments, const Level* shared_levels,
                                int64_t first_point, int32_t index, bool exists, SharedPoint<A>& point,
                                PointDetails<A>& details) {
  point = {};
  details = {};
  if (!exists) return;
  const uint32_t level_index = static_cast<uint32_t>(index) / static_cast<uint32_t>(arguments.points);
  const Level level = level_at(arguments.pyramid, shared_levels, level_index);
  A x, y;
  load_pair<T>(arguments.locations, arguments.locations_as_value, first_point + index, x, y);
  details.attention = load_scalar<T>(arguments.weights, arguments.weights_as_value, first_point + index);
  locate_corners(x, y, level, point.rows, point.weight, details);
  scale_weights(point.weight, details.attention);
}

// ------------------------------------------------------------------------------------------- geometry

// What the kernels count in 32 bits: rows of an image, points of a query, bytes of a row.
inline bool fits_kernels(const MsDeformAttnShape& shape) {
  constexpr int64_t k32 = int64_t{1} << 32, k30 = int64_t{1} << 30;
  return shape.rows < k32 && shape.levels < k30 && shape.points < k30 && shape.levels * shape.points < k30 &&
         shape.heads < k30 && shape.channels < k30 &&
         shape.heads * shape.channels < k32 / static_cast<int64_t>(sizeof(double));
}

// Groups are wide enough for all channels, if 32 lanes are, and have at least 1 << minimum_log2 lanes.
template <typename T>
Tiling make_tiling(const MsDeformAttnShape& shape, int vector, int minimum_log2) {
  int32_t lanes_log2 = minimum_log2;
  while (lanes_log2 < 5 && (int64_t{vector} << lanes_log2) < shape.channels) ++lanes_log2;
  const int64_t queries_per_block = kThreads >> lanes_log2;
  const int64_t tiles = (shape.queries + queries_per_block - 1) / queries_per_block;
  return {shape.heads,
          shape.queries,
          tiles,
          shape.batch * shape.heads * tiles,
          static_cast<int32_t>(shape.channels),
          static_cast<uint32_t>(shape.heads * shape.channels * sizeof(T)),
          lanes_log2};
}

// A lane's place in the work of its block. Index counts the works: uint32_t where they are few enough
// that every block has one, because 64-bit division is slow.
template <typename Index>
struct Place {
  int group_lane;  // in the group
  int first_lane;  // of the group, in the warp
  int64_t image, head;
  int64_t query;  // may be past the end
  int64_t query_row;  // of (image, query, head) in an array [B, Q, M]

  EFFOPS_DEVICE Place(const Tiling& tiling, Index work) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread & (kWarpSize - 1);
    group_lane = lane & ((1 << tiling.lanes_log2) - 1);
    first_lane = lane - group_lane;
    const Index tiles = static_cast<Index>(tiling.tiles), heads = static_cast<Index>(tiling.heads);
    const Index head_index = work / tiles, tile = work - head_index * tiles;
    image = head_index / heads;
    head = head_index - static_cast<Index>(image) * heads;
    query = static_cast<int64_t>(tile) * (kThreads >> tiling.lanes_log2) + (thread >> tiling.lanes_log2);
    query_row = (image * tiling.queries + query) * tiling.heads + head;
  }
};

// The vector kernels have one work per block; the others may have more works than a grid has blocks.
template <int kVector>
using work_index_t = std::conditional_t<kVector == 1, int64_t, uint32_t>;

// address + row * row_bytes.
template <typename T>
EFFOPS_DEVICE T* row_address(T* address, uint32_t row, uint32_t row_bytes) {
#if defined(__CUDA_ARCH__)
  // From C++ nvcc makes a 64 x 64 bit product of it where row_bytes is uniform.
  uint64_t result;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(row), "r"(row_bytes), "l"(address));
  return reinterpret_cast<T*>(result);
#else
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(address) + static_cast<uint64_t>(row) * row_bytes);
#endif
}

}  // namespace effops::sampling
