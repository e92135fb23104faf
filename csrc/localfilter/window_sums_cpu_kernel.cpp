// Products of windows on the CPU: sums over taps (a mixture of pixels, and its adjoint) and over channels
// (the similarities of a pixel to those of its window).
//
// Parallelism: the caller splits rows; lanes are neighbouring pixels. Two output rows are computed at a time,
// since most pixels are read by both: a loaded register of pixels, which mostly spans two cache lines, serves
// two multiplications.
// Bytes: pixels and weights come from the first- and second-level cache, where the caller keeps a tile of
// them. Bound by the multiply-add rate: 16 of them for 10 loads with 8 channels or taps in registers.
#include "window_sums_cpu_kernel.h"
#include "lanes_cpu.h"

namespace effops::localfilter::EFFOPS_ISA {
namespace {

constexpr int kBlock = kVectorBytes == 64 ? 8 : 4;  // channels or taps in registers, for two rows

// Calls f(first, constant size) for blocks of at most kBlock, of about equal size, that cover [0, count).
template <typename F>
EFFOPS_INLINE void for_equal_blocks(int64_t count, const F& f) {
  for (int64_t first = 0; first < count;) {
    const int64_t left = count - first, blocks = (left + kBlock - 1) / kBlock;
    const int64_t size = (left + blocks - 1) / blocks;
    const auto run = [&](auto constant) __attribute__((always_inline)) {
      if constexpr (constant.value <= kBlock) f(first, constant);
    };
    switch (size) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, 3>{}); break;
      case 4: run(std::integral_constant<int, 4>{}); break;
      case 5: run(std::integral_constant<int, 5>{}); break;
      case 6: run(std::integral_constant<int, 6>{}); break;
      case 7: run(std::integral_constant<int, 7>{}); break;
      default: run(std::integral_constant<int, 8>{});
    }
    first += size;
  }
}

// The taps of one step for N channels and the rows First to First + Rows - 1.
template <typename A, int N, int First, int Rows, typename V>
EFFOPS_INLINE void add_step(const SumRows& job, const SumStep& step, int64_t channel, int64_t x,
                            V (&totals)[2][N]) {
  const A* source = static_cast<const A*>(step.source) + channel * job.source_channel_stride + x;
  int64_t t = 0;
  do {  // at least one tap, or the totals would leave the registers
    V weights[Rows];
    for (int r = 0; r < Rows; ++r) {
      weights[r] = load<V>(static_cast<const A*>(step.weights[First + r]) + job.weight_offsets[t] + x);
    }
    const A* pixels = source + job.source_offsets[t];
    for (int c = 0; c < N; ++c) {
      const V pixel = load<V>(pixels + c * job.source_channel_stride);
      for (int r = 0; r < Rows; ++r) totals[First + r][c] += weights[r] * pixel;
    }
  } while (++t < job.taps);
}

template <typename A, int N>
void sum_block(const SumRows& job, int64_t channel) {
  using V = typename Vec<A>::type;
  const auto out = [&](int r, int c, int64_t x) __attribute__((always_inline)) {
    return static_cast<A*>(job.outs[r]) + (channel + c) * job.out_channel_stride + x;
  };
  const bool two = job.outs[1] != nullptr;
  for (int64_t x = 0; x < job.count; x += Vec<A>::lanes) {
    V totals[2][N];
    for (int c = 0; c < N; ++c) {
      totals[0][c] = job.accumulate ? load<V>(out(0, c, x)) : V{};
      totals[1][c] = job.accumulate && two ? load<V>(out(1, c, x)) : V{};
    }
    for (int64_t s = 0; s < job.num_steps; ++s) {
      const SumStep& step = job.steps[s];
      if (step.weights[0] && step.weights[1]) {
        add_step<A, N, 0, 2>(job, step, channel, x, totals);
      } else if (step.weights[0]) {
        add_step<A, N, 0, 1>(job, step, channel, x, totals);
      } else {
        add_step<A, N, 1, 1>(job, step, channel, x, totals);
      }
    }
    for (int c = 0; c < N; ++c) {
      store(out(0, c, x), totals[0][c]);
      if (two) store(out(1, c, x), totals[1][c]);
    }
  }
}

template <typename A>
void sum_rows(const SumRows& job) {
  for_equal_blocks(job.channels, [&](int64_t channel, auto size) __attribute__((always_inline)) {
    sum_block<A, size.value>(job, channel);
  });
}

// Unit: the taps lie next to each other, which saves a register per tap.
template <typename A, int N, int Rows, bool Unit>
void dot_block(const DotRows& job, int64_t tap) {
  using V = typename Vec<A>::type;
  const int64_t* offsets = job.offsets + tap;
  for (int64_t x = 0; x < job.count; x += Vec<A>::lanes) {
    const auto score = [&](int r, int t) __attribute__((always_inline)) {
      return static_cast<A*>(job.scores[r]) + (tap + t) * job.tap_stride + x;
    };
    V totals[Rows][N];
    for (int r = 0; r < Rows; ++r) {
      for (int t = 0; t < N; ++t) totals[r][t] = job.accumulate ? load<V>(score(r, t)) : V{};
    }
    const A* source = static_cast<const A*>(job.source) + offsets[0] + x;
    const A* queries[Rows];
    for (int r = 0; r < Rows; ++r) queries[r] = static_cast<const A*>(job.queries[r]) + x;
    int64_t c = 0;
    do {  // at least one channel
      V query[Rows];
      for (int r = 0; r < Rows; ++r) {
        query[r] = load<V>(queries[r]);
        queries[r] += job.query_channel_stride;
      }
      for (int t = 0; t < N; ++t) {
        const V pixel = load<V>(source + (Unit ? t : offsets[t] - offsets[0]));
        for (int r = 0; r < Rows; ++r) totals[r][t] += query[r] * pixel;
      }
      source += job.source_channel_stride;
    } while (++c < job.channels);
    for (int r = 0; r < Rows; ++r) {
      for (int t = 0; t < N; ++t) store(score(r, t), totals[r][t]);
    }
  }
}

template <typename A, bool Unit>
void dot_row_of_taps(const DotRows& job) {
  for_equal_blocks(job.taps, [&](int64_t tap, auto size) __attribute__((always_inline)) {
    if (job.queries[1]) {
      dot_block<A, size.value, 2, Unit>(job, tap);
    } else {
      dot_block<A, size.value, 1, Unit>(job, tap);
    }
  });
}

template <typename A>
void dot_rows(const DotRows& job) {
  if (job.taps > 1 && job.offsets[1] - job.offsets[0] != 1) {
    dot_row_of_taps<A, false>(job);
  } else {
    dot_row_of_taps<A, true>(job);
  }
}

}  // namespace

extern const WindowSumKernels window_sum_kernels = {{&sum_rows<float>, &sum_rows<double>},
                                                    {&dot_rows<float>, &dot_rows<double>}};

}  // namespace effops::localfilter::EFFOPS_ISA
