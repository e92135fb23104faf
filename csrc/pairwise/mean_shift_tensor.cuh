// Products of points on tensor cores, from sums of one or two bf16 per number. No torch, no launches.
//
//   a b = a_high b_high + a_low b_high + a_high b_low      precision high: exact to about 2^-17 of the number
//   a b = a_high b_high                                    precision medium
//
// A warp has 16 kM rows. Its similarities with 8 kN columns lie in the registers in the layout that the
// second product wants its rows in, so that the weights of the pairs never leave them (as in
// FlashAttention-2).
#pragma once

#include "../common/async_copy.h"
#include "../common/mma.h"
#include "mean_shift_pairs.cuh"

namespace effops::pairwise {

// kSets: kinds of points that a column has, 1: x, 2: x and h.
template <int kChannels_, int kParts_, int kSets_>
struct TensorEngine {
  static constexpr int kChannels = kChannels_, kParts = kParts_, kSets = kSets_;
  static constexpr int kDepthSteps = kChannels / 16;
  static constexpr int kChunks = kChannels / 8;  // of 16 bytes
  // Rows: 128 of a block. Where registers allow, a warp has 32 of them: half the reads of shared memory.
  static constexpr int kRows = 128;
  static constexpr int kM = kSets == 1 && kChannels <= 64 ? 2 : 1;
  static constexpr int kThreads = kRows / (16 * kM) * kWarpSize;
  static constexpr int kBlocks = kThreads == 128 ? 2 : 1;  // of a multiprocessor: 255 registers for a thread
  static constexpr int kColumns = kSets == 1 ? 64 : 32;
  static constexpr int kN = 4;  // of 8 columns at a time
  static constexpr bool kKeepsRows = kSets * kParts * kChannels <= 256;  // in registers

  struct Stage {
    bf16 points[kSets][kParts][kColumns * kChannels];
    float weights[kColumns], tau[kColumns];
  };
  static constexpr int64_t kSharedBytes = 2 * sizeof(Stage);

  using Sums = float[kM][kN][4];  // pairs: see multiply_add()
  using ChannelSums = float[kM][kChunks][4];  // of the second product

  // Where a chunk of a column is in shared memory, in elements: 8 columns, and 8 chunks, touch each bank
  // once.
  EFFOPS_DEVICE static int staged_at(int column, int chunk) {
    constexpr int kPerLine = kChunks < 8 ? 8 / kChunks : 1, kMask = (kChunks < 8 ? kChunks : 8) - 1;
    return column * kChannels + (chunk ^ (column / kPerLine & kMask)) * 8;
  }
};

// Starts to copy a tile of columns.
template <typename Engine, typename Arguments>
EFFOPS_DEVICE void start_columns(const Arguments& arguments, int64_t image, int64_t tile,
                                 typename Engine::Stage& stage, AsyncCopies& copies) {
  constexpr int kChunks = Engine::kColumns * Engine::kChunks;
  const int thread = static_cast<int>(fresh_thread());
  const auto copy = [&](const PaddedPoints<float>& points, int set) {
    const int64_t begin = points.offset(image, tile * Engine::kColumns);
#pragma unroll
    for (int i = 0; i < kChunks * Engine::kParts; i += Engine::kThreads) {
      const int index = i + thread;
      if (kChunks * Engine::kParts % Engine::kThreads != 0 && index >= kChunks * Engine::kParts) break;
      const int part = index / kChunks, column = index % kChunks / Engine::kChunks;
      const int chunk = index % Engine::kChunks;
      const bf16* from = (part == 0 ? points.high : points.low) + begin + column * Engine::kChannels +
                         8 * chunk;
      copies.start(stage.points[set][part] + Engine::staged_at(column, chunk), from, true);
    }
  };
  copy(arguments.columns, 0);
  constexpr int kScalarChunks = Engine::kColumns / 4;
  const auto copy_scalars = [&](const PointScalars<float>& scalars, int first, float* to) {
    if (thread < first || thread >= first + kScalarChunks) return;
    const int at = 4 * (thread - first);
    copies.start(to + at, &scalars.at(image, tile * Engine::kColumns + at), true);
  };
  copy_scalars(arguments.column_weights, 0, stage.weights);
  if constexpr (Engine::kSets == 2) {
    if (arguments.column_h.exists()) copy(arguments.column_h, 1);
    copy_scalars(arguments.column_tau, kScalarChunks, stage.tau);
  }
  copies.close_group();
}

// The rows of a warp, of one kind of points, as fragments of 16 rows x 16 channels.
template <typename Engine>
class TensorRows {
 public:
  EFFOPS_DEVICE TensorRows(const PaddedPoints<float>& points, int64_t image, int64_t first_row)
      : high_(points.high + points.offset(image, first_row)),
        low_(points.low == nullptr ? nullptr : points.low + points.offset(image, first_row)) {
    if constexpr (Engine::kKeepsRows) {
      move_to_lane(threadIdx.x);
#pragma unroll
      for (int m = 0; m < Engine::kM; ++m) {
#pragma unroll
        for (int k = 0; k < Engine::kDepthSteps; ++k) load(m, k, kept_[m][k]);
      }
    }
  }

  // Before the rows are used once more. Those that are not kept are read from a cache, again each time.
  EFFOPS_DEVICE void refresh() {
    if constexpr (!Engine::kKeepsRows) move_to_lane(fresh_thread());
  }

  EFFOPS_DEVICE void get(int m, int k, uint32_t (&fragments)[Engine::kParts][4]) const {
    if constexpr (Engine::kKeepsRows) {
#pragma unroll
      for (int part = 0; part < Engine::kParts; ++part) {
#pragma unroll
        for (int i = 0; i < 4; ++i) fragments[part][i] = kept_[m][k][part][i];
      }
    } else {
      load(m, k, fragments);
    }
  }

 private:
  EFFOPS_DEVICE void move_to_lane(unsigned thread) {
    const int lane = static_cast<int>(thread) % kWarpSize;
    lane_at_ = lane / 4 * Engine::kChannels + 2 * (lane % 4);
  }

  EFFOPS_DEVICE void load(int m, int k, uint32_t (&fragments)[Engine::kParts][4]) const {
#pragma unroll
    for (int part = 0; part < Engine::kParts; ++part) {
      const bf16* from = (part == 0 ? high_ : low_) + lane_at_ + 16 * (m * Engine::kChannels + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bf16* pair = from + i % 2 * 8 * Engine::kChannels + i / 2 * 8;
        fragments[part][i] = bit_cast<uint32_t>(load_pack<2>(pair));
      }
    }
  }

  const bf16 *high_, *low_;
  int lane_at_ = 0;
  uint32_t kept_[Engine::kKeepsRows ? Engine::kM : 1][Engine::kKeepsRows ? Engine::kDepthSteps : 1]
                [Engine::kParts][4];
};

// Adds the products of rows and the part of 16 columns (or channels) whose two fragments are given.
template <int kParts>
EFFOPS_DEVICE void add_part(const uint32_t (&rows)[kParts][4], const uint32_t (&columns)[4], int part,
                            float (&sums0)[4], float (&sums1)[4]) {
  const uint32_t column0[2] = {columns[0], columns[1]}, column1[2] = {columns[2], columns[3]};
  multiply_add<bf16>(sums0[0], sums0[1], sums0[2], sums0[3], rows[0], column0);
  multiply_add<bf16>(sums1[0], sums1[1], sums1[2], sums1[3], rows[0], column1);
  if (kParts == 2 && part == 0) {
    multiply_add<bf16>(sums0[0], sums0[1], sums0[2], sums0[3], rows[kParts - 1], column0);
    multiply_add<bf16>(sums1[0], sums1[1], sums1[2], sums1[3], rows[kParts - 1], column1);
  }
}

// Reads columns of a stage as the second factor of products over channels: calls f(n, k, part, fragments) for
// pairs n of 8 columns of the kN, steps k of 16 channels. points: of a set, at the first of the columns.
template <typename Engine>
struct ColumnReader {
  int at;
  EFFOPS_DEVICE ColumnReader() {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    at = Engine::staged_at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }
  EFFOPS_DEVICE void read(const bf16* points, int n, int k, int part, uint32_t (&fragments)[4]) const {
    const int offset = part * Engine::kColumns * Engine::kChannels + 16 * n * Engine::kChannels;
    load_matrices<false>(fragments, points + offset + (at ^ (16 * k)));
  }
};

// The same as the second factor of products over columns: k of 16 columns, pairs n of 8 channels.
template <typename Engine>
struct ChannelReader {
  int at;
  EFFOPS_DEVICE ChannelReader() {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    at = Engine::staged_at(lane % 16, lane / 16);
  }
  EFFOPS_DEVICE void read(const bf16* points, int n, int k, int part, uint32_t (&fragments)[4]) const {
    const int offset = part * Engine::kColumns * Engine::kChannels + 16 * k * Engine::kChannels;
    load_matrices<true>(fragments, points + offset + (at ^ (16 * n)));
  }
};

EFFOPS_DEVICE uint32_t pack_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return uint32_t{narrow<bf16>(second).bits} << 16 | narrow<bf16>(first).bits;
#endif
}

// The pairs of 16 rows and 16 columns, of `sums` 2 k and the next, as rows of a product.
template <int kParts, int kN>
EFFOPS_DEVICE void split_pairs(const float (&sums)[kN][4], int k, uint32_t (&fragments)[kParts][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float first = sums[2 * k + i / 2][i % 2 * 2], second = sums[2 * k + i / 2][i % 2 * 2 + 1];
    const uint32_t pair = pack_pair(first, second);
    fragments[0][i] = pair;
    if constexpr (kParts == 2) {
      fragments[1][i] =
          pack_pair(first - bit_cast<float>(pair << 16), second - bit_cast<float>(pair & 0xffff0000u));
    }
  }
}

// channel_sums += pairs times the columns they are of.
template <typename Engine>
EFFOPS_DEVICE void mix_columns(const typename Engine::Sums& pairs, const bf16* points,
                               typename Engine::ChannelSums& channel_sums) {
  const ChannelReader<Engine> reader;
#pragma unroll
  for (int k = 0; k < Engine::kN / 2; ++k) {
    uint32_t rows[Engine::kM][Engine::kParts][4];
#pragma unroll
    for (int m = 0; m < Engine::kM; ++m) split_pairs<Engine::kParts>(pairs[m], k, rows[m]);
#pragma unroll
    for (int n = 0; n < Engine::kChunks / 2; ++n) {
#pragma unroll
      for (int part = 0; part < Engine::kParts; ++part) {
        uint32_t columns[4];
        reader.read(points, n, k, part, columns);
#pragma unroll
        for (int m = 0; m < Engine::kM; ++m) {
          add_part(rows[m], columns, part, channel_sums[m][2 * n], channel_sums[m][2 * n + 1]);
        }
      }
    }
  }
}

// The sum over the four lanes that share their rows.
EFFOPS_DEVICE float add_quad(float value) {
  value += __shfl_xor_sync(kFullWarp, value, 1);
  return value + __shfl_xor_sync(kFullWarp, value, 2);
}

// Writes the sums of a warp's rows, `first_row` the first; `adds`: to what is there.
template <typename Engine>
EFFOPS_DEVICE void store_sums(const PairArguments<float>& arguments, const PairWork& work, int64_t first_row,
                              const typename Engine::ChannelSums& sums, bool adds) {
  const int lane = static_cast<int>(fresh_thread()) % kWarpSize;
  float* to = arguments.sums + (arguments.row_index(work, first_row) + lane / 4) * Engine::kChannels +
              2 * (lane % 4);
#pragma unroll
  for (int m = 0; m < Engine::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < Engine::kChunks; ++n) {
        auto* pair = reinterpret_cast<Pack<float, 2>*>(to + (16 * m + 8 * half) * Engine::kChannels + 8 * n);
        Pack<float, 2> value{{sums[m][n][2 * half], sums[m][n][2 * half + 1]}};
        if (adds) {
          const Pack<float, 2> before = *pair;
          value.data[0] += before.data[0];
          value.data[1] += before.data[1];
        }
        *pair = value;
      }
    }
  }
}

// Calls f(stage) for the tiles of columns of a work, copying the next one meanwhile.
template <typename Engine, typename Arguments, typename F>
EFFOPS_DEVICE void for_column_tiles(const Arguments& arguments, const PairWork& work,
                                    typename Engine::Stage* stages, const F& f) {
  AsyncCopies copies;
  if (work.first_tile < work.end_tile) {
    start_columns<Engine>(arguments, work.image, work.first_tile, stages[0], copies);
  }
  int stage = 0;
  for (int64_t tile = work.first_tile; tile < work.end_tile; ++tile) {
    copies.wait<0>();
    __syncthreads();  // this stage is there for all, and nobody reads the other one any more
    if (tile + 1 < work.end_tile) {
      start_columns<Engine>(arguments, work.image, tile + 1, stages[1 - stage], copies);
    }
    f(stages[stage]);
    stage = 1 - stage;
  }
}

}  // namespace effops::pairwise
