// Vectorised addresses of sampling points: lanes are points. Included by ISA files only.
//
// A tile is a run of queries of one head; its points are numbered (query, level, point). For each of
// them the four corners get a row of the level (clamped into it) and a weight (0 outside the level).
#pragma once

#include "../common/simd.h"
#include "ms_deform_attn_cpu_kernel.h"

namespace effops::sampling {
namespace {

using namespace effops::simd;

// Arrays of one tile, cut from the scratch memory. Acc is float or double.
template <typename Acc>
struct PointTile {
  using Integer = typename Vec<Acc>::integer;
  int64_t capacity;            // points, a multiple of the lanes
  Acc *x, *y, *attention;      // as given, widened
  Acc *width, *height;         // of each point's level
  Integer *columns, *lines;    // the same as integers: float has no exact 2^24 + 1
  Acc* weight[4];              // corner weight times attention
  Integer* row[4];             // corner row within the level; row[0] < 0: inactive point
  Acc* dots;                   // [capacity, 4] <grad_output, corner value>, for backward
};

// Enough points for long vector loops, few enough to stay in the first-level cache.
constexpr int64_t kTilePoints = 256;

// Rows or queries that strided reads are asked for ahead of their use.
constexpr int64_t kPrefetchDistance = 16;

inline int64_t tile_queries(int64_t points_per_query) {
  return points_per_query >= kTilePoints ? 1 : kTilePoints / (points_per_query > 0 ? points_per_query : 1);
}

inline int64_t tile_capacity(const MsDeformAttnShape& shape) {
  const int64_t per_query = shape.levels * shape.points;
  const int64_t points = per_query > kTilePoints ? per_query : kTilePoints;
  // Whole registers of any width are read past the last point, and the query after it is prefetched.
  return (points + per_query + 15) / 16 * 16 + 16;
}

constexpr int64_t kTileArrays = 19;

template <typename Acc>
inline PointTile<Acc> make_tile(const MsDeformAttnShape& shape, void* scratch) {
  PointTile<Acc> tile;
  const int64_t n = tile.capacity = tile_capacity(shape);
  Acc* next = static_cast<Acc*>(scratch);
  const auto take = [&](int64_t count) { return (next += count) - count; };
  Acc** const arrays[] = {&tile.x, &tile.y, &tile.attention, &tile.width, &tile.height};
  for (Acc** array : arrays) *array = take(n);
  tile.columns = reinterpret_cast<typename PointTile<Acc>::Integer*>(take(n));
  tile.lines = reinterpret_cast<typename PointTile<Acc>::Integer*>(take(n));
  for (int k = 0; k < 4; ++k) {
    tile.weight[k] = take(n);
    tile.row[k] = reinterpret_cast<typename PointTile<Acc>::Integer*>(take(n));
  }
  tile.dots = take(4 * n);
  return tile;
}

// Sizes of each point's level, for whole queries until `count` points and the rest of a register are filled.
template <typename Acc>
inline void fill_level_tables(PointTile<Acc>& tile, const PointInputs& inputs, const QueryRange& range,
                              int64_t count) {
  count = (count + Vec<Acc>::lanes - 1) / Vec<Acc>::lanes * Vec<Acc>::lanes;
  int64_t i = 0;
  while (i < count) {
    for (int64_t l = range.level_begin; l < range.level_end; ++l) {
      const Level& level = inputs.levels[l];
      for (int64_t p = 0; p < inputs.shape.points && i < count; ++p, ++i) {
        tile.columns[i] = level.width;
        tile.lines[i] = level.height;
        tile.width[i] = static_cast<Acc>(level.width);
        tile.height[i] = static_cast<Acc>(level.height);
      }
    }
  }
}

// The queries of a range, cut into tiles of at most `step`.
struct Tiles {
  int64_t per_query, step;
};

template <typename Acc>
inline Tiles prepare_tiles(PointTile<Acc>& tile, const PointInputs& inputs, const QueryRange& range) {
  const int64_t per_query = (range.level_end - range.level_begin) * inputs.shape.points;
  const int64_t queries = range.end - range.begin, most = tile_queries(per_query);
  const int64_t step = queries < most ? queries : most;
  fill_level_tables(tile, inputs, range, step * per_query);
  return {per_query, step};
}

template <typename T, typename Acc>
inline void copy_widened(const T* source, int64_t count, Acc* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = static_cast<Acc>(widen(source[i]));
}

template <typename T, typename Acc>
inline void copy_pairs_widened(const T* source, int64_t count, Acc* x, Acc* y) {
  int64_t i = 0;
  if constexpr (__is_same(T, Acc)) {
    using V = typename Vec<Acc>::type;
    for (; i + Vec<Acc>::lanes <= count; i += Vec<Acc>::lanes) {
      V even, odd;
      split_pairs(source + 2 * i, even, odd);
      store(x + i, even);
      store(y + i, odd);
    }
  }
  for (; i < count; ++i) {
    x[i] = static_cast<Acc>(widen(source[2 * i]));
    y[i] = static_cast<Acc>(widen(source[2 * i + 1]));
  }
}

// Calls f with a typed pointer to element `offset` of an array of the given type.
template <typename F>
EFFOPS_INLINE void with_type(const void* data, FloatType type, int64_t offset, const F& f) {
  switch (type) {
    case FloatType::kFloat: return f(static_cast<const float*>(data) + offset);
    case FloatType::kDouble: return f(static_cast<const double*>(data) + offset);
    case FloatType::kBFloat16: return f(static_cast<const bf16*>(data) + offset);
    case FloatType::kHalf: return f(static_cast<const f16*>(data) + offset);
  }
}

// First point of a query's levels, counted in the array [B, Q, M, L, P].
inline int64_t first_point(const MsDeformAttnShape& s, const QueryRange& range, int64_t query) {
  return (((range.image * s.queries + query) * s.heads + range.head) * s.levels + range.level_begin) *
         s.points;
}

template <typename Acc>
inline void read_points(PointTile<Acc>& tile, const PointInputs& inputs, const QueryRange& range,
                        int64_t first_query, int64_t num_queries) {
  const int64_t per_query = (range.level_end - range.level_begin) * inputs.shape.points;
  const int64_t ahead = kPrefetchDistance * inputs.shape.heads * inputs.shape.levels * inputs.shape.points;
  for (int64_t q = 0; q < num_queries; ++q) {
    const int64_t source = first_point(inputs.shape, range, first_query + q), target = q * per_query;
    with_type(inputs.locations, inputs.location_type, 2 * source, [&](const auto* p) {
      prefetch(p, 2 * ahead);
      copy_pairs_widened(p, per_query, tile.x + target, tile.y + target);
    });
    with_type(inputs.weights, inputs.weight_type, source, [&](const auto* p) {
      prefetch(p, ahead);
      copy_widened(p, per_query, tile.attention + target);
    });
  }
}

// One register of points: bilinear_math.h lane by lane.
template <typename Acc>
struct PointVector {
  using V = typename Vec<Acc>::type;
  using M = typename Vec<Acc>::mask;
  V attention;                     // 0 for inactive points
  V left_weight, right_weight;     // 1 - fx and fx, 0 for columns outside
  V top_weight, bottom_weight;     // 1 - fy and fy, 0 for lines outside
  M left, right, top, bottom;      // the column or line is inside
  M active;
  M left_column, right_column, top_row, bottom_row;  // clamped; rows are line * width
};

template <typename Acc>
EFFOPS_INLINE PointVector<Acc> locate(const PointTile<Acc>& tile, int64_t i) {
  using V = typename Vec<Acc>::type;
  using M = typename Vec<Acc>::mask;
  const V width = load<V>(tile.width + i), height = load<V>(tile.height + i);
  const M columns = load<M>(tile.columns + i), lines = load<M>(tile.lines + i);
  V x = load<V>(tile.x + i) * width - Acc(0.5), y = load<V>(tile.y + i) * height - Acc(0.5);
  PointVector<Acc> p;
  p.active = (x > Acc(-1)) & (x < width) & (y > Acc(-1)) & (y < height);  // NaN fails
  x = p.active ? x : V{};
  y = p.active ? y : V{};
  M x0 = __builtin_convertvector(x, M), y0 = __builtin_convertvector(y, M);
  x0 += __builtin_convertvector(x0, V) > x;  // truncated to floor: true is -1
  y0 += __builtin_convertvector(y0, V) > y;
  const V fx = x - __builtin_convertvector(x0, V), fy = y - __builtin_convertvector(y0, V);
  p.left = x0 >= 0;
  p.right = x0 < columns - 1;
  p.top = y0 >= 0;
  p.bottom = y0 < lines - 1;
  p.attention = p.active ? load<V>(tile.attention + i) : V{};
  p.left_weight = p.left ? Acc(1) - fx : V{};
  p.right_weight = p.right ? fx : V{};
  p.top_weight = p.top ? Acc(1) - fy : V{};
  p.bottom_weight = p.bottom ? fy : V{};
  p.left_column = p.left ? x0 : M{};
  p.right_column = p.right ? x0 + 1 : columns - 1;
  p.top_row = (p.top ? y0 : M{}) * columns;
  p.bottom_row = (p.bottom ? y0 + 1 : lines - 1) * columns;
  return p;
}

// Near the border the corner outside reads the row of its neighbour inside. It also gets half of the
// neighbour's weight, so that no row is read with weight 0: 0 * Inf would be NaN.
template <typename Acc>
EFFOPS_INLINE void share_weight(typename Vec<Acc>::mask both_inside, typename Vec<Acc>::type& first,
                                typename Vec<Acc>::type& second) {
  const typename Vec<Acc>::type half = (first + second) * Acc(0.5);
  first = both_inside ? first : half;
  second = both_inside ? second : half;
}

// Fills row[] and weight[] of the first `count` points (and of the rest of the last register).
template <typename Acc>
inline void locate_corners(PointTile<Acc>& tile, int64_t count) {
  using V = typename Vec<Acc>::type;
  for (int64_t i = 0; i < count; i += Vec<Acc>::lanes) {
    PointVector<Acc> p = locate(tile, i);
    share_weight<Acc>(p.left & p.right, p.left_weight, p.right_weight);
    share_weight<Acc>(p.top & p.bottom, p.top_weight, p.bottom_weight);
    const V weight[4] = {p.top_weight * p.left_weight, p.top_weight * p.right_weight,
                         p.bottom_weight * p.left_weight, p.bottom_weight * p.right_weight};
    for (int k = 0; k < 4; ++k) {
      // A corner of weight 0 stays out also beside an infinite attention.
      store(tile.weight[k] + i, weight[k] == Acc(0) ? V{} : weight[k] * p.attention);
    }
    store(tile.row[0] + i, p.active ? p.top_row + p.left_column : -1 + typename Vec<Acc>::mask{});
    store(tile.row[1] + i, p.top_row + p.right_column);
    store(tile.row[2] + i, p.bottom_row + p.left_column);
    store(tile.row[3] + i, p.bottom_row + p.right_column);
  }
}

}  // namespace
}  // namespace effops::sampling
