// What both directions of mean_shift on the CPU share: points, weights, and which pairs of tiles count.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "mean_shift.h"
#include "pair_rounds_cpu.h"
#include "tensors_cpu.h"
#include "tile_bounds_cpu.h"

namespace effops::pairwise {

// kappa: the number, as far as T reaches, or what the tensor holds.
template <typename T>
double kappa_value(const char* op, const std::optional<Tensor>& tensor, double number) {
  if (!tensor.has_value()) return std::min(number, double{std::numeric_limits<T>::max()});
  const double kappa = *data_of<T>(*tensor);
  if (!(kappa >= 0 && std::isfinite(kappa))) fail(op, ": expected kappa >= 0 and finite, got ", kappa);
  return kappa;
}

// Weights of the points of all images, in the order of the points.
template <typename T>
class PointWeights {
 public:
  // weights: [images, points], or null: all are 1.
  PointWeights(const PointSet<T>& points, const T* weights)
      : grid_(points.grid()),
        lanes_(weights ? grid_.images : 0, grid_.tiles, 1),
        totals_(grid_.images, static_cast<double>(grid_.points)),
        usual_(grid_.images, 1),
        given_(weights != nullptr) {
    if (!weights) return;
    for (int64_t image = 0; image < grid_.images; ++image) {
      T total = 0;
      for (int64_t i = 0; i < grid_.points; ++i) {
        const T weight = weights[image * grid_.points + i];
        total += std::abs(weight);
        usual_[image] &= weight >= 0 ? 1 : 0;
      }
      totals_[image] = total;
    }
    grid_.for_tiles([&](int64_t image, int64_t tile) {
      points.pack(weights + image * grid_.points, 1, image, tile, lanes_.at(image, tile));
    });
  }

  bool given() const { return given_; }
  const T* lanes(int64_t image, int64_t tile) const { return lanes_.at(image, tile); }
  double total(int64_t image) const { return totals_[image]; }
  // Whether none is negative or NaN.
  bool usual(int64_t image) const { return usual_[image]; }

  // The sum of a tile's weights, and the smallest.
  std::pair<double, double> sum_and_least(int64_t image, int64_t tile) const {
    const int64_t count = grid_.count(tile);
    if (!given_) return {static_cast<double>(count), 1.0};
    const T* weights = lanes(image, tile);
    double sum = 0, least = std::numeric_limits<double>::infinity();
    for (int64_t l = 0; l < count; ++l) {
      sum += weights[l];
      least = std::min(least, static_cast<double>(weights[l]));
    }
    return {sum, least};
  }

 private:
  TileGrid grid_;
  Frames<T> lanes_;
  std::vector<double> totals_;
  std::vector<char> usual_;
  bool given_;
};

// The similarity up to which pairs of tiles are left out, tile by tile (README.md: error bound).
template <typename T>
class SkipLimits {
 public:
  SkipLimits(const TileGrid& grid, double kappa)
      : bounds(grid), grid_(grid), kappa_(kappa), limits_(grid.images * grid.tiles, -2.0) {}

  // Of a tile of points; none where the image has short rows or unusual weights.
  void set(int64_t image, int64_t tile, const T* frame, const PointWeights<T>& weights, bool unit) {
    bounds.set(image, tile, frame);
    double& limit = limits_[image * grid_.tiles + tile];
    limit = -2;
    if (!unit || !weights.usual(image)) return;
    // A point's sum of kernel weights is at least its own, and that of its tile at the largest distance.
    const auto [sum, least] = weights.sum_and_least(image, tile);
    const double cos_radius = bounds.cos_radius(image, tile);
    const double farthest = cos_radius > 0.75 ? 2 * cos_radius * cos_radius - 1 : -1;  // cos of the diameter
    const double near = sum * std::exp(kappa_ * (farthest - 1 - 4 * bounds.error()));
    const double own = least * std::exp(-kappa_ * bounds.error());
    limit = negligible_similarity(kappa_, weights.total(image), 0.99 * std::max(own, near), kRounding<T>);
  }

  double of(int64_t image, int64_t a, int64_t b) const {
    return std::min(limits_[image * grid_.tiles + a], limits_[image * grid_.tiles + b]);
  }

  TileBounds<T> bounds;

 private:
  TileGrid grid_;
  double kappa_;
  std::vector<double> limits_;
};

}  // namespace effops::pairwise
