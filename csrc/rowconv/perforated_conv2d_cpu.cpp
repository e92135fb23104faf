// perforated_conv2d on the CPU: checks, plans, fills, tasks. The kernels are in row_gemm_cpu_kernel.cpp.
#include "perforated_conv2d.h"

#include "perforated_dense_cpu.h"
#include "row_outer_cpu.h"

namespace effops::rowconv {
namespace {

constexpr const char* kOp = "perforated_conv2d";

using Inputs = PerforatedInputs;

// Calls emit(first kept row, count, block) with conv(x) + bias of blocks of kept positions.
template <typename T, typename Emit>
void convolve_kept(const Inputs& inputs, const Tensor& pixels, const Emit& emit) {
  const TapWeights<accumulator_t<T>> weights(static_cast<const T*>(inputs.weight.const_data_ptr()),
                                             inputs.channels(), false, RowsOf::kStorage);
  const auto bias =
      inputs.bias ? widened(static_cast<const T*>(inputs.bias->const_data_ptr()), inputs.shape.out_channels)
                  : std::vector<accumulator_t<T>>();
  convolve_positions(weights, inputs.source<T>(pixels), inputs.kept(), bias, emit);
}

// ---------------------------------------------------------------------------------------- fills

// Every position that is not kept gets what the nearest kept one has.
template <typename T>
void copy_nearest(const Inputs& inputs, const Tensor& output) {
  const Tensor nearest = nearest_rows(inputs.plan.rows);
  const auto* row_of = nearest.const_data_ptr<int64_t>();
  // Between the elements of two neighbouring positions.
  const int64_t step = is_channels_last(output) ? output.size(1) : 1;
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
void run_gathered(const Inputs& inputs, const Tensor& x, const std::optional<Tensor>& base,
                  const Tensor& output) {
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

template <typename T>
void run_forward(const Inputs& inputs, const Tensor& x, const std::optional<Tensor>& base, bool deterministic,
                 Tensor& output) {
  if (!deterministic && prefers_dense(inputs, x.scalar_type())) {
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
                         const std::optional<Tensor>& rows,       // [N, Ho, Wo]
                         bool deterministic) {
  const PerforatedShape shape = check_perforated_conv2d(x, weight, mask, bias, base, stride, padding,
                                                        dilation, groups, fill, positions, rows);
  const Inputs inputs(shape, weight, mask, bias, positions, rows);
  Tensor output = new_maps(x, inputs.result_sizes());
  if (output.numel() == 0) return output;
  dispatch_floating(kOp, "x", x.scalar_type(), [&](auto tag) {
    run_forward<typename decltype(tag)::type>(inputs, x, base, deterministic, output);
  });
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
    const TapWeights<A> weights(static_cast<const T*>(inputs_.weight.const_data_ptr()), inputs_.channels(),
                                true, RowsOf::kAccumulators);
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
          writer.write_range(first, count, [&](int64_t i) { return block.sums(i); });
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
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, int64_t fill,
    const std::optional<Tensor>& positions,  // [K]
    const std::optional<Tensor>& rows,                                     // [N, Ho, Wo]
    bool need_x, bool need_weight, bool need_mask, bool need_bias, bool need_base, bool deterministic) {
  const PerforatedShape shape = check_perforated_conv2d_grad(
      grad_output, x, weight, mask, bias, stride, padding, dilation, groups, fill, positions, rows);
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
    // Where positions are skipped, the dense gradient of the weight would multiply pixels that nothing reads.
    if (!deterministic && !need_mask && inputs.kept() == inputs.outputs() &&
        prefers_dense(inputs, x.scalar_type())) {
      run_dense_backward<T>(inputs, grad_output, x,
                            {need_x ? &grad_x : nullptr, need_weight ? &grad_weight : nullptr,
                             need_bias ? &grad_bias : nullptr});
      return;
    }
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
