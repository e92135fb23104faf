// Convolutions at chosen positions on the CPU, as products of rows: packed weights, and the tasks of a
// forward product or of an input's gradient. (Those of a weight's gradient are in row_outer_cpu.h.)
//
// Which row a tap reads is up to a source, an object with
//     int64_t choose(int64_t first, int64_t count, int64_t tap, Choice<T>* chosen)
// that writes, for those of the output rows [first, first + count) whose tap `tap` reads a row, which one,
// and returns how many there are. Taps that read nothing cost nothing, and are never multiplied. A source
// belongs to one task; for a block of rows its taps are asked for in ascending order.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/dtype_switch.h"
#include "../common/parallel.h"
#include "../common/row_copy_cpu_kernel.h"
#include "../common/scratch.h"
#include "tap_weights_cpu.h"

namespace effops::rowconv {

constexpr int64_t kBlockRows = 64;  // output rows of a block: their sums stay in the second-level cache

template <typename T>
constexpr FloatType kFloatTypeOf = std::is_same_v<T, float>    ? FloatType::kFloat
                                   : std::is_same_v<T, double> ? FloatType::kDouble
                                   : std::is_same_v<T, bf16>   ? FloatType::kBFloat16
                                                               : FloatType::kHalf;

template <typename T>
struct Choice {
  int64_t index;  // of the output row in its block
  const T* row;
  const uint8_t* bits;  // of the row's elements, see SignedRow
};

// Asks for a row that will be read soon: chosen rows lie anywhere, and the processor foresees none of them.
// It makes the forward product of 32 channels 1.4 times as fast.
template <typename T>
inline void prefetch_row(const T* row, int64_t elements) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < elements; i += kLine) __builtin_prefetch(row + i);
}

// ---------------------------------------------------------------------------------------- chosen rows

// Turns choices into rows of accumulators: they are read where they lie if they are that already, and are
// widened into memory of the task otherwise.
template <typename T>
class RowReader {
 public:
  using A = accumulator_t<T>;

  RowReader(int64_t block, int64_t width, bool has_bits)
      : width_(width),
        copies_(has_bits || !std::is_same_v<T, A>),
        memory_(copies_ ? block * width * static_cast<int64_t>(sizeof(A)) : 0) {}

  bool copies() const { return copies_; }

  // The i-th choice as a row, valid until the i-th is asked for again.
  const A* read(int64_t i, const Choice<T>& choice) const {
    if constexpr (std::is_same_v<T, A>) {
      if (!copies_) return choice.row;
    }
    A* copy = static_cast<A*>(memory_.at(0)) + i * width_;
    row_gemm_kernels().widen[static_cast<int>(kFloatTypeOf<T>)]({choice.row, choice.bits}, width_, copy);
    return copy;
  }

 private:
  int64_t width_;
  bool copies_;
  Scratch memory_;
};

// ---------------------------------------------------------------------------------------- products

// The sums of a block of output rows, and what is needed to compute them; one per task.
template <typename T>
class ProductBlock {
 public:
  using A = accumulator_t<T>;

  // has_bits: the sources' choices have them.
  ProductBlock(const TapWeights<A>& like, bool has_bits, int64_t rows = kBlockRows)
      : rows_(rows),
        width_(like.sums_width()),
        reader_(like.has_pairs() ? 0 : rows, like.row_width(), has_bits),
        choices_(rows),
        pairs_(rows),
        sums_(rows * width_ * static_cast<int64_t>(sizeof(A))) {}

  int64_t rows() const { return rows_; }
  A* sums(int64_t row) const { return static_cast<A*>(sums_.at(0)) + row * width_; }
  void clear(int64_t count) { std::fill_n(sums(0), count * width_, A(0)); }

  // sums[i] += sum over taps of the rows that the source chooses for the output row first + i, times weights.
  template <typename Source>
  void add(const TapWeights<A>& weights, Source& source, int64_t first, int64_t count) {
    const RowGemmKernels& kernels = row_gemm_kernels();
    const auto multiply = weights.has_pairs() ? multiply_pairs() : kernels.multiply[kPrecision<A>];
    for (int64_t tap = 0; tap < weights.taps(); ++tap) {
      const int64_t chosen = source.choose(first, count, tap, choices_.data());
      for (int64_t i = 0; i < chosen; ++i) {
        const void* row = choices_[i].row;
        pairs_[i] = {weights.has_pairs() ? row : reader_.read(i, choices_[i]), sums(choices_[i].index)};
      }
      if (weights.is_depthwise()) {
        kernels.multiply_channels[kPrecision<A>](pairs_.data(), chosen, weights.at(tap, 0),
                                                 weights.columns());
        continue;
      }
      for (int64_t g = 0; g < weights.groups(); ++g) {
        multiply(pairs_.data(), chosen, g * weights.depth(), g * weights.padded(), weights.depth(),
                 weights.at(tap, g), weights.padded());
      }
    }
  }

  // Moves the groups' columns of each row next to each other.
  void join_groups(const TapWeights<A>& weights, int64_t count) {
    for (int64_t i = 0; weights.padded() != weights.columns() && i < count; ++i) {
      for (int64_t g = 1; g < weights.groups(); ++g) {
        memmove(sums(i) + g * weights.columns(), sums(i) + g * weights.padded(),
                weights.columns() * sizeof(A));
      }
    }
  }

 private:
  int64_t rows_, width_;
  RowReader<T> reader_;
  std::vector<Choice<T>> choices_;
  std::vector<RowPair> pairs_;
  Scratch sums_;
};

// Runs f(first, count) for blocks of at most `block` of the rows, on all threads; make() makes what a task
// needs, which f gets.
template <typename Make, typename F>
void for_row_blocks(int64_t rows, int64_t block, const Make& make, const F& f) {
  const int64_t blocks = divide_up(rows, block);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    auto state = make();
    for (int64_t b = begin; b < end; ++b) f(state, b * block, std::min(block, rows - b * block));
  });
}

// Writes one row of sums in storage.
template <typename T>
void store_row(const accumulator_t<T>* sums, int64_t count, T* target) {
  row_copy_kernels().round[static_cast<int>(kFloatTypeOf<T>)](sums, count, target);
}

// Numbers in storage as accumulators.
template <typename T>
std::vector<accumulator_t<T>> widened(const T* values, int64_t count) {
  std::vector<accumulator_t<T>> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = widen(values[i]);
  return result;
}

}  // namespace effops::rowconv
