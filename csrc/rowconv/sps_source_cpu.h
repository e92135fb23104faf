// What the taps of a convolution over an SPS read: the sources of row_gemm_cpu.h.
#pragma once

#include <vector>

#include "geometry_math.h"
#include "row_gemm_cpu.h"
#include "sps_cpu.h"

namespace effops::rowconv {

// Where the cells of a tap lie from those of the output.
struct TapOffset {
  int64_t y, x;
};

inline TapOffset offset_of(const Geometry& g, int64_t tap) {
  return {tap / g.kernel_width * g.dilation_y - g.padding_y,
          tap % g.kernel_width * g.dilation_x - g.padding_x};
}

// The map and the cells of the active rows, checked.
template <typename Id>
struct IdMap {
  const Id* ids;  // [R, H, W]
  const int32_t* roi;
  const int32_t* xy;
  int64_t height, width;

  // Calls f(i, id) for those of the rows [first, first + count) whose cell, moved by the offset, is inside
  // the map.
  template <typename F>
  void for_neighbors(int64_t first, int64_t count, TapOffset offset, const F& f) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i, y = xy[2 * row + 1] + offset.y, x = xy[2 * row] + offset.x;
      if (y < 0 || y >= height || x < 0 || x >= width) continue;
      f(i, static_cast<int64_t>(ids[(roi[row] * height + y) * width + x]));
    }
  }
};

// Forward: the features of the neighbours, active and passive.
template <typename T, typename Id>
struct NeighborSource {
  IdMap<Id> map;
  Geometry geometry;
  const T *active, *passive;
  int64_t num_active, features;

  int64_t choose(int64_t first, int64_t count, int64_t tap, Choice<T>* chosen) const {
    Choice<T>* next = chosen;
    map.for_neighbors(first, count, offset_of(geometry, tap), [&](int64_t i, int64_t id) {
      const bool is_active = id < num_active;
      const T* rows = is_active ? active : passive;
      const T* row = rows + (is_active ? id : id - num_active) * features;
      prefetch_row(row, features);
      *next++ = {i, row, nullptr};
    });
    return next - chosen;
  }
};

// Gradients of outputs, in storage, with their signs if there are any.
template <typename T>
struct GradRows {
  const T* data;        // [NA, O]
  const uint8_t* bits;  // [NA, ceil(O / 8)] of one branch, or null
  int64_t width;

  const T* row(int64_t i) const { return data + i * width; }
  const uint8_t* signs(int64_t i) const { return bits ? bits + i * ((width + 7) / 8) : nullptr; }
  SignedRow signed_row(int64_t i) const { return {row(i), signs(i)}; }
};

// Gradient of the active rows: an active row stands in one cell, so that the outputs that read it stand in
// the cells that lie against the offsets.
template <typename T, typename Id>
struct ReaderSource {
  IdMap<Id> map;
  Geometry geometry;
  GradRows<T> grad;
  int64_t num_active;

  int64_t choose(int64_t first, int64_t count, int64_t tap, Choice<T>* chosen) const {
    const TapOffset forward = offset_of(geometry, tap);
    Choice<T>* next = chosen;
    map.for_neighbors(first, count, {-forward.y, -forward.x}, [&](int64_t i, int64_t id) {
      if (id >= num_active) return;
      prefetch_row(grad.row(id), grad.width);
      *next++ = {i, grad.row(id), grad.signs(id)};
    });
    return next - chosen;
  }
};

// For each passive row the active rows that read it, in the order of taps, then of rows.
class PassiveReaders {
 public:
  template <typename Id>
  PassiveReaders(const IdMap<Id>& map, const Geometry& geometry, int64_t num_active, int64_t num_passive)
      : begin_(num_passive + 1, 0) {
    const auto for_reads = [&](const auto& f) {
      for (int64_t tap = 0; tap < geometry.taps(); ++tap) {
        map.for_neighbors(0, num_active, offset_of(geometry, tap), [&](int64_t row, int64_t id) {
          if (id >= num_active) f(id - num_active, Read{row, tap});
        });
      }
    };
    for_reads([&](int64_t passive, Read) { ++begin_[passive + 1]; });
    for (int64_t p = 0; p < num_passive; ++p) begin_[p + 1] += begin_[p];
    reads_.resize(begin_.back());
    std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
    for_reads([&](int64_t passive, Read read) { reads_[next[passive]++] = read; });
  }

  struct Read {
    int64_t row, tap;
  };
  const Read* begin(int64_t passive) const { return reads_.data() + begin_[passive]; }
  const Read* end(int64_t passive) const { return reads_.data() + begin_[passive + 1]; }

 private:
  std::vector<int64_t> begin_;
  std::vector<Read> reads_;
};

// Gradient of the passive rows: the gradients of all outputs that read a row through one tap are added up
// first.
template <typename T>
class PassiveSource {
 public:
  using A = accumulator_t<T>;

  PassiveSource(const PassiveReaders& readers, const GradRows<T>& grad)
      : readers_(readers),
        grad_(grad),
        reader_(1, grad.width, grad.bits != nullptr),
        next_(kBlockRows),
        sums_(kBlockRows * grad.width) {}

  int64_t choose(int64_t first, int64_t count, int64_t tap, Choice<A>* chosen) {
    const auto add = row_copy_kernels().add[static_cast<int>(kFloatTypeOf<A>)];
    Choice<A>* out = chosen;
    for (int64_t i = 0; i < count; ++i) {
      const PassiveReaders::Read* read = tap == 0 ? readers_.begin(first + i) : next_[i];
      const PassiveReaders::Read* const end = readers_.end(first + i);
      A* sum = sums_.data() + i * grad_.width;
      const A* row = nullptr;
      for (; read < end && read->tap == tap; ++read) {
        const A* values = reader_.read(0, {0, grad_.row(read->row), grad_.signs(read->row)});
        if (row == nullptr && !reader_.copies()) {
          row = values;  // the only one, mostly
          prefetch_row(row, grad_.width);
          continue;
        }
        if (row != sum) {
          if (row == nullptr) {
            std::fill_n(sum, grad_.width, A(0));
          } else {
            std::copy_n(row, grad_.width, sum);
          }
          row = sum;
        }
        add(values, grad_.width, sum);
      }
      next_[i] = read;
      if (row != nullptr) *out++ = {i, row, nullptr};
    }
    return out - chosen;
  }

 private:
  const PassiveReaders& readers_;
  GradRows<T> grad_;
  RowReader<T> reader_;
  std::vector<const PassiveReaders::Read*> next_;  // of each row of the block
  std::vector<A> sums_;
};

}  // namespace effops::rowconv
