// See points_cpu.h.
#include "points_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace effops::pairwise {
namespace {

constexpr int64_t kPivots = kTile;
template <typename T>
constexpr double kLargest = std::numeric_limits<T>::max();

// Pivots in a chain: each is followed by the nearest one that is left. similarities: [64][64].
template <typename T>
std::vector<int32_t> chain_of(const T* similarities) {
  std::vector<int32_t> chain{0};
  std::vector<char> taken(kPivots, 0);
  taken[0] = 1;
  while (chain.size() < kPivots) {
    const T* row = similarities + chain.back() * kTile;
    int32_t best = -1;
    for (int32_t i = 0; i < kPivots; ++i) {
      if (!taken[i] && (best < 0 || row[i] > row[best])) best = i;
    }
    taken[best] = 1;
    chain.push_back(best);
  }
  return chain;
}

// Places sorted by key, equal ones in their order.
std::vector<int32_t> sorted_by(const std::vector<int32_t>& keys) {
  std::vector<int32_t> begin(kPivots + 1, 0), order(keys.size());
  for (const int32_t key : keys) ++begin[key + 1];
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  for (size_t i = 0; i < keys.size(); ++i) order[begin[keys[i]]++] = static_cast<int32_t>(i);
  return order;
}

template <typename T>
void similarities_of(const T* a, const T* b, int64_t channels, T* similarities) {
  tile_kernels<T>().product({a, 1, kTile, b, similarities, kTile, channels, false});
}

}  // namespace

template <typename T>
PointSet<T>::PointSet(const TileGrid& grid)
    : grid_(grid),
      frames_(grid.images, grid.tiles, grid.channels + 1),
      norms_(grid.images, grid.tiles, 1),
      order_(grid.images),
      finite_(grid.images, 1),
      unit_(grid.images, 1) {}

template <typename T>
PointSet<T>::PointSet(const TileGrid& grid, const T* rows, bool coherent) : PointSet(grid) {
  load(rows);
  inspect();
  if (!coherent || grid.tiles < 4) return;  // few pairs of tiles
  for (int64_t image = 0; image < grid.images; ++image) arrange(image);
  load(rows);
}

template <typename T>
PointSet<T>::PointSet(const TileGrid& grid, const T* rows, std::vector<int32_t> order) : PointSet(grid) {
  order_[0] = std::move(order);
  load(rows);
  inspect();
}

template <typename T>
void PointSet<T>::load(const T* rows) {
  grid_.for_tiles([&](int64_t image, int64_t tile) {
    pack(rows + image * grid_.points * grid_.channels, grid_.channels, image, tile, frame(image, tile));
    normalize(image, tile);
  });
}

template <typename T>
void PointSet<T>::inspect() {
  for (int64_t image = 0; image < grid_.images; ++image) {
    for (int64_t tile = 0; tile < grid_.tiles; ++tile) {
      for (int64_t l = 0; l < grid_.count(tile); ++l) {
        finite_[image] &= std::isfinite(norms(image, tile)[l]) ? 1 : 0;
        unit_[image] &= norms(image, tile)[l] >= T(kSmallestNorm) ? 1 : 0;
      }
    }
  }
}

template <typename T>
void PointSet<T>::normalize(int64_t image, int64_t tile) {
  T* const x = frame(image, tile);
  T* const norms = norms_.at(image, tile);
  const int64_t count = grid_.count(tile);
  double squares[kTile] = {}, scale[kTile];
  for (int64_t k = 0; k < grid_.channels; ++k) {
    for (int64_t l = 0; l < kTile; ++l)
      squares[l] += static_cast<double>(x[k * kTile + l]) * x[k * kTile + l];
  }
  for (int64_t l = 0; l < kTile; ++l) {
    const double norm = std::sqrt(squares[l]);
    // A finite norm stays finite: Inf would mean that a number of the row is infinite.
    norms[l] = static_cast<T>(std::isfinite(norm) ? std::min(norm, kLargest<T>) : norm);
    scale[l] = 1 / (norm < kSmallestNorm ? kSmallestNorm : norm);
  }
  for (int64_t k = 0; k < grid_.channels; ++k) {
    for (int64_t l = 0; l < kTile; ++l) x[k * kTile + l] = static_cast<T>(x[k * kTile + l] * scale[l]);
  }
  for (int64_t l = 0; l < kTile; ++l) x[grid_.channels * kTile + l] = l < count ? T(1) : T(0);
}

// Points are sorted by the nearest of some pivots, which are spread evenly over the rows.
template <typename T>
void PointSet<T>::arrange(int64_t image) {
  const int64_t channels = grid_.channels;
  Frames<T> pivots(1, 2, channels), similarities(1, 1, kTile);
  T *const found = pivots.at(0, 0), *const chained = pivots.at(0, 1), *const products = similarities.at(0, 0);
  for (int64_t i = 0; i < kPivots; ++i) {
    const int64_t at = (2 * i + 1) * grid_.points / (2 * kPivots);
    const T* from = frame(image, at / kTile) + at % kTile;
    for (int64_t k = 0; k < channels; ++k) found[k * kTile + i] = from[k * kTile];
  }
  similarities_of(found, found, channels, products);
  const std::vector<int32_t> chain = chain_of(products);
  for (int64_t k = 0; k < channels; ++k) {
    for (int64_t i = 0; i < kPivots; ++i) chained[k * kTile + i] = found[k * kTile + chain[i]];
  }
  std::vector<int32_t> keys(grid_.tiles * kTile);
  parallel_for(grid_.tiles, 1, [&](int64_t begin, int64_t end) {
    const Frames<T> own(1, 1, kTile);
    for (int64_t tile = begin; tile < end; ++tile) {
      similarities_of(chained, frame(image, tile), channels, own.at(0, 0));
      tile_kernels<T>().nearest(own.at(0, 0), kPivots, keys.data() + tile * kTile);
    }
  });
  keys.resize(grid_.points);
  order_[image] = sorted_by(keys);
}

template <typename T>
void PointSet<T>::pack(const T* from, int64_t rows, int64_t image, int64_t tile, T* frame) const {
  const int64_t first = tile * kTile, count = grid_.count(tile);
  for (int64_t l = 0; l < kTile; ++l) {
    if (l >= count) {
      for (int64_t k = 0; k < rows; ++k) frame[k * kTile + l] = 0;
      continue;
    }
    const T* row = from + row_at(image, first + l) * rows;
    for (int64_t k = 0; k < rows; ++k) frame[k * kTile + l] = row[k];
  }
}

template <typename T>
void PointSet<T>::unpack(const T* frame, int64_t rows, int64_t image, int64_t tile, T* to) const {
  const int64_t first = tile * kTile, count = grid_.count(tile);
  for (int64_t l = 0; l < count; ++l) {
    T* row = to + row_at(image, first + l) * rows;
    for (int64_t k = 0; k < rows; ++k) row[k] = frame[k * kTile + l];
  }
}

template class PointSet<float>;
template class PointSet<double>;

}  // namespace effops::pairwise
