// Tiles of pixels and of the pixels around them, for the CUDA kernels over K x K neighbourhoods of maps.
// No torch, no launches.
//
// The taps of a pixel lie on its lattice: the pixels whose distance is a multiple of the dilation along both
// axes. A block owns a tile of 8 x 16 pixels of one lattice, so that the pixels which the tile's taps read,
// its halo, lie densely whatever the dilation is: 8 + K - 1 rows and 16 + K - 1 columns. It is staged in
// shared memory four channels (a quad) wide. Each warp covers the whole tile: a lane owns four pixels, one
// below the other, and reads each place of the halo for all four of them at once. Windows whose sums per tap
// do not fit into shared memory are taken in boxes of taps, one after the other.
#pragma once

#include "../common/warp.h"
#include "window_math.h"

namespace effops::localfilter {

constexpr int kTileRows = 8, kTileColumns = 16, kTilePixels = kTileRows * kTileColumns;
constexpr int kLanePixels = kTilePixels / kWarpSize;  // of a lane, one below the other
constexpr int kQuadChannels = 4;
constexpr int kMaxBoxColumns = 32;  // of taps

// Quads of a dot product that a thread keeps in registers, and warps of a block.
template <typename A>
constexpr int kDotQuads = sizeof(A) == 8 ? 1 : 2;
template <typename A>
constexpr int kMaxTileWarps = sizeof(A) == 8 ? 5 : 9;
template <typename A>
constexpr int kMaxTileThreads = kMaxTileWarps<A> * kWarpSize;

// Blocks that a multiprocessor is to hold, for __launch_bounds__: what the shared memory has room for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kTileBlocks = 1;
#else
constexpr int kTileBlocks = 2;
#endif

template <typename A>
struct alignas(16) Quad {
  A data[kQuadChannels];
};

// Maps [N, C, H, W], channels first or last.
template <typename T>
struct Maps {
  T* data;
  int64_t channels;
  int64_t image_stride, channel_stride, pixel_stride;
  bool has_quads;  // the channels of a pixel lie together, and each quad aligned

  EFFOPS_DEVICE T* at(int64_t image, int64_t pixel, int64_t channel) const {
    return data + image * image_stride + pixel * pixel_stride + channel * channel_stride;
  }
};

inline int64_t quads_in(int64_t channels) { return (channels + kQuadChannels - 1) / kQuadChannels; }

// How the pixels are dealt to blocks, and the windows to boxes of taps.
struct Tiling {
  Window window;
  int64_t before;                  // taps before the centre, along an axis
  int64_t lattices_y, lattices_x;  // of an image
  int64_t tiles_y, tiles_x;        // of a lattice
  int64_t works;                   // tiles of all images
  int32_t box_rows, box_columns;   // of taps, at most
  int32_t warps;                   // of a block
  int32_t quads;                   // staged at once, at most
  int32_t halo_elements, centre_elements, plane_elements;  // accumulators in shared memory
  int64_t shared_bytes;
  bool has_one_box;  // per tile, of the taps that read the image

  int threads() const { return warps * kWarpSize; }
};

// What a kernel keeps in shared memory besides the halo.
struct TileNeeds {
  int planes;         // numbers per tap and pixel
  bool has_centres;   // the tile's pixels themselves, for dot products
  int warp_lines;     // numbers per warp and pixel of the tile
  int tile_lines;     // numbers per pixel of the tile
  int halo_lines;     // numbers per place of the halo
};

// ---------------------------------------------------------------------------------------------- device

// A tile. Rows and columns count on its lattice, from its first pixel on.
struct Tile {
  int64_t image;
  int64_t origin;                 // the first pixel, as y * width + x
  int64_t row_step, column_step;  // pixels
  int64_t above, left;            // rows and columns of the lattice before the tile
  int64_t below, right;           // and from its first on; <= 0: the tile lies outside
  int64_t tap_row, tap_row_end, tap_column, tap_column_end;  // the taps to be taken
  int64_t boxes_across, boxes;

  EFFOPS_DEVICE bool is_empty() const { return below <= 0 || right <= 0; }
  EFFOPS_DEVICE bool has(int row, int column) const { return row < below && column < right; }
  EFFOPS_DEVICE int64_t pixel(int row, int column) const {
    return origin + row * row_step + column * column_step;
  }
};

// Lattices are innermost: tiles that share cache lines are worked on at one time. all_taps: also those that
// read the image for no pixel of the tile. The centres read it, so that there is a box in any case.
EFFOPS_DEVICE Tile make_tile(const Tiling& tiling, int64_t work, bool all_taps) {
  const Window& w = tiling.window;
  const int64_t x = work % tiling.lattices_x, after_x = work / tiling.lattices_x;
  const int64_t tile_x = after_x % tiling.tiles_x, line = after_x / tiling.tiles_x;
  const int64_t y = line % tiling.lattices_y, after_y = line / tiling.lattices_y;
  const int64_t tile_y = after_y % tiling.tiles_y;
  Tile tile;
  tile.image = after_y / tiling.tiles_y;
  tile.above = tile_y * kTileRows;
  tile.left = tile_x * kTileColumns;
  tile.below = (w.height - y + w.dilation - 1) / w.dilation - tile.above;
  tile.right = (w.width - x + w.dilation - 1) / w.dilation - tile.left;
  tile.origin = (y + tile.above * w.dilation) * w.width + x + tile.left * w.dilation;
  tile.row_step = w.dilation * w.width;
  tile.column_step = w.dilation;
  const auto first = [&](int64_t before, int64_t size, int64_t most) {
    const int64_t tap = tiling.before - before - ((size < most ? size : most) - 1);
    return all_taps || tap < 0 ? 0 : tap;
  };
  const auto end = [&](int64_t size) {
    const int64_t tap = tiling.before + size;
    return all_taps || tap > w.kernel ? w.kernel : tap;
  };
  tile.tap_row = first(tile.above, tile.below, kTileRows);
  tile.tap_row_end = end(tile.below);
  tile.tap_column = first(tile.left, tile.right, kTileColumns);
  tile.tap_column_end = end(tile.right);
  tile.boxes_across = (tile.tap_column_end - tile.tap_column + tiling.box_columns - 1) / tiling.box_columns;
  tile.boxes = (tile.tap_row_end - tile.tap_row + tiling.box_rows - 1) / tiling.box_rows * tile.boxes_across;
  return tile;
}

// A rectangle of the window, and the halo that it reads. Place (row, column) of the halo is what tap (i, j)
// of the box reads for pixel (row - i, column - j) of the tile.
struct Box {
  int64_t tap_row, tap_column;       // first ones
  int32_t rows, columns;             // of taps
  int32_t top, bottom, left, right;  // the part of the halo inside the image: top <= row < bottom
  int64_t origin, row_step, column_step;
  bool is_first, is_last;  // of the tile

  EFFOPS_DEVICE int halo_rows() const { return rows + kTileRows - 1; }
  EFFOPS_DEVICE int halo_columns() const { return columns + kTileColumns - 1; }
  EFFOPS_DEVICE bool has(int row, int column) const {
    return row >= top && row < bottom && column >= left && column < right;
  }
  EFFOPS_DEVICE int64_t pixel(int row, int column) const {
    return origin + row * row_step + column * column_step;
  }
};

EFFOPS_DEVICE int32_t clamped(int64_t value, int32_t end) {
  return value < 0 ? 0 : value < end ? static_cast<int32_t>(value) : end;
}

EFFOPS_DEVICE Box make_box(const Tiling& tiling, const Tile& tile, int64_t i) {
  const int64_t line = i / tile.boxes_across;
  Box box;
  box.tap_row = tile.tap_row + line * tiling.box_rows;
  box.tap_column = tile.tap_column + (i - line * tile.boxes_across) * tiling.box_columns;
  box.rows = clamped(tile.tap_row_end - box.tap_row, tiling.box_rows);
  box.columns = clamped(tile.tap_column_end - box.tap_column, tiling.box_columns);
  const int64_t row = box.tap_row - tiling.before, column = box.tap_column - tiling.before;
  box.top = clamped(-tile.above - row, box.halo_rows());
  box.bottom = clamped(tile.below - row, box.halo_rows());
  box.left = clamped(-tile.left - column, box.halo_columns());
  box.right = clamped(tile.right - column, box.halo_columns());
  box.origin = tile.origin + row * tile.row_step + column * tile.column_step;
  box.row_step = tile.row_step;
  box.column_step = tile.column_step;
  box.is_first = i == 0;
  box.is_last = i + 1 == tile.boxes;
  return box;
}

// Where a block is. In shared memory: registers are for sums.
struct alignas(16) BlockPlace {
  Tile tile;
  Box box;
};

// Both begin with a barrier behind the last readers of shared memory, and end with one.
EFFOPS_DEVICE void enter_tile(const Tiling& tiling, int64_t work, bool all_taps, BlockPlace& place) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const Tile tile = make_tile(tiling, work, all_taps);
    place.tile = tile;
  }
  __syncthreads();
}
EFFOPS_DEVICE void enter_box(const Tiling& tiling, int64_t i, BlockPlace& place) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const Box box = make_box(tiling, place.tile, i);
    place.box = box;
  }
  __syncthreads();
}

// The thread within its block. Its pixels are (row, column), ..., (row + 3, column) of the tile; the numbers
// of pixel j lie at slot(j) of a line of kTilePixels.
struct TileThread {
  int warp, lane, row, column;

  EFFOPS_DEVICE TileThread()
      : warp(static_cast<int>(threadIdx.x) / kWarpSize),
        lane(static_cast<int>(threadIdx.x) % kWarpSize),
        row(lane / kTileColumns * kLanePixels),
        column(lane % kTileColumns) {}

  EFFOPS_DEVICE int slot(int j) const { return j * kWarpSize + lane; }
};

EFFOPS_DEVICE int row_of_slot(int slot) {
  return slot % kWarpSize / kTileColumns * kLanePixels + slot / kWarpSize;
}
EFFOPS_DEVICE int column_of_slot(int slot) { return slot % kTileColumns; }

// The dynamic shared memory of a block.
template <typename A>
struct TileMemory {
  BlockPlace* place;
  Quad<A>* halo;  // later the parts of weighted sums
  Quad<A>* centres;
  A* plane[2];  // [taps of a box, kTilePixels]
  A* lines;     // the rest

  EFFOPS_DEVICE TileMemory(const Tiling& tiling, BlockPlace* shared, int planes) : place(shared) {
    A* numbers = reinterpret_cast<A*>(shared + 1);
    halo = reinterpret_cast<Quad<A>*>(numbers);
    centres = reinterpret_cast<Quad<A>*>(numbers + tiling.halo_elements);
    plane[0] = numbers + tiling.halo_elements + tiling.centre_elements;
    plane[1] = plane[0] + tiling.plane_elements;
    lines = plane[0] + planes * tiling.plane_elements;
  }
};

// Four channels of a pixel, zeros for those past the last; or all zeros where there is no such pixel. Reads
// something in any case, so that a thread's loads do not wait for each other.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE Quad<A> load_quad(const Maps<const T>& maps, int64_t image, bool exists, int64_t pixel,
                                int64_t channel) {
  const T* data = maps.at(image, exists ? pixel : 0, channel);
  Quad<A> quad;
  if (maps.has_quads) {
    constexpr int kPack = kPackSize<T> < kQuadChannels ? kPackSize<T> : kQuadChannels;
#pragma unroll
    for (int i = 0; i < kQuadChannels; i += kPack) {
      A values[kPack];
      widen_pack(load_pack<kPack>(data + i), values);
#pragma unroll
      for (int c = 0; c < kPack; ++c) quad.data[i + c] = exists ? values[c] : A(0);
    }
  } else {
#pragma unroll
    for (int c = 0; c < kQuadChannels; ++c) {
      const bool has_channel = channel + c < maps.channels;
      const A value = widen(load_pack<1>(data + (has_channel ? c * maps.channel_stride : 0)).data[0]);
      quad.data[c] = exists && has_channel ? value : A(0);
    }
  }
  return quad;
}

// halo[quad][row][column], for `quads` quads from `first` on. The maps have channels.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE void stage_halo(const Maps<const T>& maps, const Tiling& tiling, const Tile& tile,
                              const Box& box, int64_t first, int quads, Quad<A>* halo) {
  constexpr int kTogether = 3;  // lines whose loads are in flight at one time
  const TileThread thread;
  const int rows = box.halo_rows(), columns = box.halo_columns(), lines = quads * rows;
  for (int begin = thread.warp; begin < lines; begin += kTogether * tiling.warps) {
    for (int column = thread.lane; column < columns; column += kWarpSize) {
      Quad<A> values[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int next = begin + i * tiling.warps, line = next < lines ? next : lines - 1;
        const int quad = line / rows, row = line - quad * rows;
        const bool exists = box.has(row, column);
        values[i] = load_quad<T>(maps, tile.image, exists, exists ? box.pixel(row, column) : 0,
                                 (first + quad) * kQuadChannels);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int line = begin + i * tiling.warps;
        if (line < lines) halo[line * columns + column] = values[i];
      }
    }
  }
}

// centres[quad][slot], likewise.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE void stage_centres(const Maps<const T>& maps, const Tile& tile, int64_t first, int quads,
                                 Quad<A>* centres) {
  for (int i = static_cast<int>(threadIdx.x); i < quads * kTilePixels; i += static_cast<int>(blockDim.x)) {
    const int slot = i % kTilePixels, row = row_of_slot(slot), column = column_of_slot(slot);
    const bool exists = tile.has(row, column);
    const Quad<A> value = load_quad<T>(maps, tile.image, exists, exists ? tile.pixel(row, column) : 0,
                                       (first + i / kTilePixels) * kQuadChannels);
    centres[i] = value;
  }
}

// ------------------------------------------------------------------------------------------------ host

// Warps share the columns of a box. Rounds of at most `most` columns are made equal; seven warps would find
// nothing to share where four quads are staged.
inline int32_t tile_warps(int64_t box_columns, int32_t most) {
  const int64_t rounds = (box_columns + most - 1) / most;
  const auto warps = static_cast<int32_t>((box_columns + rounds - 1) / rounds);
  return warps < 2 ? 2 : warps == 7 ? 8 : warps;
}

// So many that the warps divide by them: one quad per warp, or several warps that share a quad's taps.
inline int32_t tile_quads(int32_t warps) { return warps == 9 || warps == 6 ? 3 : warps == 8 ? 4 : warps; }

// Fills in what depends on the size of a box.
template <typename A>
void set_box(Tiling& tiling, const TileNeeds& needs, int32_t rows, int32_t columns) {
  tiling.box_rows = rows;
  tiling.box_columns = columns;
  tiling.warps = tile_warps(columns, kMaxTileWarps<A>);
  tiling.quads = tile_quads(tiling.warps);
  const int32_t places = (rows + kTileRows - 1) * (columns + kTileColumns - 1);
  const int32_t halo = tiling.quads * places, parts = tiling.warps * kTilePixels;
  tiling.halo_elements = kQuadChannels * (halo > parts ? halo : parts);
  tiling.centre_elements = needs.has_centres ? kQuadChannels * kDotQuads<A> * kTilePixels : 0;
  tiling.plane_elements = rows * columns * kTilePixels;
  const int64_t lines = kTilePixels * (needs.warp_lines * tiling.warps + needs.tile_lines);
  const int64_t elements = tiling.halo_elements + tiling.centre_elements +
                           int64_t{needs.planes} * tiling.plane_elements + lines + needs.halo_lines * places;
  tiling.shared_bytes = static_cast<int64_t>(sizeof(BlockPlace) + sizeof(A) * elements);
}

// mirrored: the taps around a pixel that the taps of the window reach it from. budget: bytes of shared
// memory, at least 48 KiB.
template <typename A>
Tiling make_tiling(const Window& window, int64_t batch, bool mirrored, const TileNeeds& needs,
                   int64_t budget) {
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  Tiling tiling{};
  tiling.window = window;
  tiling.before = mirrored ? window.kernel - 1 - window.kernel / 2 : window.kernel / 2;
  tiling.lattices_y = window.dilation < window.height ? window.dilation : window.height;
  tiling.lattices_x = window.dilation < window.width ? window.dilation : window.width;
  const int64_t height = parts(window.height, window.dilation), width = parts(window.width, window.dilation);
  tiling.tiles_y = parts(height, kTileRows);
  tiling.tiles_x = parts(width, kTileColumns);
  tiling.works = batch * tiling.lattices_y * tiling.lattices_x * tiling.tiles_y * tiling.tiles_x;
  // Taps beyond read nothing in any tile.
  const auto useful = [&](int64_t side, int64_t tile) {
    return side + tile - 1 < window.kernel ? side + tile - 1 : window.kernel;
  };
  const int64_t rows = useful(height, kTileRows), columns = useful(width, kTileColumns);
  int64_t box_columns = parts(columns, parts(columns, kMaxBoxColumns));
  for (;; box_columns = parts(box_columns, 2)) {
    const auto fits = [&](int64_t box_rows) {
      set_box<A>(tiling, needs, static_cast<int32_t>(box_rows), static_cast<int32_t>(box_columns));
      return tiling.shared_bytes <= budget;
    };
    if (!fits(1) && box_columns > 1) continue;
    int64_t box_rows = 1;
    while (box_rows < rows && fits(box_rows + 1)) ++box_rows;
    fits(parts(rows, parts(rows, box_rows)));  // boxes of equal height
    tiling.has_one_box = box_rows == rows && box_columns == columns;
    return tiling;
  }
}

}  // namespace effops::localfilter
