// The gathered implicit GEMM of the convolutions over sparse rows. No torch, no launches.
//
//   result[row, o] = sum_branches f(bias_b[o] + sum_tap sum_c operand[source(row, tap), c] * W[tap][c][o])
//
// with f the identity or relu, then an addend and a factor per row. Every row of the result is made by one
// block (output-stationary), from rows that the index provider names (row_source.cuh); nothing that has been
// gathered is stored, and nothing is added atomically, so that results are bit-reproducible.
#pragma once

#include "row_direct_kernels.cuh"
#include "row_gemm_loader.cuh"

namespace effops::rowconv {

// -------------------------------------------------------------------------------------------- results

// The sums of a thread, and what becomes of them.
template <typename T, typename Engine>
struct GemmResult {
  using A = accumulator_t<T>;
  const RowGemm<T>& gemm;
  const GemmWork& work;
  A sums[Engine::kM][Engine::kN] = {};    // of the branch
  A totals[Engine::kM][Engine::kN] = {};  // of the branches before

  // Rows and columns of the result; see fresh_thread().
  struct Place {
    const RowGemm<T>& gemm;
    const GemmWork& work;
    Engine engine{fresh_thread()};

    EFFOPS_DEVICE int64_t row(int i) const { return work.first_row + engine.row(i); }
    EFFOPS_DEVICE bool has_row(int i) const { return row(i) < work.end_row; }
    EFFOPS_DEVICE int32_t column(int j) const { return work.first_column + engine.column(j); }
    EFFOPS_DEVICE bool has_column(int j) const { return column(j) < gemm.columns; }
    EFFOPS_DEVICE int64_t channel(int j) const { return int64_t{work.group} * gemm.columns + column(j); }
  };
  EFFOPS_DEVICE Place place() const { return {gemm, work}; }

  EFFOPS_DEVICE void add_bias(int32_t branch) {
    const T* bias = gemm.bias[branch];
    if (bias == nullptr) return;
    const Place own = place();
#pragma unroll
    for (int j = 0; j < Engine::kN; ++j) {
      const A value = own.has_column(j) ? widen(bias[own.channel(j)]) : A(0);
#pragma unroll
      for (int i = 0; i < Engine::kM; ++i) sums[i][j] += value;
    }
  }

  EFFOPS_DEVICE void add_to_totals() {
#pragma unroll
    for (int i = 0; i < Engine::kM; ++i) {
#pragma unroll
      for (int j = 0; j < Engine::kN; ++j) {
        totals[i][j] += sums[i][j];
        sums[i][j] = A(0);
      }
    }
  }

  // NaN stays. The group begins at a multiple of 8 channels where there are signs.
  EFFOPS_DEVICE void apply_relu(int32_t branch) {
    const Place own = place();
    const int64_t octet = (int64_t{work.group} * gemm.columns + work.first_column) / 8;
    const int32_t count = (gemm.columns - work.first_column + 7) / 8;
#pragma unroll
    for (int i = 0; i < Engine::kM; ++i) {
      __syncwarp();  // as in store()
      uint32_t bits = 0;
#pragma unroll
      for (int j = 0; j < Engine::kN; ++j) {
        const bool passes = !(sums[i][j] <= A(0));
        bits |= (passes && own.has_column(j) ? 1u : 0u) << j;
        if (!passes) sums[i][j] = A(0);
      }
      if (gemm.signs == nullptr) continue;
      const bool exists = own.has_row(i);
      const int64_t line = branch * gemm.rows + (exists ? own.row(i) : 0);
      own.engine.store_bits(bits, gemm.signs + line * gemm.sign_bytes + octet, count, exists);
    }
  }

  EFFOPS_DEVICE void store() {
    const Place own = place();
#pragma unroll
    for (int i = 0; i < Engine::kM; ++i) {
      __syncwarp();  // keeps the compiler from preparing all rows at once, for which there are no registers
      if (!own.has_row(i)) continue;
      const int64_t row = own.row(i);
      const int64_t cell = gemm.positions == nullptr ? row : gemm.positions[row];
      if (cell < 0 || cell >= gemm.limit) continue;
      if (gemm.addend != nullptr) {
#pragma unroll
        for (int j = 0; j < Engine::kN; ++j) {
          if (own.has_column(j)) totals[i][j] += widen(gemm.addend[row * gemm.channels() + own.channel(j)]);
        }
      }
      if (gemm.scale != nullptr) {
        const A scale = gemm.scale_of(cell);
#pragma unroll
        for (int j = 0; j < Engine::kN; ++j) totals[i][j] *= scale;
      }
      const int64_t offset = gemm.layout.offset(cell);
      if (gemm.wide_result) {
        store_row<A>(own, i, offset);
      } else {
        store_row<T>(own, i, offset);
      }
    }
  }

  template <typename Stored>
  EFFOPS_DEVICE void store_row(const Place& own, int i, int64_t offset) const {
    auto* target = static_cast<Stored*>(gemm.result) + offset;
    const int64_t stride = gemm.layout.channel_stride;
    const bool has_pairs = stride == 1 && gemm.columns % 2 == 0 && gemm.layout.cell_stride % 2 == 0;
#pragma unroll
    for (int j = 0; j < Engine::kN; j += Engine::kAdjacent) {
      if (!own.has_column(j)) continue;
      if constexpr (Engine::kAdjacent == 2) {
        if (has_pairs) {
          const Pack<Stored, 2> pair{{narrow<Stored>(totals[i][j]), narrow<Stored>(totals[i][j + 1])}};
          *reinterpret_cast<Pack<Stored, 2>*>(target + own.channel(j)) = pair;
          continue;
        }
        if (own.has_column(j + 1)) target[own.channel(j + 1) * stride] = narrow<Stored>(totals[i][j + 1]);
      }
      target[own.channel(j) * stride] = narrow<Stored>(totals[i][j]);
    }
  }
};

// --------------------------------------------------------------------------------------------- kernel

template <typename T, typename Engine>
EFFOPS_DEVICE void make_gemm_tile(const RowGemm<T>& gemm, GemmShared<T, Engine>& shared) {
  const Engine engine(threadIdx.x);
  GemmResult<T, Engine> result{gemm, shared.work};
  const bool skips = gemm.skips_taps && gemm.branches.taps <= kMostSkippedTaps;
  const int taps = skips ? count_live_taps(gemm, shared) : gemm.branches.taps;
  const int32_t slices = max((gemm.depth + kStageDepth<T> - 1) / kStageDepth<T>, 1);
  const int32_t steps = taps * slices;
  GemmLoader<T, Engine> loader(gemm, shared, skips);
  AsyncCopies copies;
  int32_t branch = 0, left = gemm.branches.branch[0].taps() * slices;  // steps, where a relu ends a branch
  int used = 1;  // stages; with three of them, the first step fills the first
  for (int32_t step = 1 - kGemmStages; step < steps; ++step) {
    copies.wait<kGemmStages - 2>();
    __syncthreads();  // the stage is there for all, and the one before has been read
    if (step + kGemmStages <= steps) {
      loader.start(used == 0 ? kGemmStages - 1 : used - 1, copies);
    } else {
      copies.close_group();
    }
    const int stage = used;
    used = used + 1 < kGemmStages ? used + 1 : 0;
    if (step < 0) continue;
    engine.add(shared.rows(stage), shared.columns(stage), result.sums);
    if (!gemm.relu || --left > 0) continue;
    result.add_bias(branch);
    result.apply_relu(branch);
    result.add_to_totals();
    if (++branch < gemm.branches.count) left = gemm.branches.branch[branch].taps() * slices;
  }
  if (!gemm.relu) {
    for (; branch < gemm.branches.count; ++branch) result.add_bias(branch);
    result.add_to_totals();
  }
  result.store();
  copies.wait<0>();
}

// The same, slowly: padding does not multiply anything, not even infinity.
template <typename T, typename Engine>
EFFOPS_DEVICE void make_tile_directly(const RowGemm<T>& gemm, const GemmWork& work) {
  constexpr int kOctets = Engine::kColumns / kDirectChannels;
  const int rows = static_cast<int>(work.end_row - work.first_row);
  for (int i = static_cast<int>(threadIdx.x); i < rows * kOctets; i += Engine::kThreads) {
    const int32_t column = work.first_column + i % kOctets * kDirectChannels;
    const int count = min(gemm.columns - column, kDirectChannels);
    if (count > 0) {
      convolve_directly(gemm, work.first_row + i / kOctets, int64_t{work.group} * gemm.columns + column,
                        count);
    }
  }
}

// See the top of the file.
//
// Parallelism: a block per tile of rows and columns, 128 x 32, 64 or 128 on tensor cores (with float32 sums),
// 64 x 64 by plain instructions; it walks over the taps and 64 bytes of channels at a time, which it copies
// ahead into two further stages. The rows of the next tap are looked up during the present one. Persistent
// where the device alone knows how many rows there are.
// Bytes: rows * taps * depth gathered per tile column, mostly from the first-level cache where neighbouring
// rows share their taps; all weights per tile row from the second-level cache; the result once.
// Bound: tensor cores from about 128 channels on, else by the latency of gathering. 128 rows x 128 columns
// make 64 FLOP per byte of operands that is copied. Padding multiplies nothing: a tap without a row is a row
// of zeros, which infinite or NaN weights would turn into NaN, so that with such weights, and only then, the
// tile is made by the code of row_direct_kernel. Limits: kMaxBranches; with signs, groups of a multiple of 8
// columns; shared memory of up to 52 KB.
template <typename T, typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    row_gemm_kernel(const __grid_constant__ RowGemm<T> gemm, GemmTiling tiling) {
  if constexpr (Engine::kNative) {
    using Shared = GemmShared<T, Engine>;
    EFFOPS_DYNAMIC_SHARED(Shared, shared);
    const int flag = threadIdx.x < kFlagBlocks ? gemm.not_finite[threadIdx.x] : 0;
    const bool not_finite = __syncthreads_or(flag) != 0;
    for (int64_t index = blockIdx.x; index < tiling.works; index += gridDim.x) {
      const GemmWork work = tiling.template work<Engine>(gemm, index);
      if (work.first_row >= work.end_row) break;
      if (threadIdx.x == 0) shared->work = work;
      __syncthreads();
      if (not_finite) {
        make_tile_directly<T, Engine>(gemm, shared->work);
      } else {
        make_gemm_tile<T, Engine>(gemm, *shared);
      }
      __syncthreads();  // nobody reads shared memory any more
    }
  }
}

}  // namespace effops::rowconv
