// What the ways to compute perforated_conv2d on the CPU share: checked inputs, and all elements of maps.
#pragma once

#include <optional>
#include <vector>

#include "mask_plan_cpu.h"
#include "perforated_conv2d.h"
#include "position_source_cpu.h"

namespace effops::rowconv {

// Checked inputs in the layout that the sources read.
struct PerforatedInputs {
  PerforatedShape shape;
  Tensor weight, mask;
  MaskPlan plan;
  std::optional<Tensor> bias;

  PerforatedInputs(const PerforatedShape& checked, const Tensor& weight_in, const Tensor& mask_in,
                   const std::optional<Tensor>& bias_in, const std::optional<Tensor>& positions,
                   const std::optional<Tensor>& rows)
      : shape(checked),
        weight(as_contiguous(weight_in)),
        mask(as_contiguous(mask_in)),
        plan(positions ? checked_mask_plan("perforated_conv2d", *positions, *rows) : make_mask_plan(mask)),
        bias(bias_in ? std::optional<Tensor>(as_contiguous(*bias_in)) : std::nullopt),
        positions_(plan.positions.const_data_ptr<int64_t>()),
        rows_(plan.rows.const_data_ptr<int64_t>()),
        mask_(mask.const_data_ptr()),
        mask_type_(mask.scalar_type()) {}

  int64_t kept() const { return plan.positions.size(0); }
  int64_t outputs() const { return shape.batch * shape.geometry.out_cells(); }  // positions, kept or not
  const int64_t* positions() const { return positions_; }
  const int64_t* rows() const { return rows_; }
  ChannelSizes channels() const {
    return {shape.in_channels / shape.groups, shape.out_channels / shape.groups, shape.groups,
            shape.geometry.taps()};
  }
  std::vector<int64_t> result_sizes() const {
    return {shape.batch, shape.out_channels, shape.geometry.out_height, shape.geometry.out_width};
  }

  template <typename T>
  PixelSource<T> source(const Tensor& pixels) const {
    return {shape.geometry, positions(), static_cast<const T*>(pixels.const_data_ptr()), shape.in_channels};
  }

  // The floating mask at a flat position.
  template <typename A>
  A mask_at(int64_t position) const {
    return dispatch_floating("perforated_conv2d", "mask", mask_type_, [&](auto tag) {
      using M = typename decltype(tag)::type;
      return static_cast<A>(widen(static_cast<const M*>(mask_)[position]));
    });
  }

 private:
  // Asking a tensor for its memory is a call into torch, too slow for inner loops.
  const int64_t *positions_, *rows_;
  const void* mask_;
  ScalarType mask_type_;
};

// Runs f(position, element) for all elements of maps, in the order of memory.
template <typename F>
void for_elements(const Tensor& maps, const F& f) {
  const int64_t channels = maps.size(1), cells = maps.size(2) * maps.size(3);
  const bool last = is_channels_last(maps);
  const int64_t lines = maps.size(0) * (last ? cells : channels), length = last ? channels : cells;
  parallel_for(lines, (1 << 14) / (length + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t first = last ? line : line / channels * cells, step = last ? 0 : 1;
      for (int64_t i = 0; i < length; ++i) f(first + i * step, line * length + i);
    }
  });
}

}  // namespace effops::rowconv
