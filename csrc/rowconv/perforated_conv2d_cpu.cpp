// perforated_conv2d on the CPU: checks, plans, fills, tasks. The kernels are in row_gemm_cpu_kernel.cpp.
#include "perforated_conv2d.h"

#include "dense_conv2d.h"
#include "mask_plan_cpu.h"
#include "position_source_cpu.h"

namespace effops::rowconv {
namespace {

constexpr const char* kOp = "perforated_conv2d";

// Checked inputs in the layout that the sources read.
struct Inputs {
  PerforatedShape shape;
  Tensor weight, mask;
  MaskPlan plan;
  std::optional<Tensor> bias;

  Inputs(const PerforatedShape& checked, const Tensor& weight_in, const Tensor& mask_in,
         const std::optional<Tensor>& bias_in, const std::optional<Tensor>& positions,
         const std::optional<Tensor>& rows)
      : shape(checked),
        weight(as_contiguous(weight_in)),
        mask(as_contiguous(mask_in)),
        plan(positions ? checked_mask_plan(kOp, *positions, *rows) : make_mask_plan(mask)),
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
    return dispatch_floating(kOp, "mask", mask_type_, [&](auto tag) {
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

// Calls emit(first kept row, count, block) with conv(x) + bias of blocks of kept positions.
template <typename T, typename Emit>
void convolve_kept(const Inputs& inputs, const Tensor& pixels, const Emit& emit) {
  const TapWeights<accumulator_t<T>> weights(static_cast<const T*>(inputs.weight.const_data_ptr()),
                                             inputs.channels(), false);
  const auto bias = inputs.bias ? widened(static_cast<const T*>(inputs.bias->const_data_ptr()),
                                          inputs.shape.out_channels)
                                : std::vector<accumulator_t<T>>();
  convolve_positions(weights, inputs.source<T>(pixels), inputs.kept(), bias, emit);
}

// ---------------------------------------------------------------------------------------- fills

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

// Every position that is not kept gets what the nearest kept one has.
template <typename T>
void copy_nearest(const Inputs& inputs, const Tensor& output) {
  const Tensor nearest = nearest_rows(inputs.plan.rows);
  const auto* row_of = nearest.const_data_ptr<int64_t>();
  const int64_t step = is_channels_last(output) ? output.size(1) : 1;  // between the elements of two positions
  T* data = static_cast<T*>(output.mutable_data_ptr());
  for_elements(output, [&](int64_t position, int64_t element) {
    if (inputs.rows()[position] >= 0 || row_of[position] < 0) return;
    data[element] = data[element + (inputs.positions()[row_of[position]] - position) * step];
  });
}

// Elements of kept positions become 0.
template <typename T>
void clear_kept(const Inputs& inputs, const Tensor& maps) {
  T* data = static_cast<T*>(maps.mutable_data_ptr());
  for_elements(maps, [&](int64_t position, int64_t element) {
    data[element] = inputs.rows()[position] < 0 ? data[element] : T{};
  });
}

// ---------------------------------------------------------------------------------------- forward

template <typename T>
void run_gathered(const Inputs& inputs, const Tensor& x, const std::optional<Tensor>& base, const Tensor& output) {
  using A = accumulator_t<T>;
  if (base) {
    Tensor target = output;
    torch::stable::copy_(target, *base);
  } else if (inputs.kept() < inputs.outputs()) {
    memset(output.mutable_data_ptr(), 0, output.numel() * output.element_size());
  }
  const MapWriter<T> writer(output);
  const int64_t width = inputs.shape.out_channels;
  convolve_kept<T>(inputs, channel_rows(x), [&](int64_t first, int64_t count, ProductBlock<T>& block) {
    const int64_t* positions = inputs.positions() + first;
    for (int64_t i = 0; inputs.shape.float_mask && i < count; ++i) {
      const A factor = inputs.mask_at<A>(positions[i]);
      A* row = block.sums(i);
      for (int64_t c = 0; c < width; ++c) row[c] *= factor;
    }
    writer.write(positions, count, [&](int64_t i) { return block.sums(i); });
  });
}

// From which share of kept positions on the dense convolution is faster. Measured on Zen 4 with one thread over
// 1 x 1 and 3 x 3 kernels of 3 to 256 channels: it depends on the arithmetic per element that choosing moves.
// float64 and float16 convolutions of torch are slower than choosing all positions.
double break_even(const PerforatedShape& shape, ScalarType dtype) {
  const int64_t moved = shape.in_channels + shape.out_channels;
  const double products =
      static_cast<double>(2 * shape.geometry.taps() * (shape.in_channels / shape.groups) * shape.out_channels);
  const double per_element = products / static_cast<double>(moved);
  const double most = dtype == ScalarType::Float ? 0.88 : dtype == ScalarType::BFloat16 ? 0.44 : 2.0;
  return most > 1 ? most : std::max(0.15, most * per_element / (per_element + 150));
}

// Small problems are not worth the call of another op.
bool prefers_dense(const Inputs& inputs, ScalarType dtype) {
  constexpr double kSmallProducts = 1e6;
  const PerforatedShape& shape = inputs.shape;
  const double products = static_cast<double>(inputs.outputs()) *
                          static_cast<double>(shape.geometry.taps() * shape.in_channels / shape.groups) *
                          static_cast<double>(shape.out_channels);
  return products > kSmallProducts && static_cast<double>(inputs.kept()) >
                                          break_even(shape, dtype) * static_cast<double>(inputs.outputs());
}

template <typename T>
void multiply_by_mask(const Inputs& inputs, const Tensor& maps) {
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
void fill_skipped(const Inputs& inputs, const void* other, const Tensor& maps) {
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
  for (int64_t p = 0; p < inputs.outputs(); ++p) keep[p] = inputs.rows()[p] >= 0 ? static_cast<B>(~B{0}) : B{0};
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
void run_dense(const Inputs& inputs, const Tensor& x, const std::optional<Tensor>& base, Tensor& output) {
  const Geometry& g = inputs.shape.geometry;
  const Tensor maps = is_channels_last(x) ? x : as_contiguous(x);
  const Tensor dense = dense_conv2d(maps, inputs.weight, inputs.bias, {g.stride_y, g.stride_x},
                                    {g.padding_y, g.padding_x}, {g.dilation_y, g.dilation_x}, inputs.shape.groups);
  if (is_channels_last(dense) == is_channels_last(output) && (is_channels_last(dense) || dense.is_contiguous())) {
    output = dense;
  } else {
    torch::stable::copy_(output, dense);
  }
  if (inputs.shape.float_mask) multiply_by_mask<T>(inputs, output);
  if (inputs.kept() == inputs.outputs()) return;
  const std::optional<Tensor> other = base ? std::optional<Tensor>(new_maps(output, inputs.result_sizes())) : base;
  if (base) {
    Tensor target = *other;
    torch::stable::copy_(target, *base);
  }
  fill_skipped<T>(inputs, other ? other->const_data_ptr() : nullptr, output);
}

template <typename T>
void run_forward(const Inputs& inputs, const Tensor& x, const std::optional<Tensor>& base, Tensor& output) {
  if (prefers_dense(inputs, x.scalar_type())) {
    run_dense<T>(inputs, x, base, output);
  } else {
    run_gathered<T>(inputs, x, base, output);
  }
  if (inputs.shape.fill == kFillNearest) copy_nearest<T>(inputs, output);
}

Tensor perforated_conv2d(const Tensor& x,                    // [N, Ci, H, W]
                         const Tensor& weight,               // [Co, Ci / groups, kh, kw]
                         const Tensor& mask,                 // [N, Ho, Wo]
                         const std::optional<Tensor>& bias,  // [Co]
                         const std::optional<Tensor>& base,  // [N, Co, Ho, Wo]
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                         const std::vector<int64_t>& dilation, int64_t groups, int64_t fill,
                         const std::optional<Tensor>& positions,  // [K]
                         const std::optional<Tensor>& rows) {     // [N, Ho, Wo]
  const PerforatedShape shape = check_perforated_conv2d(x, weight, mask, bias, base, stride, padding, dilation,
                                                        groups, fill, positions, rows);
  const Inputs inputs(shape, weight, mask, bias, positions, rows);
  Tensor output = new_maps(x, inputs.result_sizes());
  if (output.numel() == 0) return output;
  dispatch_floating(kOp, "x", x.scalar_type(),
                    [&](auto tag) { run_forward<typename decltype(tag)::type>(inputs, x, base, output); });
  return output;
}

// ---------------------------------------------------------------------------------------- backward

// For each kept position the gradient that reaches it, with that of its copies: [K, Co] accumulators.
template <typename T>
Scratch reaching_gradient(const Inputs& inputs, const Tensor& grad_output) {
  using A = accumulator_t<T>;
  const int64_t width = inputs.shape.out_channels, kept = inputs.kept();
  Scratch gradient(kept * width * static_cast<int64_t>(sizeof(A)));
  const Tensor channel_last = channel_rows(grad_output);
  const T* source = static_cast<const T*>(channel_last.const_data_ptr());
  A* sums = static_cast<A*>(gradient.at(0));
  const auto widen_row = row_gemm_kernels().widen[static_cast<int>(kFloatTypeOf<T>)];
  parallel_for(kept, (1 << 14) / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      widen_row({source + inputs.positions()[k] * width, nullptr}, width, sums + k * width);
    }
  });
  if (inputs.shape.fill != kFillNearest) return gradient;
  const Tensor nearest = nearest_rows(inputs.plan.rows);
  const auto* row_of = nearest.const_data_ptr<int64_t>();
  const auto add = row_copy_kernels().add[static_cast<int>(kFloatTypeOf<T>)];
  const int64_t cells = inputs.shape.geometry.out_cells();
  parallel_for(inputs.shape.batch, 1, [&](int64_t begin, int64_t end) {  // copies stay in their image
    for (int64_t p = begin * cells; p < end * cells; ++p) {
      if (inputs.rows()[p] < 0 && row_of[p] >= 0) add(source + p * width, width, sums + row_of[p] * width);
    }
  });
  return gradient;
}

template <typename T>
class Backward {
 public:
  using A = accumulator_t<T>;

  Backward(const Inputs& inputs, const Tensor& x, const Tensor& grad_output)
      : inputs_(inputs),
        x_(x),
        width_(inputs.shape.out_channels),
        gradient_(reaching_gradient<T>(inputs, grad_output)) {}

  // Also multiplies the gradient by the mask; comes first.
  void run_mask(const Tensor* grad_mask) {
    if (grad_mask != nullptr) {
      dispatch_floating(kOp, "mask", grad_mask->scalar_type(), [&](auto tag) {
        write_mask_gradient(static_cast<typename decltype(tag)::type*>(grad_mask->mutable_data_ptr()));
      });
    }
    if (!inputs_.shape.float_mask) return;
    parallel_for(inputs_.kept(), (1 << 14) / (width_ + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const A factor = inputs_.mask_at<A>(inputs_.positions()[k]);
        for (int64_t c = 0; c < width_; ++c) row(k)[c] *= factor;
      }
    });
  }

  void run_x(const Tensor& grad_x) const {
    const TapWeights<A> weights(static_cast<const T*>(inputs_.weight.const_data_ptr()), inputs_.channels(), true);
    const MapWriter<T> writer(grad_x);
    const auto row_of = [&](int64_t position) {
      const int64_t k = inputs_.rows()[position];
      return k < 0 ? nullptr : const_cast<const A*>(row(k));
    };
    const Geometry& g = inputs_.shape.geometry;
    for_row_blocks(
        inputs_.shape.batch * g.in_cells(), kBlockRows, [&] { return ProductBlock<A>(weights, false); },
        [&](ProductBlock<A>& block, int64_t first, int64_t count) {
          OutputSource<A, decltype(row_of)> source(g, row_of, width_);
          block.clear(count);
          block.add(weights, source, first, count);
          block.join_groups(weights, count);
          int64_t pixels[kBlockRows];
          for (int64_t i = 0; i < count; ++i) pixels[i] = first + i;
          writer.write(pixels, count, [&](int64_t i) { return block.sums(i); });
        });
  }

  void run_weight(const Tensor& grad_weight) const {
    const Tensor pixels = channel_rows(x_);
    weight_gradient<T, A>(
        inputs_.channels(), inputs_.kept(), [&] { return inputs_.source<T>(pixels); },
        [&](int64_t k) { return SignedRow{row(k), nullptr}; }, false,
        static_cast<T*>(grad_weight.mutable_data_ptr()));
  }

  void run_bias(const Tensor& grad_bias) const {
    bias_gradient<T, A>(
        inputs_.kept(), width_, [&](int64_t k) { return SignedRow{row(k), nullptr}; }, false,
        static_cast<T*>(grad_bias.mutable_data_ptr()));
  }

 private:
  A* row(int64_t k) const { return static_cast<A*>(gradient_.at(0)) + k * width_; }

  template <typename M>
  void write_mask_gradient(M* target) {
    std::fill_n(target, inputs_.outputs(), M{});
    convolve_kept<T>(inputs_, channel_rows(x_), [&](int64_t first, int64_t count, ProductBlock<T>& block) {
      for (int64_t i = 0; i < count; ++i) {
        const A *result = block.sums(i), *reaching = row(first + i);
        A sum = 0;
        for (int64_t c = 0; c < width_; ++c) sum += result[c] * reaching[c];
        target[inputs_.positions()[first + i]] = narrow<M>(static_cast<accumulator_t<M>>(sum));
      }
    });
  }

  const Inputs& inputs_;
  const Tensor& x_;
  int64_t width_;
  Scratch gradient_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> perforated_conv2d_backward(
    const Tensor& grad_output,          // [N, Co, Ho, Wo]
    const Tensor& x,                    // [N, Ci, H, W]
    const Tensor& weight,               // [Co, Ci / groups, kh, kw]
    const Tensor& mask,                 // [N, Ho, Wo]
    const std::optional<Tensor>& bias,  // [Co]
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
    int64_t groups, int64_t fill, const std::optional<Tensor>& positions,  // [K]
    const std::optional<Tensor>& rows,                                     // [N, Ho, Wo]
    bool need_x, bool need_weight, bool need_mask, bool need_bias, bool need_base,
    bool /*deterministic: always*/) {
  const PerforatedShape shape = check_perforated_conv2d_grad(grad_output, x, weight, mask, bias, stride, padding,
                                                             dilation, groups, fill, positions, rows);
  const Inputs inputs(shape, weight, mask, bias, positions, rows);
  const auto sizes_if = [](bool needed, const Tensor& like) {
    return needed ? std::vector<int64_t>(like.sizes().begin(), like.sizes().end()) : std::vector<int64_t>{0};
  };
  const Tensor grad_x = need_x ? new_maps(x, sizes_if(true, x)) : empty_of(x, {0});
  const Tensor grad_weight = empty_of(weight, sizes_if(need_weight, weight));
  const Tensor grad_mask = empty_of(mask, sizes_if(need_mask, mask));
  const Tensor grad_bias = empty_of(x, {need_bias ? shape.out_channels : 0});
  Tensor grad_base = need_base ? new_maps(x, inputs.result_sizes()) : empty_of(x, {0});
  dispatch_floating(kOp, "x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (need_base && grad_base.numel() > 0) {
      torch::stable::copy_(grad_base, grad_output);
      clear_kept<T>(inputs, grad_base);
    }
    if (!(need_x || need_weight || need_mask || need_bias)) return;
    Backward<T> backward(inputs, x, grad_output);
    backward.run_mask(need_mask ? &grad_mask : nullptr);
    if (need_x) backward.run_x(grad_x);
    if (need_weight) backward.run_weight(grad_weight);
    if (need_bias) backward.run_bias(grad_bias);
  });
  return {grad_x, grad_weight, grad_mask, grad_bias, grad_base};
}

}  // namespace
}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("perforated_conv2d", TORCH_BOX(&effops::rowconv::perforated_conv2d));
  m.impl("perforated_conv2d_backward", TORCH_BOX(&effops::rowconv::perforated_conv2d_backward));
}
