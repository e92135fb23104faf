// The two sums over K x K neighbourhoods that all CUDA kernels here are made of, for a tile and a box of taps
// (neighborhood_tile.cuh): the dot products of a pixel with its neighbours, and the weighted sum of the
// neighbours. No torch, no launches.
#pragma once

#include "neighborhood_tile.cuh"

namespace effops::localfilter {

// Calls f(number of the tap in the box, its row and column in the halo, j) for the taps of this warp, which
// has every `warps`-th column of them, and the thread's pixels j. kTogether: rows of taps without a loop.
template <int kTogether = 2, typename F>
EFFOPS_DEVICE void for_own_taps(const Tiling& tiling, const Box& box, const F& f) {
  const TileThread thread;
  const int rows = box.rows, columns = box.columns, warps = tiling.warps;
  for (int column = thread.warp; column < columns; column += warps) {
#pragma unroll kTogether
    for (int row = 0; row < rows; ++row) {
#pragma unroll
      for (int j = 0; j < kLanePixels; ++j) {
        f(row * columns + column, thread.row + j + row, thread.column + column, j);
      }
    }
  }
}

// sums[tap][slot] (+)= centre . halo over kQuads quads, for the warp's own taps.
template <int kQuads, typename A>
EFFOPS_DEVICE void add_dots(const TileMemory<A>& memory, const Tiling& tiling, const Box& box, bool adds,
                            A* sums) {
  const TileThread thread;
  A centre[kQuads][kLanePixels][kQuadChannels];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
#pragma unroll
    for (int j = 0; j < kLanePixels; ++j) {
      const Quad<A> quad = memory.centres[q * kTilePixels + thread.slot(j)];
#pragma unroll
      for (int c = 0; c < kQuadChannels; ++c) centre[q][j][c] = quad.data[c];
    }
  }
  const int rows = box.rows, columns = box.columns, warps = tiling.warps;
  const int width = box.halo_columns(), halo_size = box.halo_rows() * width;
  for (int column = thread.warp; column < columns; column += warps) {
    const Quad<A>* halo = memory.halo + thread.row * width + thread.column + column;
    A* sum = sums + column * kTilePixels + thread.lane;
    Quad<A> near[kQuads][kLanePixels];  // what a tap reads for the thread's pixels
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
#pragma unroll
      for (int j = 1; j < kLanePixels; ++j) near[q][j] = halo[q * halo_size + (j - 1) * width];
    }
    halo += (kLanePixels - 1) * width;
#pragma unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
#pragma unroll
        for (int j = 1; j < kLanePixels; ++j) near[q][j - 1] = near[q][j];
        near[q][kLanePixels - 1] = halo[q * halo_size];
      }
#pragma unroll
      for (int j = 0; j < kLanePixels; ++j) {
        A total = adds ? sum[j * kWarpSize] : A(0);
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
#pragma unroll
          for (int c = 0; c < kQuadChannels; ++c) total += centre[q][j][c] * near[q][j].data[c];
        }
        sum[j * kWarpSize] = total;
      }
      halo += width;
      sum += columns * kTilePixels;
    }
  }
}

// sums[tap][slot] = sum over the channels of centre(pixel) * other(what the tap reads), for the taps that
// for_own_taps lists: a thread reads its own sums without a barrier. What is not read counts as zeros, which
// Inf * 0 tells from 0: callers look at Box::has.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE void dot_box(const Tiling& tiling, const Tile& tile, const Box& box,
                           const Maps<const T>& centres, const Maps<const T>& others,
                           const TileMemory<A>& memory, A* sums) {
  const TileThread thread;
  if (others.channels == 0) {
    for_own_taps(tiling, box,
                 [&](int tap, int, int, int j) { sums[tap * kTilePixels + thread.slot(j)] = A(0); });
  }
  constexpr int kMost = kDotQuads<A>;
  const int64_t quads = (others.channels + kQuadChannels - 1) / kQuadChannels;
  for (int64_t first = 0; first < quads; first += kMost) {
    const int count = quads - first < kMost ? static_cast<int>(quads - first) : kMost;
    __syncthreads();  // the last readers of the staged quads
    stage_centres<T>(centres, tile, first, count, memory.centres);
    stage_halo<T>(others, tiling, tile, box, first, count, memory.halo);
    __syncthreads();
    if (count == kMost) {
      add_dots<kMost>(memory, tiling, box, first > 0, sums);
    } else {
      add_dots<1>(memory, tiling, box, first > 0, sums);
    }
  }
}

// sums[j][c] += weights[tap][slot] * halo over every `step`-th column of taps; `halo` is of one quad.
template <typename A>
EFFOPS_DEVICE void add_weighted(const A* weights, const Quad<A>* halo, const Box& box, int first, int step,
                                A (&sums)[kLanePixels][kQuadChannels]) {
  const TileThread thread;
  const int rows = box.rows, columns = box.columns, width = box.halo_columns();
  for (int column = first; column < columns; column += step) {
    const Quad<A>* next = halo + thread.row * width + thread.column + column;
    const A* weight = weights + column * kTilePixels + thread.lane;
    Quad<A> near[kLanePixels];
#pragma unroll
    for (int j = 1; j < kLanePixels; ++j) near[j] = next[(j - 1) * width];
    next += (kLanePixels - 1) * width;
#pragma unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma unroll
      for (int j = 1; j < kLanePixels; ++j) near[j - 1] = near[j];
      near[kLanePixels - 1] = *next;
#pragma unroll
      for (int j = 0; j < kLanePixels; ++j) {
        const A w = weight[j * kWarpSize];
#pragma unroll
        for (int c = 0; c < kQuadChannels; ++c) sums[j][c] += w * near[j].data[c];
      }
      next += width;
      weight += columns * kTilePixels;
    }
  }
}

// Calls use(quad, slot, sum over the box's taps of weights[tap][slot] * maps(what the tap reads)) for the
// quads of the maps and all slots. The weights of taps that read nothing are zeros. Begins with a barrier,
// behind which the weights are whole, and ends when all threads have read them.
//
// A warp takes one quad, or a part of its columns of taps where there are more warps than quads; the parts
// are added in their order.
template <typename T, typename Use, typename A = accumulator_t<T>>
EFFOPS_DEVICE void mix_box(const Tiling& tiling, const Tile& tile, const Box& box, const Maps<const T>& maps,
                           const A* weights, Quad<A>* halo, const Use& use) {
  const TileThread thread;
  const int64_t quads = (maps.channels + kQuadChannels - 1) / kQuadChannels;
  for (int64_t first = 0; first < quads; first += tiling.quads) {
    const int count = quads - first < tiling.quads ? static_cast<int>(quads - first) : tiling.quads;
    const int parts = tiling.warps / count, part = thread.warp / count;
    __syncthreads();
    stage_halo<T>(maps, tiling, tile, box, first, count, halo);
    __syncthreads();
    A sums[kLanePixels][kQuadChannels] = {};
    if (part < parts) {
      const int quad = thread.warp - part * count;
      add_weighted(weights, halo + quad * box.halo_rows() * box.halo_columns(), box, part, parts, sums);
    }
    __syncthreads();  // the halo makes room
    if (part < parts) {
#pragma unroll
      for (int j = 0; j < kLanePixels; ++j) {
        Quad<A> sum;
#pragma unroll
        for (int c = 0; c < kQuadChannels; ++c) sum.data[c] = sums[j][c];
        halo[thread.warp * kTilePixels + thread.slot(j)] = sum;
      }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count * kTilePixels; i += tiling.warps * kWarpSize) {
      Quad<A> total = halo[i];
      for (int p = 1; p < parts; ++p) {
        const Quad<A> sum = halo[p * count * kTilePixels + i];
#pragma unroll
        for (int c = 0; c < kQuadChannels; ++c) total.data[c] += sum.data[c];
      }
      use(first + i / kTilePixels, i % kTilePixels, total);
    }
  }
}

// Where weighted sums go. Between the boxes of a tile they lie in `partial`, [N, quads, H, W], which is
// needed for more than one box.
template <typename T>
struct SumTarget {
  Maps<T> maps;
  Quad<accumulator_t<T>>* partial;
};

// Adds a box's sum to those before it, which are multiplied by `rescale`; the total of the last is multiplied
// by `factor` and rounded.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE void put_sum(const SumTarget<T>& target, const Tiling& tiling, const Tile& tile, const Box& box,
                           int64_t quad, int slot, Quad<A> sum, A rescale, A factor) {
  const int row = row_of_slot(slot), column = column_of_slot(slot);
  if (!tile.has(row, column)) return;
  const int64_t pixel = tile.pixel(row, column), channels = target.maps.channels;
  if (!box.is_first || !box.is_last) {
    const int64_t place = tile.image * ((channels + kQuadChannels - 1) / kQuadChannels) + quad;
    Quad<A>* partial = target.partial + place * (tiling.window.height * tiling.window.width) + pixel;
    if (!box.is_first) {
      const Quad<A> before = *partial;
#pragma unroll
      for (int c = 0; c < kQuadChannels; ++c) sum.data[c] += before.data[c] * rescale;
    }
    if (!box.is_last) {
      *partial = sum;
      return;
    }
  }
  T* out = target.maps.at(tile.image, pixel, quad * kQuadChannels);
#pragma unroll
  for (int c = 0; c < kQuadChannels; ++c) {
    if (quad * kQuadChannels + c < channels) {
      out[c * target.maps.channel_stride] = narrow<T>(sum.data[c] * factor);
    }
  }
}

}  // namespace effops::localfilter
