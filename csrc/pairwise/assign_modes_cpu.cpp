// assign_modes on the CPU: connected components of the graph of similar points.
#include "assign_modes.h"

#include <atomic>

#include "pair_rounds_cpu.h"
#include "tensors_cpu.h"
#include "tile_bounds_cpu.h"

namespace effops::pairwise {
namespace {

// Disjoint sets that several threads join. A set is known by its smallest member, so that the sets at the end
// do not depend on the order of joining.
class DisjointSets {
 public:
  explicit DisjointSets(int64_t count) : parents_(count) {
    for (int64_t i = 0; i < count; ++i) parents_[i].store(static_cast<int32_t>(i), kRelaxed);
  }

  int32_t find(int32_t member) {
    for (;;) {
      int32_t parent = parents_[member].load(kRelaxed);
      if (parent == member) return member;
      const int32_t above = parents_[parent].load(kRelaxed);
      if (above != parent) parents_[member].compare_exchange_weak(parent, above, kRelaxed);
      member = above;
    }
  }

  void join(int32_t a, int32_t b) {
    for (;;) {
      a = find(a);
      b = find(b);
      if (a == b) return;
      int32_t larger = std::max(a, b);
      if (parents_[larger].compare_exchange_strong(larger, std::min(a, b), kRelaxed)) return;
    }
  }

 private:
  static constexpr auto kRelaxed = std::memory_order_relaxed;
  std::vector<std::atomic<int32_t>> parents_;
};

template <typename T>
class Components {
 public:
  Components(const ModesShape& shape, const T* modes, double threshold)
      : grid_{shape.batch, shape.points, shape.channels},
        points_(grid_, modes, true),
        bounds_(grid_),
        least_(2 * threshold - 1) {
    for (int64_t image = 0; image < shape.batch; ++image) sets_.emplace_back(shape.points);
    if (threshold >= 1) return;  // no cosine is above 1, but one of rounded numbers may be
    grid_.for_tiles(
        [&](int64_t image, int64_t tile) { bounds_.set(image, tile, points_.frame(image, tile)); });
    for_block_pairs(grid_, [&](int64_t image, TileRange first, TileRange second) {
      const Frames<T> similarities(1, 1, kTile);
      for (int64_t a = first.begin; a < first.end; ++a) {
        const int64_t begin = first.begin == second.begin ? a : second.begin;
        for (int64_t b = begin; b < second.end; ++b) join(image, a, b, similarities.at(0, 0));
      }
    });
  }

  // labels: [N] of an image.
  void label(int64_t image, int64_t min_size, int64_t* labels) {
    std::vector<int32_t> root(grid_.points), sizes(grid_.points, 0), roots;
    for (int32_t i = 0; i < static_cast<int32_t>(grid_.points); ++i) {
      root[i] = sets_[image].find(i);
      if (root[i] == i) roots.push_back(i);
      ++sizes[root[i]];
    }
    std::stable_sort(roots.begin(), roots.end(), [&](int32_t a, int32_t b) { return sizes[a] > sizes[b]; });
    std::vector<int64_t> label_of(grid_.points, -1);
    for (size_t i = 0; i < roots.size(); ++i) {
      if (sizes[roots[i]] >= min_size) label_of[roots[i]] = static_cast<int64_t>(i);
    }
    for (int64_t i = 0; i < grid_.points; ++i) labels[i] = label_of[root[i]];
  }

 private:
  int32_t row(int64_t image, int64_t tile, int64_t l) const {
    return static_cast<int32_t>(points_.row_at(image, tile * kTile + l));
  }

  // The set that all points of a tile are in; -1 if there are several.
  int32_t only_set(int64_t image, int64_t tile) {
    const int32_t set = sets_[image].find(row(image, tile, 0));
    for (int64_t l = 1; l < grid_.count(tile); ++l) {
      if (sets_[image].find(row(image, tile, l)) != set) return -1;
    }
    return set;
  }

  void join(int64_t image, int64_t a, int64_t b, T* similarities) {
    const T *frame_a = points_.frame(image, a), *frame_b = points_.frame(image, b);
    const int32_t set_a = only_set(image, a), set_b = only_set(image, b);
    const bool whole = set_a >= 0 && set_b >= 0;
    if (whole && set_a == set_b) return;
    const bool skips = points_.finite(image) && a != b;
    if (skips && bounds_.apart(image, a, frame_a, b, frame_b, least_)) return;
    tile_kernels<T>().product({frame_a, 1, kTile, frame_b, similarities, kTile, grid_.channels, false});
    uint64_t edges[kTile];
    tile_kernels<T>().edges(similarities, static_cast<T>(least_), edges);
    const uint64_t lanes = ~uint64_t{0} >> (kTile - grid_.count(b));
    for (int64_t r = 0; r < grid_.count(a); ++r) {
      for (uint64_t left = edges[r] & lanes; left != 0; left &= left - 1) {
        sets_[image].join(row(image, a, r), row(image, b, __builtin_ctzll(left)));
        if (whole) return;  // one edge joins them all
      }
    }
  }

  TileGrid grid_;
  PointSet<T> points_;
  TileBounds<T> bounds_;
  double least_;  // similarity, which an edge exceeds
  std::vector<DisjointSets> sets_;
};

Tensor assign_modes(const Tensor& modes,  // [B, N, D]
                    double threshold, int64_t min_size) {
  const ModesShape shape = check_assign_modes(modes, threshold, min_size);
  const Tensor labels = empty_of(modes, {shape.batch, shape.points}, ScalarType::Long);
  if (labels.numel() == 0) return labels;
  dispatch_points(modes, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor own = effops::as_contiguous(modes);
    Components<T> components(shape, data_of<T>(own), threshold);
    for (int64_t image = 0; image < shape.batch; ++image) {
      components.label(image, min_size, new_data<int64_t>(labels) + image * shape.points);
    }
  });
  return labels;
}

}  // namespace
}  // namespace effops::pairwise

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("assign_modes", TORCH_BOX(&effops::pairwise::assign_modes));
}
