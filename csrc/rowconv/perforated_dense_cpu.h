// perforated_conv2d by torch's dense convolution, for masks that keep most positions.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "dense_conv2d.h"
#include "perforated_cpu.h"

namespace effops::rowconv {

// From which share of kept positions on the dense convolution is faster. Measured on Zen 4 with one thread
// over 1 x 1 and 3 x 3 kernels of 3 to 256 channels: it depends on the arithmetic per element that choosing
// moves, and on the part of the registers that a group's columns fill. torch's convolutions of float64, of
// float16, and of bfloat16 without instructions for it, are slower than choosing all positions.
inline double break_even(const PerforatedShape& shape, ScalarType dtype) {
  const bool is_fast = dtype == ScalarType::Float ||
                       (dtype == ScalarType::BFloat16 && multiply_pairs() != nullptr && !shape.float_mask);
  if (!is_fast) return 2;  // never
  const int64_t inputs = shape.in_channels / shape.groups, outputs = shape.out_channels / shape.groups;
  const double per_element = static_cast<double>(2 * shape.geometry.taps() * inputs * shape.out_channels) /
                             static_cast<double>(shape.in_channels + shape.out_channels);
  const double filled = inputs == 1 && outputs == 1
                            ? 1  // depthwise: the columns are the groups
                            : static_cast<double>(outputs) /
                                  static_cast<double>(whole_registers<float>(outputs));
  return std::max(0.15, 0.88 * filled * per_element / (per_element + 150));
}

// Small problems are not worth the call of another op.
inline bool prefers_dense(const PerforatedInputs& inputs, ScalarType dtype) {
  constexpr double kSmallProducts = 1e6;
  const PerforatedShape& shape = inputs.shape;
  const double products = static_cast<double>(inputs.outputs()) *
                          static_cast<double>(shape.geometry.taps() * shape.in_channels / shape.groups) *
                          static_cast<double>(shape.out_channels);
  return products > kSmallProducts && static_cast<double>(inputs.kept()) >
                                          break_even(shape, dtype) * static_cast<double>(inputs.outputs());
}

template <typename T>
void multiply_by_mask(const PerforatedInputs& inputs, const Tensor& maps) {
  using A = accumulator_t<T>;
  std::vector<A> factor(inputs.outputs());
  for (int64_t p = 0; p < inputs.outputs(); ++p) factor[p] = inputs.mask_at<A>(p);
  T* data = static_cast<T*>(maps.mutable_data_ptr());
  for_elements(maps, [&](int64_t position, int64_t element) {
    data[element] = narrow<T>(widen(data[element]) * factor[position]);
  });
}

template <int kBytes>
using Bits = std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>;

// Positions that are not kept get the elements of `other`, laid out as the maps, or 0.
template <typename T>
void fill_skipped(const PerforatedInputs& inputs, const void* other, const Tensor& maps) {
  using B = Bits<sizeof(T)>;
  const int64_t channels = inputs.shape.out_channels, cells = inputs.shape.geometry.out_cells();
  B* data = static_cast<B*>(maps.mutable_data_ptr());
  const B* fill = static_cast<const B*>(other);
  if (is_channels_last(maps)) {
    for (int64_t p = 0; p < inputs.outputs(); ++p) {
      if (inputs.rows()[p] >= 0) continue;
      for (int64_t c = p * channels; c < (p + 1) * channels; ++c) data[c] = fill ? fill[c] : B{0};
    }
    return;
  }
  std::vector<B> keep(inputs.outputs());  // a mask of bits, so that the loop over a plane has no branches
  for (int64_t p = 0; p < inputs.outputs(); ++p)
    keep[p] = inputs.rows()[p] >= 0 ? static_cast<B>(~B{0}) : B{0};
  parallel_for(inputs.shape.batch * channels, (1 << 14) / (cells + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const B* mask = &keep[plane / channels * cells];
      B* to = data + plane * cells;
      for (int64_t i = 0; fill == nullptr && i < cells; ++i) to[i] &= mask[i];
      for (int64_t i = 0; fill != nullptr && i < cells; ++i) {
        to[i] = static_cast<B>((to[i] & mask[i]) | (fill[plane * cells + i] & ~mask[i]));
      }
    }
  });
}

// The dense convolution, of which the kept positions are used. Replaces `output`.
template <typename T>
void run_dense(const PerforatedInputs& inputs, const Tensor& x, const std::optional<Tensor>& base,
               Tensor& output) {
  const Geometry& g = inputs.shape.geometry;
  const Tensor maps = is_channels_last(x) ? x : as_contiguous(x);
  const Tensor dense = dense_conv2d(maps, inputs.weight, inputs.bias, {g.stride_y, g.stride_x},
                                    {g.padding_y, g.padding_x}, {g.dilation_y, g.dilation_x},
                                    inputs.shape.groups);
  if (is_channels_last(dense) == is_channels_last(output) &&
      (is_channels_last(dense) || dense.is_contiguous())) {
    output = dense;
  } else {
    torch::stable::copy_(output, dense);
  }
  if (inputs.shape.float_mask) multiply_by_mask<T>(inputs, output);
  if (inputs.kept() == inputs.outputs()) return;
  const std::optional<Tensor> other = base ? std::optional<Tensor>(new_maps(output, inputs.result_sizes()))
                                           : base;
  if (base) {
    Tensor target = *other;
    torch::stable::copy_(target, *base);
  }
  fill_skipped<T>(inputs, other ? other->const_data_ptr() : nullptr, output);
}

// The gradients of x, weight and bias (null: not needed) of a mask that keeps everything.
template <typename T>
void run_dense_backward(const PerforatedInputs& inputs, const Tensor& grad_output, const Tensor& x,
                        const std::array<const Tensor*, 3>& gradients) {
  const Geometry& g = inputs.shape.geometry;
  const Tensor maps = is_channels_last(x) ? x : as_contiguous(x);
  Tensor grad = new_maps(x, inputs.result_sizes());
  torch::stable::copy_(grad, grad_output);
  if (inputs.shape.float_mask) multiply_by_mask<T>(inputs, grad);
  const auto [grad_x, grad_weight, grad_bias] =
      dense_conv2d_backward(grad, maps, inputs.weight, {g.stride_y, g.stride_x}, {g.padding_y, g.padding_x},
                            {g.dilation_y, g.dilation_x}, inputs.shape.groups,
                            {gradients[0] != nullptr, gradients[1] != nullptr, gradients[2] != nullptr});
  const std::array<const Tensor*, 3> found = {&grad_x, &grad_weight, &grad_bias};
  for (size_t i = 0; i < found.size(); ++i) {
    if (gradients[i] == nullptr) continue;
    Tensor target = *gradients[i];
    torch::stable::copy_(target, *found[i]);
  }
}

}  // namespace effops::rowconv
