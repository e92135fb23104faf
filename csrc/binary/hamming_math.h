// Numbers and rules of Hamming search that CPU, CUDA and the simulator share.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace effops::binary {

constexpr int64_t kMaxBits = 4096;  // of a row

// Of a neighbour that does not exist.
constexpr int32_t kNoDistance = 0x7fffffff;
constexpr int64_t kNoIndex = -1;

// A neighbour as one number, so that the smaller one is the nearer or, at equal distance, the one of lower
// index. Indices have 32 bits.
using NeighbourKey = uint64_t;
constexpr NeighbourKey kNoNeighbour = ~NeighbourKey{0};

EFFOPS_HD NeighbourKey make_key(int32_t distance, int64_t index) {
  return static_cast<NeighbourKey>(distance) << 32 | static_cast<NeighbourKey>(index);
}
EFFOPS_HD int32_t distance_of(NeighbourKey key) {
  return key == kNoNeighbour ? kNoDistance : static_cast<int32_t>(key >> 32);
}
EFFOPS_HD int64_t index_of(NeighbourKey key) {
  return key == kNoNeighbour ? kNoIndex : static_cast<int64_t>(key & 0xffffffffu);
}

// Which nearest neighbours are matches.
struct MatchRule {
  bool has_ratio;
  double ratio;          // best < ratio * second, if there is a second
  int64_t max_distance;  // inclusive

  EFFOPS_HD bool accepts(int32_t best, int32_t second) const {
    if (best == kNoDistance || best > max_distance) return false;
    return !has_ratio || second == kNoDistance ||
           static_cast<double>(best) < ratio * static_cast<double>(second);
  }
};

}  // namespace effops::binary
