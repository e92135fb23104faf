// Gathering of the operands of row_gemm_kernels.cuh into shared memory. No torch, no launches.
#pragma once

#include "row_gemm.cuh"
#include "row_tile.cuh"

namespace effops::rowconv {

constexpr int kGemmStages = 3;
constexpr int kMostSkippedTaps = 1024;

// What a block makes.
struct GemmWork {
  int64_t first_row, end_row;
  int32_t group, first_column;
};

struct GemmTiling {
  int64_t column_tiles, works;

  template <typename Engine, typename T>
  EFFOPS_DEVICE GemmWork work(const RowGemm<T>& gemm, int64_t index) const {
    const int64_t rest = index / column_tiles, first_row = rest / gemm.groups * Engine::kRows;
    return {first_row, min(first_row + Engine::kRows, gemm.existing_rows()),
            static_cast<int32_t>(rest % gemm.groups),
            static_cast<int32_t>(index % column_tiles * Engine::kColumns)};
  }
};

template <typename Engine>
GemmTiling make_gemm_tiling(int64_t rows, int64_t groups, int64_t columns) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t column_tiles = divide_up(columns, Engine::kColumns);
  return {column_tiles, divide_up(rows, Engine::kRows) * groups * column_tiles};
}

struct TapName {
  int32_t index, branch;
};

template <typename T, typename Engine>
struct GemmShared {
  static constexpr int kStage = (Engine::kRows + Engine::kColumns) * kStageDepth<T>;
  T stage[kGemmStages * kStage];
  RowPlace places[Engine::kRows];
  int64_t sources[2][Engine::kRows];  // of a tap and the next
  TapName taps[2];
  GemmWork work;
  uint32_t live_taps[kMostSkippedTaps / 32];

  EFFOPS_DEVICE T* rows(int stage_index) { return stage + stage_index * kStage; }
  EFFOPS_DEVICE T* columns(int stage_index) { return rows(stage_index) + Engine::kRows * kStageDepth<T>; }
  EFFOPS_DEVICE bool is_live(const TapWalk& tap) const {
    return (live_taps[tap.index / 32] >> (tap.index % 32) & 1u) != 0;
  }
};

// ------------------------------------------------------------------------------------------- gathering

// Fills the stages, in order: the chunks of one 64-byte slice after another, tap after tap. One thread looks
// up each row, for all that copy its chunks; its index loads are in flight during a whole tap.
template <typename T, typename Engine>
class GemmLoader {
 public:
  static constexpr int kLanes = Engine::kThreads / kStageChunks;  // rows that the block copies at a time
  static constexpr int kLoads = Engine::kRows / kLanes;
  static_assert(Engine::kColumns == kLanes, "a thread copies one chunk of the columns");

  // Between two barriers.
  EFFOPS_DEVICE GemmLoader(const RowGemm<T>& gemm, GemmShared<T, Engine>& shared, bool skips)
      : gemm_(gemm), shared_(shared), skips_(skips), depth_(gemm.depth) {
    if (looks_up()) {
      const int64_t row = shared.work.first_row + threadIdx.x;
      const RowPlace place = row < shared.work.end_row ? gemm.source.place(row) : RowPlace::none();
      shared.places[threadIdx.x] = place;
    }
    look_up();
    publish(0);
  }

  // Starts to fill a stage; closes a group of copies. After a barrier, and with another before the next call.
  EFFOPS_DEVICE void start(int stage, AsyncCopies& copies) {
    if (depth_ >= gemm_.depth) enter_tap();
    const int slot = static_cast<int>(threadIdx.x) / kStageChunks;
    const int chunk = static_cast<int>(threadIdx.x) % kStageChunks;
    bool gathers = false;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = slot + i * kLanes;
      const int64_t source = shared_.sources[buffer_][row];
      const int32_t k = depth_ + chunk * kPackSize<T>;
      const bool exists = source != kNoRow && k < gemm_.depth, copies_it = !exists || is_whole(source);
      gathers = gathers || !copies_it;
      const T* address = exists && copies_it ? row_of(source) + k : gemm_.weights;
      if (copies_it) copies.start(shared_.rows(stage) + staged_at<T>(row, chunk), address, exists);
    }
#pragma unroll 1
    for (int row = slot; gathers && row < Engine::kRows; row += kLanes) {
      gather_chunk(shared_.rows(stage) + staged_at<T>(row, chunk), shared_.sources[buffer_][row],
                   depth_ + chunk * kPackSize<T>);
    }
    const bool exists = shared_.work.first_column + slot < gemm_.columns;
    copies.start(shared_.columns(stage) + staged_at<T>(slot, chunk), weights_ + depth_, exists);
    depth_ += kStageDepth<T>;
    copies.close_group();
  }

 private:
  EFFOPS_DEVICE static bool looks_up() { return threadIdx.x < Engine::kRows; }

  // The rows of the tap ahead.
  EFFOPS_DEVICE void look_up() {
    while (skips_ && !ahead_.is_done(gemm_.branches) && !shared_.is_live(ahead_))
      ahead_.advance(gemm_.branches);
    if (!looks_up() || ahead_.is_done(gemm_.branches)) return;
    next_ = gemm_.source.row(shared_.places[threadIdx.x], gemm_.branches, ahead_);
  }

  // Tells the block what this thread has looked up, and goes on with the next tap.
  EFFOPS_DEVICE void publish(int buffer) {
    if (ahead_.is_done(gemm_.branches)) return;
    if (looks_up()) shared_.sources[buffer][threadIdx.x] = next_;
    if (threadIdx.x == 0) shared_.taps[buffer] = {ahead_.index, ahead_.branch};
    ahead_.advance(gemm_.branches);
    look_up();
  }

  EFFOPS_DEVICE void enter_tap() {
    buffer_ ^= 1;
    const TapName tap = shared_.taps[buffer_];
    branch_ = tap.branch;
    const int slot = static_cast<int>(threadIdx.x) / kStageChunks;
    const int chunk = static_cast<int>(threadIdx.x) % kStageChunks;
    const int column = min(shared_.work.first_column + slot, gemm_.columns - 1);
    const int64_t line = (int64_t{tap.index} * gemm_.groups + shared_.work.group) * gemm_.columns + column;
    weights_ = gemm_.weights + line * gemm_.padded_depth + chunk * kPackSize<T>;
    depth_ = 0;
    publish(buffer_ ^ 1);
  }

  EFFOPS_DEVICE const T* row_of(int64_t source) const {
    return gemm_.operand.row(source, branch_) + int64_t{shared_.work.group} * gemm_.depth;
  }

  // Whether it can be copied 16 bytes at a time.
  EFFOPS_DEVICE bool is_whole(int64_t source) const { return source > kNoRow && gemm_.operand.aligned; }

  // Element by element: rows that are not aligned, and sums over the rows of a bucket, in ascending order.
  EFFOPS_DEVICE void gather_chunk(T* target, int64_t source, int32_t k) const {
    if (source == kNoRow || is_whole(source) || k >= gemm_.depth) return;
    const RowSource& rows = gemm_.source;
    const bool is_sum = source < kNoRow;
    const int32_t tap = shared_.taps[buffer_].index;
    const int count = min(gemm_.depth - k, kPackSize<T>);
#pragma unroll 1
    for (int e = 0; e < kPackSize<T>; ++e) {
      accumulator_t<T> sum = 0;
      if (e < count && !is_sum) sum = widen(row_of(source)[k + e]);
      if (e < count && is_sum) {
        const int64_t bucket = bucket_of_sum(source), end = rows.offsets[bucket + 1];
#pragma unroll 1
        for (int64_t at = rows.offsets[bucket]; at < end; ++at) {
          sum += widen(row_of(rows.member(at, tap))[k + e]);
        }
      }
      target[e] = narrow<T>(sum);
    }
  }

  const RowGemm<T>& gemm_;
  GemmShared<T, Engine>& shared_;
  const bool skips_;
  int buffer_ = 1;
  int32_t depth_;  // of the slice, or at the end of a tap
  int32_t branch_ = 0;
  const T* weights_ = nullptr;  // of the tap: the thread's chunk
  TapWalk ahead_;
  int64_t next_ = kNoRow;
};

// Which taps have a row in the tile. Between two barriers; all threads.
template <typename T, typename Engine>
EFFOPS_DEVICE int count_live_taps(const RowGemm<T>& gemm, GemmShared<T, Engine>& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kMostSkippedTaps / 32) shared.live_taps[thread] = 0;
  __syncthreads();
  if (thread < Engine::kRows) {
    const int64_t row = shared.work.first_row + thread;
    const RowPlace place = row < shared.work.end_row ? gemm.source.place(row) : RowPlace::none();
    for (TapWalk tap; !tap.is_done(gemm.branches); tap.advance(gemm.branches)) {
      const bool has_row = gemm.source.row(place, gemm.branches, tap) != kNoRow;
      if (__any_sync(kFullWarp, has_row) && thread % kWarpSize == 0) {
        atomicOr(shared.live_taps + tap.index / 32, 1u << (tap.index % 32));
      }
    }
  }
  __syncthreads();
  int count = 0;
  for (const uint32_t word : shared.live_taps) count += __popc(word);
  return count;
}

}  // namespace effops::rowconv
