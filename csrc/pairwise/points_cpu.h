// Points of all images of a call as frames (see tile_cpu_kernel.h), in an order that keeps neighbours
// together.
#pragma once

#include <vector>

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "pairwise_math.h"
#include "tile_cpu_kernel.h"

namespace effops::pairwise {

// Numbers in frames: [images][tiles][rows][64], not initialised.
template <typename T>
class Frames {
 public:
  Frames(int64_t images, int64_t tiles, int64_t rows)
      : tiles_(tiles), size_(rows * kTile), memory_(images * tiles * size_ * int64_t{sizeof(T)}) {}

  T* at(int64_t image, int64_t tile) const {
    return static_cast<T*>(memory_.at((image * tiles_ + tile) * size_ * int64_t{sizeof(T)}));
  }
  int64_t size() const { return size_; }  // of one frame

 private:
  int64_t tiles_, size_;
  Scratch memory_;
};

// How the points of every image are cut into tiles.
struct TileGrid {
  int64_t images, points, channels;
  int64_t tiles = divide_up(points, kTile);

  int64_t count(int64_t tile) const { return tile + 1 < tiles ? kTile : points - tile * kTile; }

  // Calls f(image, tile) for all tiles, on several threads.
  template <typename F>
  void for_tiles(const F& f) const {
    parallel_for(images * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i / tiles, i % tiles);
    });
  }
};

template <typename T>
class PointSet {
 public:
  // The rows [images, points, channels], normalised. `coherent`: put into an order in which points of a tile
  // are near each other, so that many pairs of tiles are far apart.
  PointSet(const TileGrid& grid, const T* rows, bool coherent);
  // The same of one image, whose points are the rows that `order` names.
  PointSet(const TileGrid& grid, const T* rows, std::vector<int32_t> order);

  const TileGrid& grid() const { return grid_; }
  // [channels + 1][64]: the points, and 1; zeros behind the last point.
  T* frame(int64_t image, int64_t tile) const { return frames_.at(image, tile); }
  // [64]: the norms the rows had.
  const T* norms(int64_t image, int64_t tile) const { return norms_.at(image, tile); }
  // Whether all numbers of the image are finite, and all its rows have a direction.
  bool finite(int64_t image) const { return finite_[image]; }
  bool unit(int64_t image) const { return unit_[image]; }

  // Which row is at a place.
  int64_t row_at(int64_t image, int64_t place) const {
    return order_[image].empty() ? place : order_[image][place];
  }
  // Copies rows of `rows` numbers, [points, rows] of one image, to a frame, and back. Zeros behind the last.
  void pack(const T* from, int64_t rows, int64_t image, int64_t tile, T* frame) const;
  void unpack(const T* frame, int64_t rows, int64_t image, int64_t tile, T* to) const;

 private:
  explicit PointSet(const TileGrid& grid);
  void load(const T* rows);
  void inspect();
  void normalize(int64_t image, int64_t tile);
  void arrange(int64_t image);

  TileGrid grid_;
  Frames<T> frames_, norms_;
  std::vector<std::vector<int32_t>> order_;  // of each image: the row at each place; empty: as given
  std::vector<char> finite_, unit_;
};

extern template class PointSet<float>;
extern template class PointSet<double>;

}  // namespace effops::pairwise
