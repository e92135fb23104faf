// Which pairs of tiles are too far apart to matter, from the centre and the radius of each.
#pragma once

#include "points_cpu.h"

namespace effops::pairwise {

template <typename T>
class TileBounds {
 public:
  explicit TileBounds(const TileGrid& grid)
      : grid_(grid),
        error_(dot_error<T>(grid.channels)),
        centers_(grid.images, grid.tiles, divide_up(grid.channels, kTile)),
        cos_radius_(grid.images * grid.tiles) {}

  // Of a tile of points, [channels][64].
  void set(int64_t image, int64_t tile, const T* frame) {
    cos_radius_[image * grid_.tiles + tile] =
        tile_kernels<T>().center(frame, grid_.channels, grid_.count(tile), centers_.at(image, tile));
  }

  // Whether no similarity of points of the two tiles is above `limit`.
  bool apart(int64_t image, int64_t a, const T* frame_a, int64_t b, const T* frame_b, double limit) const {
    return limit > -1 && (bound(image, a, frame_b) <= limit || bound(image, b, frame_a) <= limit);
  }

  // The same of similarities [64][64] that were computed.
  bool apart(const T* similarities, double limit) const {
    return limit > -1 && tile_kernels<T>().largest(similarities, kTile * kTile) + error_ <= limit;
  }

  double cos_radius(int64_t image, int64_t tile) const { return cos_radius_[image * grid_.tiles + tile]; }
  double error() const { return error_; }

 private:
  double bound(int64_t image, int64_t tile, const T* other_frame) const {
    const double reach = tile_kernels<T>().reach(centers_.at(image, tile), other_frame, grid_.channels);
    return similarity_bound(reach, cos_radius(image, tile), error_);
  }

  TileGrid grid_;
  double error_;
  Frames<T> centers_;
  std::vector<double> cos_radius_;
};

}  // namespace effops::pairwise
