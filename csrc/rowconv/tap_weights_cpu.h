// Weights of convolutions at chosen positions, packed as the kernels read them (row_gemm_cpu_kernel.h).
#pragma once

#include <algorithm>

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "pair_gemm_cpu_kernel.h"

namespace effops::rowconv {

template <typename A>
constexpr int kPrecision = sizeof(A) == 8 ? 1 : 0;  // index into the kernels' pairs

template <typename A>
int64_t whole_registers(int64_t columns) {
  const int64_t lanes = row_gemm_kernels().float_lanes / (sizeof(A) / sizeof(float));
  return divide_up(columns, lanes) * lanes;
}

// How the channels of a convolution's input and output are grouped.
struct ChannelSizes {
  int64_t in, out;  // per group
  int64_t groups, taps;

  bool is_depthwise() const { return in == 1 && out == 1 && groups > 1; }
};

// What the products read: the rows of features as they are stored, or accumulators.
enum class RowsOf { kStorage, kAccumulators };

// The weights of one branch, [O, Ci / groups, taps]. `reversed`: for the gradient of the input, which
// multiplies rows of output channels. bfloat16 weights of bfloat16 rows stay what they are where the
// processor multiplies pairs of them; all others become accumulators.
template <typename A>
class TapWeights {
 public:
  template <typename T>
  TapWeights(const T* weight, const ChannelSizes& sizes, bool reversed, RowsOf rows)
      : depthwise_(sizes.is_depthwise()),
        reversed_(reversed && !depthwise_),
        has_pairs_(std::is_same_v<T, bf16> && rows == RowsOf::kStorage && !depthwise_ &&
                   multiply_pairs() != nullptr),
        groups_(depthwise_ ? 1 : sizes.groups),
        depth_(depthwise_ ? 1 : (reversed ? sizes.out : sizes.in)),
        columns_(depthwise_ ? sizes.groups : (reversed ? sizes.in : sizes.out)),
        padded_(whole_registers<A>(columns_)),
        taps_(sizes.taps),
        memory_(taps_ * tap_stride() * element_bytes()) {
    if constexpr (std::is_same_v<T, bf16>) {
      if (has_pairs_) pack_panels<bf16, 2>(weight);
    }
    if (!has_pairs_) pack_panels<A, 1>(weight);
  }

  bool is_depthwise() const { return depthwise_; }
  bool has_pairs() const { return has_pairs_; }
  int64_t groups() const { return groups_; }
  int64_t depth() const { return depth_; }      // per group
  int64_t columns() const { return columns_; }  // per group
  int64_t padded() const { return padded_; }    // columns in whole registers
  int64_t taps() const { return taps_; }
  int64_t row_width() const { return depthwise_ ? columns_ : groups_ * depth_; }
  int64_t sums_width() const { return groups_ * padded_; }
  const void* at(int64_t tap, int64_t group) const {
    return memory_.at((tap * tap_stride() + group * block_elements()) * element_bytes());
  }

 private:
  // Of a group: `columns` of the `width` columns hold weights, the others zeros.
  struct Panel {
    int64_t group, first, width, columns;
  };

  static int64_t panel_width() { return row_gemm_kernels().panel_registers * whole_registers<A>(1); }
  int64_t element_bytes() const { return has_pairs_ ? sizeof(bf16) : sizeof(A); }
  int64_t padded_depth() const { return has_pairs_ ? divide_up(depth_, 2) * 2 : depth_; }
  int64_t block_elements() const { return padded_depth() * padded_; }
  // A line more: packing writes to all taps in turns, which must not fall into the same cache set.
  int64_t tap_stride() const { return groups_ * block_elements() + 64 / element_bytes(); }

  // E: what is packed; kTogether: how many elements of a column lie next to each other.
  template <typename E, int kTogether, typename T>
  void pack_panels(const T* weight) {
    const int64_t panels = divide_up(padded_, panel_width());
    parallel_for(groups_ * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t group = p / panels, first = p % panels * panel_width();
        const Panel panel{group, first, std::min(panel_width(), padded_ - first),
                          std::min(panel_width(), columns_ - first)};
        E* target = static_cast<E*>(memory_.at(0)) + group * block_elements() + padded_depth() * first;
        if (panel.columns < panel.width || depth_ < padded_depth()) {
          for (int64_t t = 0; t < taps_; ++t) {
            std::fill_n(target + t * tap_stride(), padded_depth() * panel.width, E{});
          }
        }
        const T* source = weight + group * columns_ * depth_ * taps_;
        if (reversed_) {
          pack_reversed<E, kTogether>(source, panel, target);
        } else {
          pack<E, kTogether>(source + first * depth_ * taps_, panel, target);
        }
      }
    });
  }

  // Where the element of row k and column 0 lies in a panel.
  template <int kTogether>
  static int64_t place(int64_t k, const Panel& panel) {
    return k / kTogether * kTogether * panel.width + k % kTogether;
  }

  template <typename E, typename T>
  static E converted(T weight) {
    if constexpr (std::is_same_v<E, T>) {
      return weight;
    } else {
      return widen(weight);
    }
  }

  // source: [columns][depth][taps]. A line of it at a time, for all columns: what is written stays in the
  // cache.
  template <typename E, int kTogether, typename T>
  void pack(const T* source, const Panel& panel, E* target) const {
    constexpr int64_t kLine = 16;
    const int64_t length = depth_ * taps_;
    for (int64_t begin = 0; begin < length; begin += kLine) {
      const int64_t count = std::min(kLine, length - begin);
      E* to[kLine];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t k = (begin + i) / taps_, t = (begin + i) % taps_;
        to[i] = target + t * tap_stride() + place<kTogether>(k, panel);
      }
      for (int64_t c = 0; c < panel.columns; ++c) {
        const T* from = source + c * length + begin;
        for (int64_t i = 0; i < count; ++i) to[i][c * kTogether] = converted<E>(from[i]);
      }
    }
  }

  // source: [depth][columns of the group][taps].
  template <typename E, int kTogether, typename T>
  void pack_reversed(const T* source, const Panel& panel, E* target) const {
    for (int64_t k = 0; k < depth_; ++k) {
      const T* from = source + (k * columns_ + panel.first) * taps_;
      E* to = target + place<kTogether>(k, panel);
      for (int64_t c = 0; c < panel.columns; ++c) {
        for (int64_t t = 0; t < taps_; ++t) {
          to[t * tap_stride() + c * kTogether] = converted<E>(from[c * taps_ + t]);
        }
      }
    }
  }

  bool depthwise_, reversed_, has_pairs_;
  int64_t groups_, depth_, columns_, padded_, taps_;
  Scratch memory_;
};

}  // namespace effops::rowconv
