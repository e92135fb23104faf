// All pairs of blocks of tiles, in rounds in which every block belongs to one pair only: both of a pair may
// be added to, without locks and in an order that does not depend on the number of threads.
#pragma once

#include <algorithm>

#include "points_cpu.h"

namespace effops::pairwise {

struct TileRange {
  int64_t begin, end;
};

// Blocks of tiles: few rounds, but enough pairs in each for many threads; small enough for the second-level
// cache.
inline int64_t tiles_per_block(int64_t tiles) { return std::clamp<int64_t>(divide_up(tiles, 32), 1, 4); }

inline TileRange tiles_of_block(int64_t block, int64_t size, int64_t tiles) {
  return {block * size, std::min((block + 1) * size, tiles)};
}

// Calls f(image, first, second) for all unordered pairs of blocks of each image, those of a block with itself
// (first = second) before all others.
template <typename F>
void for_block_pairs(const TileGrid& grid, const F& f) {
  const int64_t size = tiles_per_block(grid.tiles), blocks = divide_up(grid.tiles, size);
  const auto range = [&](int64_t block) { return tiles_of_block(block, size, grid.tiles); };
  parallel_for(grid.images * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / blocks, range(i % blocks), range(i % blocks));
  });
  // A tournament: all but the last stand in a circle that turns by one place a round, and those facing each
  // other meet. With an odd number of blocks the one that meets `blocks` has a rest.
  const int64_t circle = (blocks + 1) / 2 * 2 - 1, pairs = (circle + 1) / 2;
  for (int64_t round = 0; round < circle; ++round) {
    parallel_for(grid.images * pairs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t seat = i % pairs, a = seat == 0 ? circle : (round + seat) % circle;
        const int64_t b = (round + circle - seat) % circle;
        if (std::max(a, b) < blocks) f(i / pairs, range(std::min(a, b)), range(std::max(a, b)));
      }
    });
  }
}

// The same for all pairs of a tile of one set and a tile of another.
template <typename F>
void for_cross_pairs(int64_t images, int64_t tiles_a, int64_t tiles_b, const F& f) {
  const int64_t pairs = std::min(tiles_a, tiles_b), rounds = std::max(tiles_a, tiles_b);
  for (int64_t round = 0; round < rounds; ++round) {
    parallel_for(images * pairs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t one = i % pairs, other = (round + one) % rounds;
        if (tiles_a <= tiles_b)
          f(i / pairs, one, other);
        else
          f(i / pairs, other, one);
      }
    });
  }
}

}  // namespace effops::pairwise
