// Gradients of weights and biases of convolutions at chosen positions on the CPU: sums of outer products of
// rows.
#pragma once

#include "row_gemm_cpu.h"

namespace effops::rowconv {

// The sums of some units of a weight gradient. A unit is a tap, a group and up to kUnitChannels input
// channels of it; depthwise, all channels of a tap.
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

  static int64_t slices(const ChannelSizes& sizes) { return divide_up(sizes.in, kUnitChannels); }
  bool pads() const { return !depthwise_ && columns_ != sizes_.out; }
  int64_t unit_elements() const { return (depthwise_ ? 1 : std::min(kUnitChannels, sizes_.in)) * columns_; }
  A* products(const Unit& unit) { return products_.data() + unit.index * unit_elements(); }
  const A* products(const Unit& unit) const { return products_.data() + unit.index * unit_elements(); }

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
    copies_.assign(pairs_.begin(), pairs_.begin() + chosen);
    for (int64_t i = 0; i < chosen; ++i) {
      copies_[i].sums = &padded_[i * columns_];
      std::copy_n(static_cast<const A*>(pairs_[i].sums) + g_offset, sizes_.out, &padded_[i * columns_]);
    }
    kernels.outer[kPrecision<A>](copies_.data(), chosen, a_offset, unit.channels, 0, columns_,
                                 products(unit));
  }

  const ChannelSizes& sizes_;
  bool depthwise_;
  int64_t columns_, begin_, end_;
  RowReader<T> inputs_;
  RowReader<G> outputs_;
  std::vector<Choice<T>> choices_;
  std::vector<RowPair> pairs_, copies_;  // (input row, gradient row)
  std::vector<A> padded_, products_;
};

// grad_weight[o][c][tap] = sum over rows i of g[i][o] * (row that the source chooses for i and tap)[c],
// summed in the order of the rows, whatever the number of threads: a task owns units, and passes over the
// rows once. make_source() makes a source of T rows; gradient(i) is the SignedRow of output row i, in storage
// G.
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
void bias_gradient(int64_t rows, int64_t width, const Gradient& gradient, bool gradient_has_bits,
                   T* grad_bias) {
  using A = accumulator_t<T>;
  constexpr int64_t kRows = 1024;
  const int64_t blocks = divide_up(rows, kRows);
  std::vector<A> parts(blocks * width, A(0)), sums(width, A(0));
  const auto add = row_copy_kernels().add[static_cast<int>(kFloatTypeOf<A>)];
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    const RowReader<G> reader(1, width, gradient_has_bits);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = b * kRows; i < std::min(rows, (b + 1) * kRows); ++i) {
        const SignedRow g = gradient(i);
        add(reader.read(0, {0, static_cast<const G*>(g.data), g.bits}), width, parts.data() + b * width);
      }
    }
  });
  for (int64_t b = 0; b < blocks; ++b) add(parts.data() + b * width, width, sums.data());
  for (int64_t c = 0; c < width; ++c) grad_bias[c] = narrow<T>(sums[c]);
}

}  // namespace effops::rowconv
