// select_conv2d on the CPU: checks, positions of each branch, tasks. The kernels are in
// row_gemm_cpu_kernel.cpp.
#include "select_conv2d.h"

#include "position_source_cpu.h"
#include "row_outer_cpu.h"

namespace effops::rowconv {
namespace {

constexpr const char* kOp = "select_conv2d";
constexpr int64_t kPixelBlock = 512;  // of the input's gradient: one in P of them reads a branch

// Checked inputs, and the positions that chose each branch, ascending.
struct Inputs {
  SelectShape shape;
  Tensor x, weights;
  std::vector<int64_t> dilations;
  std::vector<int32_t> choice;                  // of every position, -1: none
  std::vector<std::vector<int64_t>> positions;  // of every branch

  Inputs(const SelectShape& checked, const Tensor& x_in, const Tensor& weights_in, const Tensor& choice_in,
         const std::vector<int64_t>& dilations_in)
      : shape(checked),
        x(x_in),
        weights(as_contiguous(weights_in)),
        dilations(dilations_in),
        choice(checked.batch * checked.height * checked.width),
        positions(checked.branches) {
    const Tensor chosen = as_contiguous(choice_in);
    if (chosen.scalar_type() == ScalarType::Long) {
      sort_positions(chosen.const_data_ptr<int64_t>());
    } else {
      sort_positions(chosen.const_data_ptr<int32_t>());
    }
  }

  template <typename Id>
  void sort_positions(const Id* chosen) {
    for (int64_t p = 0; p < cells(); ++p) {
      const int64_t branch = chosen[p];
      if (branch < -1 || branch >= shape.branches) {
        fail(kOp, ": expected choice in [-1, P = ", shape.branches, "), got ", branch);
      }
      choice[p] = static_cast<int32_t>(branch);
      if (branch >= 0) positions[branch].push_back(p);
    }
  }

  int64_t cells() const { return static_cast<int64_t>(choice.size()); }
  Geometry geometry(int64_t branch) const {
    return same_geometry(shape.height, shape.width, shape.kernel, dilations[branch]);
  }
  ChannelSizes channels() const {
    return {shape.in_channels, shape.out_channels, 1, shape.kernel * shape.kernel};
  }
  int64_t count(int64_t branch) const { return static_cast<int64_t>(positions[branch].size()); }
  int64_t weight_elements() const {
    return shape.out_channels * shape.in_channels * shape.kernel * shape.kernel;
  }
  template <typename T>
  const T* weight(int64_t branch) const {
    return static_cast<const T*>(weights.const_data_ptr()) + branch * weight_elements();
  }
  template <typename T>
  PixelSource<T> source(int64_t branch, const T* pixels) const {
    return {geometry(branch), positions[branch].data(), pixels, shape.in_channels};
  }
};

// ---------------------------------------------------------------------------------------- forward

template <typename T>
void copy_pixels(const std::vector<int64_t>& positions, const T* pixels, int64_t channels,
                 const MapWriter<T>& writer) {
  using A = accumulator_t<T>;
  const auto widen_row = row_gemm_kernels().widen[static_cast<int>(kFloatTypeOf<T>)];
  for_row_blocks(
      static_cast<int64_t>(positions.size()), kBlockRows,
      [&] { return std::vector<A>(kBlockRows * channels); },
      [&](std::vector<A>& rows, int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
          widen_row({pixels + positions[first + i] * channels, nullptr}, channels,
                    rows.data() + i * channels);
        }
        writer.write(&positions[first], count, [&](int64_t i) { return rows.data() + i * channels; });
      });
}

template <typename T>
void run_forward(const Inputs& inputs, const void* bias, const Tensor& output) {  // bias: [P, Co] or null
  using A = accumulator_t<T>;
  const Tensor rows = channel_rows(inputs.x);
  const T* pixels = static_cast<const T*>(rows.const_data_ptr());
  const MapWriter<T> writer(output);
  const int64_t width = inputs.shape.out_channels;
  for (int64_t p = 0; p < inputs.shape.branches; ++p) {
    if (inputs.count(p) == 0) continue;
    if (inputs.dilations[p] == 0) {
      copy_pixels(inputs.positions[p], pixels, width, writer);
      continue;
    }
    const TapWeights<A> weights(inputs.weight<T>(p), inputs.channels(), false, RowsOf::kStorage);
    const auto branch_bias = bias ? widened(static_cast<const T*>(bias) + p * width, width)
                                  : std::vector<A>();
    convolve_positions(weights, inputs.source(p, pixels), inputs.count(p), branch_bias,
                       [&](int64_t first, int64_t count, ProductBlock<T>& block) {
                         writer.write(&inputs.positions[p][first], count,
                                      [&](int64_t i) { return block.sums(i); });
                       });
  }
}

Tensor select_conv2d(const Tensor& x,                    // [N, Ci, H, W]
                     const Tensor& weights,              // [P, Co, Ci, k, k]
                     const Tensor& choice,               // [N, H, W]
                     const std::optional<Tensor>& bias,  // [P, Co]
                     const std::vector<int64_t>& dilations) {
  const SelectShape shape = check_select_conv2d(x, weights, choice, bias, dilations);
  const Inputs inputs(shape, x, weights, choice, dilations);
  Tensor output = new_maps(x, {shape.batch, shape.out_channels, shape.height, shape.width});
  if (output.numel() == 0) return output;
  memset(output.mutable_data_ptr(), 0, output.numel() * output.element_size());
  const Tensor biases = bias ? as_contiguous(*bias) : empty_of(x, {0});
  dispatch_floating(kOp, "x", x.scalar_type(), [&](auto tag) {
    run_forward<typename decltype(tag)::type>(inputs, bias ? biases.const_data_ptr() : nullptr, output);
  });
  return output;
}

// ---------------------------------------------------------------------------------------- backward

// Branch by branch, so that the packed weights of one branch are in memory at a time.
template <typename T>
void run_x(const Inputs& inputs, const T* grad, const Tensor& grad_x) {
  using A = accumulator_t<T>;
  const int64_t in = inputs.shape.in_channels, out = inputs.shape.out_channels;
  std::vector<A> totals(inputs.cells() * in, A(0));
  const auto add_sums = row_copy_kernels().add[static_cast<int>(kFloatTypeOf<A>)];
  const auto add_storage = row_copy_kernels().add[static_cast<int>(kFloatTypeOf<T>)];
  for (int64_t p = 0; p < inputs.shape.branches; ++p) {
    if (inputs.count(p) == 0) continue;
    if (inputs.dilations[p] == 0) {
      parallel_for(inputs.count(p), (1 << 14) / (out + 1) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t position = inputs.positions[p][i];
          add_storage(grad + position * out, out, totals.data() + position * in);
        }
      });
      continue;
    }
    const TapWeights<A> weights(inputs.weight<T>(p), inputs.channels(), true, RowsOf::kStorage);
    const auto row_of = [&](int64_t position) {
      return inputs.choice[position] == p ? grad + position * out : nullptr;
    };
    for_row_blocks(
        inputs.cells(), kPixelBlock, [&] { return ProductBlock<T>(weights, false, kPixelBlock); },
        [&](ProductBlock<T>& block, int64_t first, int64_t count) {
          OutputSource<T, decltype(row_of)> source(inputs.geometry(p), row_of, out);
          block.clear(count);
          block.add(weights, source, first, count);
          for (int64_t i = 0; i < count; ++i) add_sums(block.sums(i), in, totals.data() + (first + i) * in);
        });
  }
  const MapWriter<T> writer(grad_x);
  for_row_blocks(
      inputs.cells(), kBlockRows, [] { return 0; },
      [&](int, int64_t first, int64_t count) {
        writer.write_range(first, count, [&](int64_t i) { return totals.data() + (first + i) * in; });
      });
}

template <typename T>
void run_weights(const Inputs& inputs, const T* grad, const Tensor& grad_weights) {
  const Tensor rows = channel_rows(inputs.x);
  const T* pixels = static_cast<const T*>(rows.const_data_ptr());
  T* target = static_cast<T*>(grad_weights.mutable_data_ptr());
  for (int64_t p = 0; p < inputs.shape.branches; ++p, target += inputs.weight_elements()) {
    if (inputs.dilations[p] == 0) {
      std::fill_n(target, inputs.weight_elements(), T{});
      continue;
    }
    const int64_t* positions = inputs.positions[p].data();
    weight_gradient<T, T>(
        inputs.channels(), inputs.count(p), [&] { return inputs.source(p, pixels); },
        [&](int64_t i) { return SignedRow{grad + positions[i] * inputs.shape.out_channels, nullptr}; }, false,
        target);
  }
}

template <typename T>
void run_bias(const Inputs& inputs, const T* grad, const Tensor& grad_bias) {
  const int64_t width = inputs.shape.out_channels;
  T* target = static_cast<T*>(grad_bias.mutable_data_ptr());
  for (int64_t p = 0; p < inputs.shape.branches; ++p, target += width) {
    const int64_t* positions = inputs.positions[p].data();
    bias_gradient<T, T>(
        inputs.dilations[p] == 0 ? 0 : inputs.count(p), width,
        [&](int64_t i) { return SignedRow{grad + positions[i] * width, nullptr}; }, false, target);
  }
}

std::tuple<Tensor, Tensor, Tensor> select_conv2d_backward(const Tensor& grad_output,  // [N, Co, H, W]
                                                          const Tensor& x,            // [N, Ci, H, W]
                                                          const Tensor& weights,      // [P, Co, Ci, k, k]
                                                          const Tensor& choice,       // [N, H, W]
                                                          const std::vector<int64_t>& dilations, bool need_x,
                                                          bool need_weights, bool need_bias,
                                                          bool /*deterministic: always*/) {
  const SelectShape shape = check_select_conv2d_grad(grad_output, x, weights, choice, dilations);
  const Inputs inputs(shape, x, weights, choice, dilations);
  const Tensor grad_x = need_x ? new_maps(x, {shape.batch, shape.in_channels, shape.height, shape.width})
                               : empty_of(x, {0});
  const Tensor grad_weights =
      empty_of(weights, need_weights ? std::vector<int64_t>{shape.branches, shape.out_channels,
                                                            shape.in_channels, shape.kernel, shape.kernel}
                                     : std::vector<int64_t>{0});
  const Tensor grad_bias = empty_of(weights, need_bias
                                                 ? std::vector<int64_t>{shape.branches, shape.out_channels}
                                                 : std::vector<int64_t>{0});
  dispatch_floating(kOp, "x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor rows = channel_rows(grad_output);
    const T* grad = static_cast<const T*>(rows.const_data_ptr());
    if (need_x) run_x(inputs, grad, grad_x);
    if (need_weights) run_weights(inputs, grad, grad_weights);
    if (need_bias) run_bias(inputs, grad, grad_bias);
  });
  return {grad_x, grad_weights, grad_bias};
}

}  // namespace
}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("select_conv2d", TORCH_BOX(&effops::rowconv::select_conv2d));
  m.impl("select_conv2d_backward", TORCH_BOX(&effops::rowconv::select_conv2d_backward));
}
