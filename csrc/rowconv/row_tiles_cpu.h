// How products of rows are cut into tiles of rows and panels of columns. Included by ISA files only.
#pragma once

#include "../common/simd.h"

namespace effops::rowconv {
namespace {

using namespace effops::simd;

// Of the depth: a piece of a panel is read by all tiles before the next piece, from the first-level cache.
constexpr int64_t kDepthPiece = 128;

// Tiles of rows x registers that leave registers for a row of the panel and one broadcast.
#if defined(__AVX512F__)
constexpr int kMaxRegisters = 4;
constexpr int tile_rows(int registers) { return registers == 4 ? 6 : 8; }
#else
constexpr int kMaxRegisters = 2;
constexpr int tile_rows(int registers) { return registers == 2 ? 6 : 8; }
#endif

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f(Count<registers>, first column) for panels of at most kMaxRegisters registers.
template <int kLanes, typename F>
EFFOPS_INLINE void for_panels(int64_t columns, const F& f) {
  int64_t column = 0;
  for (; columns - column >= kMaxRegisters * kLanes; column += kMaxRegisters * kLanes) {
    f(Count<kMaxRegisters>{}, column);
  }
  if constexpr (kMaxRegisters > 2) {
    if (columns - column >= 3 * kLanes) return f(Count<3>{}, column);
    if (columns - column >= 2 * kLanes) return f(Count<2>{}, column);
  }
  if (columns > column) f(Count<1>{}, column);
}

// Calls f(Count<rows>, first) for tiles of `most` rows and what is left in halves.
template <int kMost, typename F>
EFFOPS_INLINE void for_tiles(int64_t count, const F& f) {
  int64_t first = 0;
  for (; count - first >= kMost; first += kMost) f(Count<kMost>{}, first);
  if (count - first >= 4) {
    f(Count<4>{}, first);
    first += 4;
  }
  if (count - first >= 2) {
    f(Count<2>{}, first);
    first += 2;
  }
  if (count > first) f(Count<1>{}, first);
}

}  // namespace
}  // namespace effops::rowconv
