// Convolutions at chosen positions on the CPU, as products of rows: packed weights, and the tasks of a forward
// product or of an input's gradient. (Those of a weight's gradient are in row_outer_cpu.h.)
//
// Which row a tap reads is up to a source, an object with
//     int64_t choose(int64_t first, int64_t count, int64_t tap, Choice<T>* chosen)
// that writes, for those of the output rows [first, first + count) whose tap `tap` reads a row, which one, and
// returns how many there are. Taps that read nothing cost nothing, and are never multiplied. A source belongs to
// one task; for a block of rows its taps are asked for in ascending order.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/dtype_switch.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "row_copy_cpu_kernel.h"
#include "row_gemm_cpu_kernel.h"

namespace effops::rowconv {

constexpr int64_t kBlockRows = 64;  // output rows of a block: their sums stay in the second-level cache

template <typename A>
constexpr int kPrecision = sizeof(A) == 8 ? 1 : 0;  // index into the kernels' pairs

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename A>
int64_t whole_registers(int64_t columns) {
  const int64_t lanes = row_gemm_kernels().float_lanes / (sizeof(A) / sizeof(float));
  return divide_up(columns, lanes) * lanes;
}

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

// ---------------------------------------------------------------------------------------- weights

// How the channels of a convolution's input and output are grouped.
struct ChannelSizes {
  int64_t in, out;  // per group
  int64_t groups, taps;

  bool is_depthwise() const { return in == 1 && out == 1 && groups > 1; }
};

// The weights of one branch, [O, Ci / groups, taps], as the kernels read them. `reversed`: for the gradient
// of the input, which multiplies rows of output channels.
template <typename A>
class TapWeights {
 public:
  template <typename T>
  TapWeights(const T* weight, const ChannelSizes& sizes, bool reversed)
      : depthwise_(sizes.is_depthwise()),
        groups_(depthwise_ ? 1 : sizes.groups),
        depth_(depthwise_ ? 1
               : reversed ? sizes.out
                          : sizes.in),
        columns_(depthwise_ ? sizes.groups
                 : reversed ? sizes.in
                            : sizes.out),
        padded_(whole_registers<A>(columns_)),
        taps_(sizes.taps),
        memory_(taps_ * tap_stride() * static_cast<int64_t>(sizeof(A))) {
    const int64_t panels = divide_up(padded_, panel_width());
    parallel_for(groups_ * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t group = p / panels, first = p % panels * panel_width();
        const Panel panel{group, first, std::min(panel_width(), padded_ - first),
                          std::min(panel_width(), columns_ - first)};
        if (panel.columns < panel.width) clear(panel);
        if (reversed && !depthwise_) {
          pack_reversed(weight + group * sizes.out * sizes.in * taps_, panel);
        } else {
          pack(weight + (group * columns_ + first) * depth_ * taps_, panel);
        }
      }
    });
  }

  bool is_depthwise() const { return depthwise_; }
  int64_t groups() const { return groups_; }
  int64_t depth() const { return depth_; }  // per group
  int64_t columns() const { return columns_; }  // per group
  int64_t padded() const { return padded_; }  // columns in whole registers
  int64_t taps() const { return taps_; }
  int64_t row_width() const { return depthwise_ ? columns_ : groups_ * depth_; }
  int64_t sums_width() const { return groups_ * padded_; }
  const A* at(int64_t tap, int64_t group) const {
    return static_cast<const A*>(memory_.at(0)) + tap * tap_stride() + group * block_elements();
  }

 private:
  int64_t block_elements() const { return depth_ * padded_; }

  // See row_gemm_cpu_kernel.h. `columns` of the `width` columns hold weights, the others zeros.
  struct Panel {
    int64_t group, first, width, columns;
  };
  static int64_t panel_width() { return row_gemm_kernels().panel_registers * whole_registers<A>(1); }
  // A line more: packing writes to all taps in turns, which must not fall into the same cache set.
  int64_t tap_stride() const { return groups_ * block_elements() + 64 / static_cast<int64_t>(sizeof(A)); }
  A* start(const Panel& panel) { return const_cast<A*>(at(0, panel.group)) + depth_ * panel.first; }

  void clear(const Panel& panel) {
    for (int64_t t = 0; t < taps_; ++t)
      std::fill_n(start(panel) + t * tap_stride(), depth_ * panel.width, A(0));
  }

  // source: [columns][depth][taps]. A line of it at a time, for all columns: what is written stays in the
  // cache.
  template <typename T>
  void pack(const T* source, const Panel& panel) {
    constexpr int64_t kLine = 16;
    const int64_t length = depth_ * taps_;
    A* target = start(panel);
    for (int64_t begin = 0; begin < length; begin += kLine) {
      const int64_t count = std::min(kLine, length - begin);
      A* to[kLine];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t k = (begin + i) / taps_, t = (begin + i) % taps_;
        to[i] = target + t * tap_stride() + k * panel.width;
      }
      for (int64_t c = 0; c < panel.columns; ++c) {
        const T* from = source + c * length + begin;
        for (int64_t i = 0; i < count; ++i) to[i][c] = widen(from[i]);
      }
    }
  }

  // source: [depth][columns of the group][taps].
  template <typename T>
  void pack_reversed(const T* source, const Panel& panel) {
    for (int64_t k = 0; k < depth_; ++k) {
      const T* from = source + (k * columns_ + panel.first) * taps_;
      A* target = start(panel) + k * panel.width;
      for (int64_t c = 0; c < panel.columns; ++c) {
        for (int64_t t = 0; t < taps_; ++t) target[t * tap_stride() + c] = widen(from[c * taps_ + t]);
      }
    }
  }

  bool depthwise_;
  int64_t groups_, depth_, columns_, padded_, taps_;
  Scratch memory_;
};

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
        reader_(rows, like.row_width(), has_bits),
        choices_(rows),
        pairs_(rows),
        sums_(rows * width_ * static_cast<int64_t>(sizeof(A))) {}

  int64_t rows() const { return rows_; }
  A* sums(int64_t row) const { return static_cast<A*>(sums_.at(0)) + row * width_; }
  void clear(int64_t count) { memset(sums(0), 0, count * width_ * sizeof(A)); }

  // sums[i] += sum over taps of the rows that the source chooses for the output row first + i, times weights.
  template <typename Source>
  void add(const TapWeights<A>& weights, Source& source, int64_t first, int64_t count) {
    const RowGemmKernels& kernels = row_gemm_kernels();
    for (int64_t tap = 0; tap < weights.taps(); ++tap) {
      const int64_t chosen = source.choose(first, count, tap, choices_.data());
      for (int64_t i = 0; i < chosen; ++i) {
        pairs_[i] = {reader_.read(i, choices_[i]), sums(choices_[i].index)};
      }
      if (weights.is_depthwise()) {
        kernels.multiply_channels[kPrecision<A>](pairs_.data(), chosen, weights.at(tap, 0),
                                                 weights.columns());
        continue;
      }
      for (int64_t g = 0; g < weights.groups(); ++g) {
        kernels.multiply[kPrecision<A>](pairs_.data(), chosen, g * weights.depth(), g * weights.padded(),
                                        weights.depth(), weights.at(tap, g), weights.padded());
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

}  // namespace effops::rowconv
