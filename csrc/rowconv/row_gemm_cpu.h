// Convolutions at chosen positions on the CPU, as products of rows: packed weights, the tasks of a forward or
// input-gradient product, and those of a weight gradient. Which row a tap reads is up to a source: an object with
//     int64_t choose(int64_t first, int64_t count, int64_t tap, Choice<T>* chosen)
// that writes, for those of the output rows [first, first + count) whose tap `tap` reads a row, which one, and
// returns how many there are. Taps that read nothing cost nothing. A source belongs to one task; its taps are
// asked for in ascending order.
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

template <typename A>
int64_t whole_registers(int64_t columns) {
  const int64_t lanes = row_gemm_kernels().float_lanes / (sizeof(A) / sizeof(float));
  return (columns + lanes - 1) / lanes * lanes;
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

// Asks for a row that will be read soon: chosen rows lie anywhere, and the processor foresees none of them. It
// makes the forward product of 32 channels 1.4 times as fast.
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

// The weights of one branch, [O, Ci / groups, taps], as the kernels read them. `reversed`: for the gradient of
// the input, which multiplies rows of output channels.
template <typename A>
class TapWeights {
 public:
  template <typename T>
  TapWeights(const T* weight, const ChannelSizes& sizes, bool reversed)
      : depthwise_(sizes.is_depthwise()),
        groups_(depthwise_ ? 1 : sizes.groups),
        depth_(depthwise_ ? 1 : reversed ? sizes.out : sizes.in),
        columns_(depthwise_ ? sizes.groups : reversed ? sizes.in : sizes.out),
        padded_(whole_registers<A>(columns_)),
        taps_(sizes.taps),
        memory_(taps_ * block_elements() * groups_ * static_cast<int64_t>(sizeof(A))) {
    parallel_for(groups_ * columns_, (1 << 14) / (depth_ * taps_ + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t column = begin; column < end; ++column) {
        const int64_t group = column / columns_, c = column % columns_;
        // weight[out][in][tap]: a column is an output channel, or an input channel of all outputs of its group.
        const int64_t first = reversed && !depthwise_ ? (group * sizes.out * sizes.in + c) * taps_
                                                      : column * sizes.in * taps_;
        pack_column(weight + first, reversed ? sizes.in * taps_ : taps_, group, c);
      }
    });
    clear_padding();
  }

  bool is_depthwise() const { return depthwise_; }
  int64_t groups() const { return groups_; }
  int64_t depth() const { return depth_; }      // per group
  int64_t columns() const { return columns_; }  // per group
  int64_t padded() const { return padded_; }    // columns in whole registers
  int64_t taps() const { return taps_; }
  int64_t row_width() const { return depthwise_ ? columns_ : groups_ * depth_; }
  int64_t sums_width() const { return groups_ * padded_; }
  const A* at(int64_t tap, int64_t group) const {
    return static_cast<const A*>(memory_.at(0)) + (tap * groups_ + group) * block_elements();
  }

 private:
  int64_t block_elements() const { return depth_ * padded_; }

  // Where column c of the row `k` of a block lies: see row_gemm_cpu_kernel.h for the panels.
  struct Panel {
    int64_t first, width;
  };
  Panel panel_of(int64_t column) const {
    const int64_t lanes = whole_registers<A>(1), most = row_gemm_kernels().panel_registers * lanes;
    const int64_t first = column / most * most;
    return {first, std::min(most, padded_ - first)};
  }

  template <typename T>
  void pack_column(const T* source, int64_t depth_stride, int64_t group, int64_t c) {
    const Panel panel = panel_of(c);
    A* target = const_cast<A*>(at(0, group)) + depth_ * panel.first + (c - panel.first);
    const int64_t tap_stride = groups_ * block_elements();
    for (int64_t k = 0; k < depth_; ++k) {
      for (int64_t t = 0; t < taps_; ++t) {
        target[t * tap_stride + k * panel.width] = widen(source[k * depth_stride + t]);
      }
    }
  }

  void clear_padding() {
    if (padded_ == columns_) return;
    const Panel panel = panel_of(columns_);
    for (int64_t block = 0; block < taps_ * groups_; ++block) {
      A* target = const_cast<A*>(at(0, 0)) + block * block_elements() + depth_ * panel.first;
      for (int64_t k = 0; k < depth_; ++k) {
        for (int64_t c = columns_ - panel.first; c < panel.width; ++c) target[k * panel.width + c] = 0;
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
        kernels.multiply_channels[kPrecision<A>](pairs_.data(), chosen, weights.at(tap, 0), weights.columns());
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

// Runs f(first, count) for blocks of at most `block` of the rows, on all threads; make() makes what a task needs,
// which f gets.
template <typename Make, typename F>
void for_row_blocks(int64_t rows, int64_t block, const Make& make, const F& f) {
  const int64_t blocks = (rows + block - 1) / block;
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

// ---------------------------------------------------------------------------------------- weight gradient

// The sums of some units of a weight gradient. A unit is a tap, a group and up to kUnitChannels input channels of
// it; depthwise, all channels of a tap.
template <typename T, typename G>
class WeightUnits {
 public:
  using A = accumulator_t<T>;
  static constexpr int64_t kUnitChannels = 64;

  WeightUnits(const ChannelSizes& sizes, int64_t begin, int64_t end, bool gradient_has_bits)
      : sizes_(sizes),
        depthwise_(sizes.is_depthwise()),
        columns_(depthwise_ ? sizes.groups : whole_registers<A>(sizes.out)),
        begin_(begin),
        end_(end),
        inputs_(kRows, sizes.groups * sizes.in, false),
        outputs_(kRows, sizes.groups * sizes.out, gradient_has_bits),
        choices_(kRows),
        pairs_(kRows),
        padded_(pads() ? kRows * columns_ : 0, A(0)),
        products_((end - begin) * unit_elements(), A(0)) {}

  static int64_t units_per_tap(const ChannelSizes& sizes) {
    return sizes.is_depthwise() ? 1 : sizes.groups * slices(sizes);
  }

  // Adds the rows [first, first + count) to all units.
  template <typename Source, typename Gradient>
  void add(Source& source, const Gradient& gradient, int64_t first, int64_t count) {
    int64_t tap = -1, chosen = 0;
    for (int64_t u = begin_; u < end_; ++u) {
      const Unit unit = unit_at(u);
      if (unit.tap != tap) {
        tap = unit.tap;
        chosen = source.choose(first, count, tap, choices_.data());
        for (int64_t i = 0; i < chosen; ++i) pairs_[i].row = inputs_.read(i, choices_[i]);
        read_gradients(gradient, first, chosen);
      }
      multiply(unit, chosen);
    }
  }

  // Writes the sums into grad_weight [O, Ci / groups, taps].
  void store(T* grad_weight) const {
    for (int64_t u = begin_; u < end_; ++u) {
      const Unit unit = unit_at(u);
      const A* sums = products(unit);
      for (int64_t o = 0; o < (depthwise_ ? sizes_.groups : sizes_.out); ++o) {
        const int64_t row = (unit.group * sizes_.out + o) * sizes_.in + unit.channel;
        for (int64_t c = 0; c < unit.channels; ++c) {
          grad_weight[(row + c) * sizes_.taps + unit.tap] = narrow<T>(sums[c * columns_ + o]);
        }
      }
    }
  }

  static constexpr int64_t kRows = 128;  // of a block

 private:
  struct Unit {
    int64_t index, tap, group, channel, channels;
  };

  static int64_t slices(const ChannelSizes& sizes) { return (sizes.in + kUnitChannels - 1) / kUnitChannels; }
  bool pads() const { return !depthwise_ && columns_ != sizes_.out; }
  int64_t unit_elements() const { return (depthwise_ ? 1 : std::min(kUnitChannels, sizes_.in)) * columns_; }
  A* products(const Unit& unit) { return &products_[unit.index * unit_elements()]; }
  const A* products(const Unit& unit) const { return &products_[unit.index * unit_elements()]; }

  Unit unit_at(int64_t u) const {
    const int64_t per_tap = units_per_tap(sizes_), parts = depthwise_ ? 1 : slices(sizes_);
    const int64_t channel = u % parts * kUnitChannels;
    return {u - begin_, u / per_tap, u % per_tap / parts, channel,
            depthwise_ ? 1 : std::min(kUnitChannels, sizes_.in - channel)};
  }

  template <typename Gradient>
  void read_gradients(const Gradient& gradient, int64_t first, int64_t chosen) {
    for (int64_t i = 0; i < chosen; ++i) {
      const SignedRow g = gradient(first + choices_[i].index);
      pairs_[i].sums = const_cast<A*>(outputs_.read(i, {0, static_cast<const G*>(g.data), g.bits}));
    }
  }

  void multiply(const Unit& unit, int64_t chosen) {
    const RowGemmKernels& kernels = row_gemm_kernels();
    if (depthwise_) {
      return kernels.outer_channels[kPrecision<A>](pairs_.data(), chosen, columns_, products(unit));
    }
    const int64_t a_offset = unit.group * sizes_.in + unit.channel, g_offset = unit.group * sizes_.out;
    if (!pads()) {
      return kernels.outer[kPrecision<A>](pairs_.data(), chosen, a_offset, unit.channels, g_offset, columns_,
                                          products(unit));
    }
    // Registers read whole columns of g: rows that do not fill them are copied to rows that end in zeros.
    std::vector<RowPair> copies(pairs_.begin(), pairs_.begin() + chosen);
    for (int64_t i = 0; i < chosen; ++i) {
      copies[i].sums = &padded_[i * columns_];
      std::copy_n(static_cast<const A*>(pairs_[i].sums) + g_offset, sizes_.out, &padded_[i * columns_]);
    }
    kernels.outer[kPrecision<A>](copies.data(), chosen, a_offset, unit.channels, 0, columns_, products(unit));
  }

  const ChannelSizes& sizes_;
  bool depthwise_;
  int64_t columns_, begin_, end_;
  RowReader<T> inputs_;
  RowReader<G> outputs_;
  std::vector<Choice<T>> choices_;
  std::vector<RowPair> pairs_;  // (input row, gradient row)
  std::vector<A> padded_, products_;
};

// grad_weight[o][c][tap] = sum over rows i of g[i][o] * (row that the source chooses for i and tap)[c], summed in
// the order of the rows, whatever the number of threads: a task owns units, and passes over the rows once.
// make_source() makes a source of T rows; gradient(i) is the SignedRow of output row i, in storage G.
template <typename T, typename G, typename MakeSource, typename Gradient>
void weight_gradient(const ChannelSizes& sizes, int64_t rows, const MakeSource& make_source,
                     const Gradient& gradient, bool gradient_has_bits, T* grad_weight) {
  using Units = WeightUnits<T, G>;
  parallel_for(sizes.taps * Units::units_per_tap(sizes), 1, [&](int64_t begin, int64_t end) {
    auto source = make_source();
    Units units(sizes, begin, end, gradient_has_bits);
    for (int64_t first = 0; first < rows; first += Units::kRows) {
      units.add(source, gradient, first, std::min(Units::kRows, rows - first));
    }
    units.store(grad_weight);
  });
}

// grad_bias[o] = sum_i g[i][o], in blocks of rows that are added in their order.
template <typename T, typename G, typename Gradient>
void bias_gradient(int64_t rows, int64_t width, const Gradient& gradient, bool gradient_has_bits, T* grad_bias) {
  using A = accumulator_t<T>;
  constexpr int64_t kRows = 1024;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  std::vector<A> parts(blocks * width, A(0)), sums(width, A(0));
  const auto add = row_copy_kernels().add[static_cast<int>(kFloatTypeOf<A>)];
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    const RowReader<G> reader(1, width, gradient_has_bits);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = b * kRows; i < std::min(rows, (b + 1) * kRows); ++i) {
        const SignedRow g = gradient(i);
        add(reader.read(0, {0, static_cast<const G*>(g.data), g.bits}), width, &parts[b * width]);
      }
    }
  });
  for (int64_t b = 0; b < blocks; ++b) add(&parts[b * width], width, sums.data());
  for (int64_t c = 0; c < width; ++c) grad_bias[c] = narrow<T>(sums[c]);
}

}  // namespace effops::rowconv
