// Which tile pairs pairwise_embedding_loss multiplies, and how: on tensor cores or by plain instructions. No
// torch, no launches.
#pragma once

#include <algorithm>

#include "loss_points_kernels.cuh"

namespace effops::pairwise {

// A tile of rows and a part of the tiles of columns of its image.
struct LossWork {
  int64_t row_tile;      // of all images
  int64_t first_column;  // tile of all images, the image's first
  int32_t begin, end;    // columns of the image
  int64_t slot;          // (split * B + image) * tiles + row: where partial results go
};

struct LossTiling {
  int64_t batch;
  int32_t tiles, splits;  // of an image; of its columns

  EFFOPS_HD int64_t works() const { return batch * tiles * splits; }

  EFFOPS_DEVICE LossWork work(int64_t index) const {
    const int32_t split = static_cast<int32_t>(index % splits);
    const int64_t row_tile = index / splits;
    const int32_t part = (tiles + splits - 1) / splits;
    const int32_t begin = min(split * part, tiles);
    return {row_tile, row_tile / tiles * tiles, begin, min(begin + part, tiles),
            split * batch * tiles + row_tile};
  }
};

constexpr int64_t kEnoughWorks = 256;  // about two blocks for each multiprocessor of a large device
constexpr int64_t kMaxSplits = 8;

// Of the shape alone: results are the same on all devices.
inline LossTiling make_loss_tiling(int64_t batch, int32_t tiles) {
  const int64_t rows = std::max<int64_t>(batch * tiles, 1);
  const int64_t splits = std::min<int64_t>({(kEnoughWorks + rows - 1) / rows, kMaxSplits, tiles});
  return {batch, tiles, static_cast<int32_t>(std::max<int64_t>(splits, 1))};
}

// The columns of a piece of work whose pairs have to be computed.
class ColumnTiles {
 public:
  EFFOPS_DEVICE ColumnTiles(const TileInfo* info, const LossWork& work)
      : row_(info[work.row_tile]), columns_(info + work.first_column), end_(work.end) {}

  // The first of them from `tile` on, or the end.
  EFFOPS_DEVICE int32_t from(int32_t tile) const {
    while (tile < end_ && (columns_[tile].is_empty() || row_.is_closed_with(columns_[tile]))) ++tile;
    return tile;
  }
  EFFOPS_DEVICE int32_t end() const { return end_; }
  EFFOPS_DEVICE bool has_rows() const { return !row_.is_empty(); }

 private:
  TileInfo row_;
  const TileInfo* columns_;
  int32_t end_;
};

// Sizes, without the memory. Engine: below.
template <typename Engine>
LossPoints<typename Engine::A> make_loss_points(int64_t batch, int64_t points, int64_t channels) {
  LossPoints<typename Engine::A> result{};
  result.batch = batch;
  result.points = points;
  result.channels = static_cast<int32_t>(channels);
  result.pitch = Engine::pitch(channels);
  result.tiles = static_cast<int32_t>(divide_up(points, kTilePoints));
  return result;
}

// Engines: open(work, first tile), then multiply(next tile) for each tile in turn, which leaves dots[i][j] of
// row(i) and column(j); tags() are the tile's until the next call. Sums of coefficients times columns, per
// row: begin_sums(), add() after each multiply(), store(). All threads of the block take part.

// Split float32 on tensor cores, from shared memory: the rows, and two tiles of columns of which one is
// copied while the other is multiplied.
class SplitPairs : public SplitEngine {
 public:
  using A = float;
  using Sums = SplitColumnSums;
  static constexpr bool kNative = kHasHalfMma, kSplit = true;
  static constexpr int kBlocks = 3;
  static int32_t pitch(int64_t channels) { return static_cast<int32_t>(round_up(channels, kSplitDepth)); }
  static int64_t shared_bytes(int32_t pitch) {
    return kTilePoints * split_elements(pitch) * int64_t{sizeof(bf16)} * 3 + 2 * int64_t{sizeof(TileTags<A>)};
  }

  EFFOPS_DEVICE SplitPairs(const LossPoints<A>& points, unsigned char* shared)
      : SplitEngine(threadIdx.x),
        points_(points),
        size_(kTilePoints * split_elements(points.pitch)),
        rows_(reinterpret_cast<bf16*>(shared)),
        tags_(reinterpret_cast<TileTags<A>*>(rows_ + 3 * size_)) {}

  EFFOPS_DEVICE void open(const LossWork& work, int32_t tile) {
    work_ = work;
    stage_ = 1;
    __syncthreads();  // the work before is done
    copy(rows_, points_.split_rows(work.row_tile), size_ * int32_t{sizeof(bf16)});
    start(tile);
  }

  EFFOPS_DEVICE void multiply(int32_t next, A (&dots)[kM][kN]) {
    stage_ = 1 - stage_;
    copies_.wait<0>();
    __syncthreads();  // the tile is there for all, and the one before has been read
    start(next);
    SplitEngine::multiply(rows_, columns(), points_.channels, points_.pitch, dots);
  }

  EFFOPS_DEVICE const TileTags<A>& tags() const { return tags_[stage_]; }

  EFFOPS_DEVICE Sums begin_sums(A*) const { return {}; }
  EFFOPS_DEVICE void add(Sums& sums, const A (&coefficients)[kM][kN]) const {
    sums.add(*this, columns(), points_.channels, points_.pitch, coefficients);
  }
  EFFOPS_DEVICE void store(const Sums& sums, A* rows) const {
    sums.store(*this, points_.channels, points_.pitch, rows);
  }

 private:
  EFFOPS_DEVICE const bf16* columns() const { return rows_ + (1 + stage_) * size_; }

  // Into the other stage.
  EFFOPS_DEVICE void start(int32_t tile) {
    if (tile < work_.end) {
      const int64_t from = work_.first_column + tile;
      copy(rows_ + (2 - stage_) * size_, points_.split_rows(from), size_ * int32_t{sizeof(bf16)});
      copy(tags_ + (1 - stage_), points_.tags + from, sizeof(TileTags<A>));
    }
    copies_.close_group();
  }

  EFFOPS_DEVICE void copy(void* target, const void* source, int32_t bytes) {
    for (int32_t at = static_cast<int32_t>(threadIdx.x) * 16; at < bytes; at += kThreads * 16) {
      copies_.start(static_cast<unsigned char*>(target) + at, static_cast<const unsigned char*>(source) + at,
                    true);
    }
  }

  const LossPoints<A>& points_;
  int32_t size_;  // elements of a tile
  bf16* rows_;
  TileTags<A>* tags_;
  LossWork work_;
  int stage_ = 0;
  AsyncCopies copies_;
};

// By plain instructions, any number of channels. Sums are kept in device memory: they are fetched and put
// back once per tile of columns, for 64 multiplications each.
template <typename T>
class PlainPairs : public ScalarEngine<T> {
 public:
  using A = T;
  using Engine = ScalarEngine<A>;
  static constexpr bool kNative = true, kSplit = false;
  using Engine::kM, Engine::kN, Engine::kThreads;
  static constexpr int kRowLanes = 16;
  static constexpr int kPack = kPackSize<A>;
  static constexpr int kSliceDepth = 16 * kPack;  // channels whose sums are made at one time
  static constexpr int kCoefficientPitch = kTilePoints + kPack;  // elements of a row
  struct Shared {
    union {
      ScalarStages<A> stages;
      alignas(16) A slice[kTilePoints * kSliceDepth];
    };
    alignas(16) A coefficients[kTilePoints * kCoefficientPitch];
  };
  struct Sums {
    A* rows;  // of the pitch of the points
  };
  static int32_t pitch(int64_t channels) { return static_cast<int32_t>(round_up(channels, kStageDepth<A>)); }
  static int64_t shared_bytes(int32_t) { return sizeof(Shared); }

  EFFOPS_DEVICE PlainPairs(const LossPoints<A>& points, unsigned char* shared)
      : Engine(threadIdx.x), points_(points), shared_(*reinterpret_cast<Shared*>(shared)) {}

  EFFOPS_DEVICE void open(const LossWork& work, int32_t tile) {
    row_tile_ = work.row_tile;
    first_column_ = work.first_column;
    next_ = tile;
  }

  EFFOPS_DEVICE void multiply(int32_t next, A (&dots)[kM][kN]) {
    tile_ = first_column_ + next_;
    next_ = next;
    multiply_tile<A>(*this, points_.plain_rows(row_tile_), points_.plain_rows(tile_), points_.pitch,
                     shared_.stages, dots);
  }

  EFFOPS_DEVICE const TileTags<A>& tags() const { return points_.tags[tile_]; }

  EFFOPS_DEVICE Sums begin_sums(A* rows) const {
    for (int32_t d = own_channel(); d < points_.pitch; d += kSliceDepth) {
#pragma unroll
      for (int i = 0; i < kM; ++i) at(rows, i, d) = {};
    }
    return {rows};
  }

  EFFOPS_DEVICE void add(Sums& sums, const A (&coefficients)[kM][kN]) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        shared_.coefficients[this->row(i) * kCoefficientPitch + this->column(j)] = coefficients[i][j];
      }
    }
    for (int32_t d = 0; d < points_.pitch; d += kSliceDepth) {
      __syncthreads();  // what has been in the place of the slice has been read
      load_slice(d);
      __syncthreads();
      if (d + own_channel() < points_.pitch) add_slice(sums.rows, d + own_channel());
    }
  }

  EFFOPS_DEVICE void store(const Sums&, A*) const {}

 private:
  using Quad = Pack<A, kPack>;

  EFFOPS_DEVICE int32_t own_channel() const { return this->x * kPack; }
  EFFOPS_DEVICE Quad& at(A* rows, int i, int32_t channel) const {
    return *reinterpret_cast<Quad*>(rows + int64_t{this->row(i)} * points_.pitch + channel);
  }

  EFFOPS_DEVICE void load_slice(int32_t first_channel) const {
    constexpr int kChunks = kSliceDepth / kPack;  // of a column
    const A* columns = points_.plain_rows(tile_);
    AsyncCopies copies;
    for (int i = static_cast<int>(threadIdx.x); i < kTilePoints * kChunks; i += kThreads) {
      const int32_t channel = first_channel + i % kChunks * kPack;
      const bool exists = channel < points_.pitch;
      copies.start(shared_.slice + i * kPack,
                   columns + int64_t{i / kChunks} * points_.pitch + (exists ? channel : 0), exists);
    }
    copies.close_group();
    copies.wait<0>();
  }

  EFFOPS_DEVICE void add_slice(A* rows, int32_t channel) const {
    Quad totals[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) totals[i] = at(rows, i, channel);
#pragma unroll 1
    for (int column = 0; column < kTilePoints; column += kPack) {
      Quad values[kPack];
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        values[k] =
            *reinterpret_cast<const Quad*>(shared_.slice + (column + k) * kSliceDepth + own_channel());
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        const Quad factors =
            *reinterpret_cast<const Quad*>(shared_.coefficients + this->row(i) * kCoefficientPitch + column);
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
#pragma unroll
          for (int e = 0; e < kPack; ++e) totals[i].data[e] += factors.data[k] * values[k].data[e];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kM; ++i) at(rows, i, channel) = totals[i];
  }

  const LossPoints<A>& points_;
  Shared& shared_;
  int64_t row_tile_ = 0, first_column_ = 0, tile_ = 0;
  int32_t next_ = 0;
};

}  // namespace effops::pairwise
