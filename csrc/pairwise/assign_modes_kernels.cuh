// CUDA kernels of assign_modes: connected components of the graph that joins similar rows. No torch, no
// launches.
//
// Five launches: unit rows, joins, sizes, the components that count, labels. The components are kept as
// trees: parent[i] <= i is a member of i's component, a root its own parent. A root that is joined to another
// becomes a child of the smaller of the two, so that the root in the end is the component's smallest member,
// whatever the order of the joins: labels do not depend on it.
#pragma once

#include "points_kernels.cuh"
#include "scalar_tile.cuh"

namespace effops::pairwise {

// The trees of an image's points, and what comes of them.
struct Components {
  int64_t batch, points;  // B, N
  int32_t* parents;  // [B, N]
  int32_t* sizes;  // [B, N], of the components, at their roots
  int32_t* counts;  // [B]: components that count
  uint64_t* keys;  // [B, N]: these, in any order

  EFFOPS_HD int64_t all() const { return batch * points; }
};

template <typename A>
struct ModeRows {
  A* rows;  // [B, tiles, 64, pitch], unit rows; zeros past the last point
  int32_t channels, pitch;  // D, elements of a row
  int32_t tiles;  // of an image

  // Without the memory.
  static ModeRows sizes(int64_t points, int64_t channels) {
    return {nullptr, static_cast<int32_t>(channels), static_cast<int32_t>(round_up(channels, kStageDepth<A>)),
            static_cast<int32_t>(divide_up(points, kTilePoints))};
  }
  EFFOPS_HD int64_t image_rows() const { return int64_t{tiles} * kTilePoints; }
};

// Unit rows, every point its own component. A warp per row.
// Bytes: B N D e in and out, which bound it.
template <typename A>
__global__ void __launch_bounds__(kPointThreads)
    begin_modes_kernel(const A* modes, ModeRows<A> unit, Components components) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t rows = components.batch * unit.image_rows(), step = int64_t{gridDim.x} * kPointWarps;
  for (int64_t row = int64_t{blockIdx.x} * kPointWarps + threadIdx.x / kWarpSize; row < rows; row += step) {
    const int64_t image = row / unit.image_rows(), point = row - image * unit.image_rows();
    const int64_t at = image * components.points + point;
    const bool exists = point < components.points;
    const A* source = modes + (exists ? at : 0) * unit.channels;
    const double scale = 1 / divisor_of(row_norm(source, lane, exists ? unit.channels : 0));
    for_lane_channels(lane, unit.pitch, [&](int, int64_t d) {
      const bool has = exists && d < unit.channels;
      unit.rows[row * unit.pitch + d] = has ? static_cast<A>(source[d] * scale) : A(0);
    });
    if (lane > 0 || !exists) continue;
    components.parents[at] = static_cast<int32_t>(point);
    components.sizes[at] = 0;
    if (point == 0) components.counts[image] = 0;
  }
}

// What another thread may be writing.
EFFOPS_DEVICE int32_t read_parent(int32_t* parent) {
#if defined(__CUDACC__)
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(parent) : "memory");
  return value;
#else
  return atomicAdd(parent, 0);
#endif
}

// The root at the time. Halves the path to it.
EFFOPS_DEVICE int32_t find_root(int32_t* parents, int32_t point) {
  int32_t parent = read_parent(parents + point);
  while (parent != point) {
    const int32_t grandparent = read_parent(parents + parent);
    if (grandparent != parent) atomicMin(parents + point, grandparent);
    point = parent;
    parent = grandparent;
  }
  return point;
}

// Two points, or what have been their roots.
EFFOPS_DEVICE void join(int32_t* parents, int32_t a, int32_t b) {
  a = find_root(parents, a);
  b = find_root(parents, b);
  while (a != b) {
    const int32_t smaller = min(a, b), larger = max(a, b);
    const int32_t parent = atomicCAS(parents + larger, larger, smaller);
    if (parent == larger) return;
    a = smaller;  // another thread has joined the larger root to `parent`
    b = find_root(parents, parent);
  }
}

// A pair of tiles, the row tile not after the column tile.
struct TilePair {
  int32_t row, column;
};
EFFOPS_DEVICE TilePair tile_pair(int64_t index) {
  auto column = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);
  while (column * (column + 1) / 2 > index) --column;  // where the root was rounded
  while ((column + 1) * (column + 2) / 2 <= index) ++column;
  return {static_cast<int32_t>(index - column * (column + 1) / 2), static_cast<int32_t>(column)};
}
EFFOPS_HD int64_t tile_pairs(int64_t tiles) { return tiles * (tiles + 1) / 2; }

// Joins the rows whose dot product exceeds the threshold; NaN does not.
//
// Parallelism: a block per pair of tiles of 64 points. It is skipped where its points are all joined already,
// and so are pairs of points whose roots were the same when the block began.
// Bytes: 2 * 64 D e per tile pair from the second-level cache, and the parents; bound by the plain
// multiplications, N N D / 2, as the threshold is to be met in full precision.
template <typename A>
__global__ void __launch_bounds__(ScalarEngine<A>::kThreads, ScalarEngine<A>::kBlocks)
    join_modes_kernel(ModeRows<A> unit, Components components, A threshold) {
  using Engine = ScalarEngine<A>;
  EFFOPS_SHARED(ScalarStages<A>, stages, 1);
  EFFOPS_SHARED(int32_t, roots, 2 * kTilePoints);  // of the rows, of the columns; -1: there is no point
  const int thread = static_cast<int>(threadIdx.x);
  const Engine engine(threadIdx.x);
  const int64_t pairs = tile_pairs(unit.tiles);
  for (int64_t index = blockIdx.x; index < components.batch * pairs; index += gridDim.x) {
    const int64_t image = index / pairs;
    const TilePair pair = tile_pair(index - image * pairs);
    int32_t* parents = components.parents + image * components.points;
    const int32_t first = find_root(parents, pair.row * kTilePoints);
    int32_t root = first;
    if (thread < 2 * kTilePoints) {
      const int32_t tile = thread < kTilePoints ? pair.row : pair.column;
      const int64_t point = int64_t{tile} * kTilePoints + thread % kTilePoints;
      const bool exists = point < components.points;
      if (exists) root = find_root(parents, static_cast<int32_t>(point));
      roots[thread] = exists ? root : -1;
    }
    const bool joined = __syncthreads_and(root == first) != 0;
    if (!joined) {
      const A* rows = unit.rows + image * unit.image_rows() * unit.pitch;
      const int64_t tile_size = int64_t{kTilePoints} * unit.pitch;
      A dots[Engine::kM][Engine::kN];
      multiply_tile(engine, rows + pair.row * tile_size, rows + pair.column * tile_size, unit.pitch,
                    stages[0], dots);
#pragma unroll
      for (int i = 0; i < Engine::kM; ++i) {
        const int32_t row_root = roots[engine.row(i)];
#pragma unroll
        for (int j = 0; j < Engine::kN; ++j) {
          const int32_t column_root = roots[kTilePoints + engine.column(j)];
          const bool similar = dots[i][j] > threshold;
          if (similar && row_root != column_root && row_root >= 0 && column_root >= 0) {
            join(parents, row_root, column_root);
          }
        }
      }
    }
    __syncthreads();  // the roots have been read
  }
}

// Every point a child of its root, which counts its members; a warp counts those of a root together. A thread
// per point; nothing is joined any more.
__global__ void __launch_bounds__(kPointThreads) count_members_kernel(Components components) {
  const int64_t all = components.all(), step = int64_t{gridDim.x} * kPointThreads;
  for (int64_t begin = int64_t{blockIdx.x} * kPointThreads; begin < all; begin += step) {
    const int64_t at = begin + threadIdx.x;
    int64_t root = -1;
    if (at < all) {
      const int64_t first = at / components.points * components.points;
      const int32_t point = static_cast<int32_t>(at - first);
      const int32_t own = find_root(components.parents + first, point);
      atomicMin(components.parents + at, own);
      root = first + own;
    }
    const uint32_t same = __match_any_sync(kFullWarp, root);
    const bool leads = lowest_bit(same) == static_cast<int>(threadIdx.x) % kWarpSize;
    if (leads && root >= 0) atomicAdd(components.sizes + root, __popc(same));
  }
}

// Components in the order of their labels are those with larger keys first.
EFFOPS_HD uint64_t component_key(int32_t size, int32_t root) {
  return static_cast<uint64_t>(size) << 32 | (UINT32_MAX - static_cast<uint32_t>(root));
}

// The keys of the components that count. A thread per point.
__global__ void __launch_bounds__(kPointThreads)
    list_components_kernel(Components components, int64_t min_size) {
  const int64_t all = components.all(), step = int64_t{gridDim.x} * kPointThreads;
  for (int64_t at = int64_t{blockIdx.x} * kPointThreads + threadIdx.x; at < all; at += step) {
    const int64_t image = at / components.points;
    const int32_t size = components.sizes[at];  // 0 where there is no root
    if (size == 0 || size < min_size) continue;
    const int32_t slot = atomicAdd(components.counts + image, 1);
    const auto root = static_cast<int32_t>(at - image * components.points);
    components.keys[image * components.points + slot] = component_key(size, root);
  }
}

// labels[b, i] = how many keys are larger than that of the point's component. A thread per point.
// Bytes: B N (8 + K / 32) from the caches for K components.
__global__ void __launch_bounds__(kPointThreads)
    label_modes_kernel(Components components, int64_t min_size, int64_t* labels) {
  const int64_t all = components.all(), step = int64_t{gridDim.x} * kPointThreads;
  for (int64_t at = int64_t{blockIdx.x} * kPointThreads + threadIdx.x; at < all; at += step) {
    const int64_t image = at / components.points, first = image * components.points;
    const int32_t root = components.parents[at], size = components.sizes[first + root];
    const uint64_t own = component_key(size, root);
    int64_t rank = 0;
    if (size >= min_size) {
#pragma unroll 4
      for (int32_t k = 0; k < components.counts[image]; ++k) rank += components.keys[first + k] > own ? 1 : 0;
    }
    labels[at] = size >= min_size ? rank : -1;
  }
}

}  // namespace effops::pairwise
