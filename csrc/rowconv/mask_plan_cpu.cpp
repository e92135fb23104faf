// plan_mask on the CPU, and the nearest kept position of each position.
#include "mask_plan_cpu.h"

#include <algorithm>
#include <tuple>

#include "../common/parallel.h"
#include "../common/scratch.h"

namespace effops::rowconv {
namespace {

constexpr int64_t kBlock = 1024;  // positions that are counted at a time
constexpr int64_t kGrain = 1 << 15;  // positions of a task, at least

// ---------------------------------------------------------------- plan

// Calls f(values, the bits that make a value differ from 0): all bits but the sign.
template <typename F>
decltype(auto) with_mask_bits(const Tensor& mask, const F& f) {
  const void* data = mask.const_data_ptr();
  switch (mask.element_size()) {
    case 1: return f(static_cast<const uint8_t*>(data), uint8_t{0xff});
    case 2: return f(static_cast<const uint16_t*>(data), uint16_t{0x7fff});
    case 4: return f(static_cast<const uint32_t*>(data), uint32_t{0x7fffffff});
    default: return f(static_cast<const uint64_t*>(data), uint64_t{0x7fffffffffffffff});
  }
}

// How many positions are kept before each block; the last entry: how many there are.
template <typename Bits>
std::vector<int64_t> count_kept(const Bits* values, Bits value_bits, int64_t positions) {
  const int64_t blocks = divide_up(positions, kBlock);
  std::vector<int64_t> before(blocks + 1, 0);
  parallel_for(blocks, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t last = std::min((b + 1) * kBlock, positions);
      int32_t kept = 0;
      for (int64_t i = b * kBlock; i < last; ++i) kept += (values[i] & value_bits) != 0;
      before[b + 1] = kept;
    }
  });
  for (int64_t b = 0; b < blocks; ++b) before[b + 1] += before[b];
  return before;
}

template <typename Bits>
void write_plan(const Bits* values, Bits value_bits, const std::vector<int64_t>& before,
                const MaskPlan& plan) {
  auto* positions = static_cast<int64_t*>(plan.positions.mutable_data_ptr());
  auto* rows = static_cast<int64_t*>(plan.rows.mutable_data_ptr());
  const int64_t number = plan.rows.numel(), blocks = static_cast<int64_t>(before.size()) - 1;
  parallel_for(blocks, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t kept[kBlock + 1];  // one more: what lies after the last one is overwritten
      int64_t found = 0;
      for (int64_t i = b * kBlock, last = std::min(i + kBlock, number); i < last; ++i) {
        const int64_t is_kept = (values[i] & value_bits) != 0;
        rows[i] = (before[b] + found) | (is_kept - 1);  // a branch would often be foreseen wrongly
        kept[found] = i;
        found += is_kept;
      }
      std::copy_n(kept, found, positions + before[b]);
    }
  });
}

std::tuple<Tensor, Tensor> plan_mask(const Tensor& mask) {  // [N, Ho, Wo]
  check_mask("plan_mask", mask);
  const MaskPlan plan = make_mask_plan(mask);
  return {plan.positions, plan.rows};
}

// ---------------------------------------------------------------- nearest kept position

// The nearest row of the same column that holds a kept position, -1: none; the upper one of two.
void find_in_columns(const int64_t* rows, int64_t height, int64_t width, int64_t begin, int64_t end,
                     int32_t* nearest) {
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = begin; x < end; ++x) {
      const int32_t above = y > 0 ? nearest[(y - 1) * width + x] : -1;
      nearest[y * width + x] = rows[y * width + x] >= 0 ? static_cast<int32_t>(y) : above;
    }
  }
  for (int64_t y = height - 2; y >= 0; --y) {
    const auto row = static_cast<int32_t>(y);
    for (int64_t x = begin; x < end; ++x) {
      const int32_t above = nearest[y * width + x], below = nearest[(y + 1) * width + x];
      // `below` is that of the next row: it may lie above this one, and then it is `above`.
      const bool is_nearer = below > row && (above < 0 || below - row < row - above);
      nearest[y * width + x] = is_nearer ? below : above;
    }
  }
}

// The columns whose kept positions are the nearest ones somewhere in row y, in order: each from x = begin on
// to the begin of the next one. A lower envelope of parabolas (x - column)^2 + (distance in the column)^2.
class Envelope {
 public:
  explicit Envelope(int64_t width) : width_(width), regions_(width) {}

  // nearest: of row y, as found in the columns. Calls f(x, column, row) for all x, if there is any position.
  template <typename F>
  void find(const int32_t* nearest, int64_t y, const F& f) {
    int64_t number = 0;
    for (int64_t column = 0; column < width_; ++column) {
      if (nearest[column] < 0) continue;
      const int64_t row = nearest[column], square = (row - y) * (row - y) + column * column;
      Region region{0, column, row, square};
      while (number > 0 && is_nearer(region, regions_[number - 1], regions_[number - 1].begin)) --number;
      if (number > 0) region.begin = first_nearer(region, regions_[number - 1]);
      if (region.begin < width_) regions_[number++] = region;
    }
    for (int64_t i = 0; i < number; ++i) {
      const int64_t end = i + 1 < number ? regions_[i + 1].begin : width_;
      for (int64_t x = regions_[i].begin; x < end; ++x) f(x, regions_[i].column, regions_[i].row);
    }
  }

 private:
  struct Region {
    int64_t begin, column, row;
    int64_t square;  // distance at x = 0, squared
  };

  // Whether at x `right` is nearer than `left`, or as near and the lower position.
  static bool is_nearer(const Region& right, const Region& left, int64_t x) {
    const int64_t excess = right.square - left.square - 2 * (right.column - left.column) * x;
    return excess < 0 || (excess == 0 && right.row < left.row);
  }

  // The first x at which it is, if it is not at 0.
  static int64_t first_nearer(const Region& right, const Region& left) {
    const int64_t x = (right.square - left.square) / (2 * (right.column - left.column));
    return is_nearer(right, left, x) ? x : x + 1;
  }

  int64_t width_;
  std::vector<Region> regions_;
};

}  // namespace

MaskPlan make_mask_plan(const Tensor& mask) {
  const Tensor contiguous = as_contiguous(mask);
  return with_mask_bits(contiguous, [&](const auto* values, auto value_bits) {
    const std::vector<int64_t> before = count_kept(values, value_bits, mask.numel());
    const MaskPlan plan{empty_of(mask, {before.back()}, ScalarType::Long),
                        empty_of(mask, {mask.size(0), mask.size(1), mask.size(2)}, ScalarType::Long)};
    write_plan(values, value_bits, before, plan);
    return plan;
  });
}

MaskPlan checked_mask_plan(const char* op, const Tensor& positions, const Tensor& rows) {
  const MaskPlan plan{as_contiguous(positions), as_contiguous(rows)};
  const int64_t kept = positions.numel(), number = rows.numel();
  const auto* position = static_cast<const int64_t*>(plan.positions.const_data_ptr());
  const auto* row = static_cast<const int64_t*>(plan.rows.const_data_ptr());
  for (int64_t k = 0; k < kept; ++k) {
    const int64_t least = k > 0 ? position[k - 1] + 1 : 0;
    if (position[k] < least || position[k] >= number) {
      fail(op, ": expected positions ascending in [0, ", number, "), got ", position[k]);
    }
    if (row[position[k]] != k) {
      fail(op, ": expected rows to be ", k, " at position ", position[k], ", got ", row[position[k]]);
    }
  }
  const int64_t others = std::count(row, row + number, -1);
  if (others != number - kept) {
    fail(op, ": expected rows to be -1 at ", number - kept, " positions, got ", others);
  }
  return plan;
}

Tensor nearest_rows(const Tensor& rows) {
  const Tensor contiguous = as_contiguous(rows);
  const auto* row_of = static_cast<const int64_t*>(contiguous.const_data_ptr());
  const int64_t images = rows.size(0), height = rows.size(1), width = rows.size(2), image = height * width;
  const Tensor output = empty_of(rows, {images, height, width});
  auto* out = static_cast<int64_t*>(output.mutable_data_ptr());
  const Scratch columns(rows.numel() * static_cast<int64_t>(sizeof(int32_t)));
  auto* nearest = static_cast<int32_t*>(columns.at(0));
  constexpr int64_t kColumns = 256;  // of a task
  const int64_t pieces = divide_up(width, kColumns);
  parallel_for(images * pieces, kGrain / (kColumns * (height + 1)) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / pieces * image, column = task % pieces * kColumns;
      find_in_columns(row_of + first, height, width, column, std::min(column + kColumns, width),
                      nearest + first);
    }
  });
  parallel_for(images * height, kGrain / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    Envelope envelope(width);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t* rows_of_image = row_of + line / height * image;
      int64_t* to = out + line * width;
      std::fill_n(to, width, -1);
      envelope.find(nearest + line * width, line % height, [&](int64_t x, int64_t column, int64_t row) {
        to[x] = rows_of_image[row * width + column];
      });
    }
  });
  return output;
}

}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) { m.impl("plan_mask", TORCH_BOX(&effops::rowconv::plan_mask)); }
