// sps_conv2d on the CPU: checks, branches, tasks. The kernels are in row_gemm_cpu_kernel.cpp.
#include "row_outer_cpu.h"
#include "sps_conv2d.h"
#include "sps_source_cpu.h"

namespace effops::rowconv {
namespace {

constexpr const char* kOp = "sps_conv2d";

// Checked inputs in the layout that the sources read.
struct Inputs {
  SpsConvShape shape;
  Tensor active, passive, index_map;
  Cells cells;
  std::vector<Tensor> weight;
  std::vector<int64_t> dilation;

  Inputs(const SpsConvShape& checked, const Tensor& active_in, const Tensor& passive_in, const Tensor& map_in,
         const Tensor& roi, const Tensor& xy, const std::vector<Tensor>& weight_in,
         const std::vector<int64_t>& dilation_in)
      : shape(checked),
        active(as_contiguous(active_in)),
        passive(as_contiguous(passive_in)),
        index_map(checked_index_map(kOp, map_in, checked.sps)),
        cells(kOp, roi, xy, checked.sps),
        dilation(dilation_in) {
    for (const Tensor& w : weight_in) weight.push_back(as_contiguous(w));
  }

  Geometry geometry(int64_t branch) const {
    return same_geometry(shape.sps.height, shape.sps.width, shape.kernels[branch], dilation[branch]);
  }
  ChannelSizes channels(int64_t branch) const {
    const int64_t k = shape.kernels[branch];
    return {shape.sps.features / shape.groups, shape.out_channels / shape.groups, shape.groups, k * k};
  }

  template <typename Id>
  IdMap<Id> id_map(const Id* ids) const {
    return {ids, cells.roi(), cells.xy(), shape.sps.height, shape.sps.width};
  }
  template <typename T, typename Id>
  NeighborSource<T, Id> neighbors(const IdMap<Id>& map, int64_t branch) const {
    return {map,
            geometry(branch),
            static_cast<const T*>(active.const_data_ptr()),
            static_cast<const T*>(passive.const_data_ptr()),
            shape.sps.active,
            shape.sps.features};
  }
  template <typename T>
  std::vector<TapWeights<accumulator_t<T>>> packed_weights(bool reversed, RowsOf rows) const {
    std::vector<TapWeights<accumulator_t<T>>> packed;
    packed.reserve(weight.size());
    for (int64_t d = 0; d < shape.branches(); ++d) {
      packed.emplace_back(static_cast<const T*>(weight[d].const_data_ptr()), channels(d), reversed, rows);
    }
    return packed;
  }
};

// Calls f(TypeTag<T>, map) with the types of the features and of the map.
template <typename F>
void with_types(const Inputs& inputs, const F& f) {
  dispatch_floating(kOp, "active", inputs.active.scalar_type(), [&](auto tag) {
    with_ids(inputs.index_map, [&](const auto* ids) { f(tag, inputs.id_map(ids)); });
  });
}

// ---------------------------------------------------------------------------------------- forward

// Bias, activation and the sum over the branches.
template <typename T>
class Epilogue {
 public:
  using A = accumulator_t<T>;

  Epilogue(const SpsConvShape& shape, const std::vector<Tensor>& bias, const Tensor& output,
           const Tensor& signs)
      : shape_(shape),
        output_(static_cast<T*>(output.mutable_data_ptr())),
        signs_(shape.relu ? static_cast<uint8_t*>(signs.mutable_data_ptr()) : nullptr) {
    for (const Tensor& values : bias) {
      const Tensor contiguous = as_contiguous(values);
      bias_.push_back(widened(static_cast<const T*>(contiguous.const_data_ptr()), shape.out_channels));
    }
  }

  // Takes the sums of one branch for the output row, which it changes; total: the sums of the branches
  // before.
  void finish(int64_t branch, int64_t row, A* sums, A* total) const {
    const int64_t width = shape_.out_channels;
    uint8_t* bits = signs_ ? signs_ + (branch * shape_.sps.active + row) * shape_.sign_bytes() : nullptr;
    row_gemm_kernels().activate[kPrecision<A>](sums, shape_.has_bias ? bias_[branch].data() : nullptr, width,
                                               bits);
    if (branch > 0) row_copy_kernels().add[static_cast<int>(kFloatTypeOf<A>)](total, width, sums);
    if (branch + 1 < shape_.branches()) {
      std::copy_n(sums, width, total);
    } else {
      store_row(sums, width, output_ + row * width);
    }
  }

 private:
  const SpsConvShape& shape_;
  std::vector<std::vector<A>> bias_;
  T* output_;
  uint8_t* signs_;
};

template <typename T, typename Id>
void run_forward(const Inputs& inputs, const IdMap<Id>& map, const Epilogue<T>& epilogue) {
  using A = accumulator_t<T>;
  const SpsConvShape& shape = inputs.shape;
  const auto weights = inputs.packed_weights<T>(false, RowsOf::kStorage);
  struct Task {
    ProductBlock<T> block;
    std::vector<A> totals;
  };
  const int64_t width = shape.out_channels;
  for_row_blocks(
      shape.sps.active, kBlockRows,
      [&] {
        return Task{{weights[0], false}, std::vector<A>(shape.branches() > 1 ? kBlockRows * width : 0)};
      },
      [&](Task& task, int64_t first, int64_t count) {
        for (int64_t d = 0; d < shape.branches(); ++d) {
          auto source = inputs.neighbors<T>(map, d);
          task.block.clear(count);
          task.block.add(weights[d], source, first, count);
          task.block.join_groups(weights[d], count);
          for (int64_t i = 0; i < count; ++i) {
            epilogue.finish(d, first + i, task.block.sums(i), task.totals.data() + i * width);
          }
        }
      });
}

std::tuple<Tensor, Tensor> sps_conv2d(const Tensor& active,               // [NA, F]
                                      const Tensor& passive,              // [NP, F]
                                      const Tensor& index_map,            // [R, H, W]
                                      const Tensor& roi,                  // [NA]
                                      const Tensor& xy,                   // [NA, 2]
                                      const std::vector<Tensor>& weight,  // D x [O, F / groups, k, k]
                                      const std::vector<Tensor>& bias,    // D x [O], or none
                                      const std::vector<int64_t>& dilation, int64_t activation,
                                      int64_t groups) {
  const SpsConvShape shape =
      check_sps_conv2d(active, passive, index_map, roi, xy, weight, bias, dilation, activation, groups);
  const Inputs inputs(shape, active, passive, index_map, roi, xy, weight, dilation);
  Tensor output = empty_of(active, {shape.sps.active, shape.out_channels});
  Tensor signs = empty_of(active, {shape.relu ? shape.branches() : 0, shape.sps.active, shape.sign_bytes()},
                          ScalarType::Byte);
  if (output.numel() == 0) return {output, signs};
  with_types(inputs, [&](auto tag, const auto& map) {
    using T = typename decltype(tag)::type;
    run_forward<T>(inputs, map, Epilogue<T>(shape, bias, output, signs));
  });
  return {output, signs};
}

// ---------------------------------------------------------------------------------------- backward

template <typename T>
struct OutputGradient {
  Tensor grad, signs;
  const SpsConvShape& shape;

  GradRows<T> of_branch(int64_t d) const {
    const auto* bits = static_cast<const uint8_t*>(signs.const_data_ptr());
    return {static_cast<const T*>(grad.const_data_ptr()),
            shape.relu ? bits + d * shape.sps.active * shape.sign_bytes() : nullptr, shape.out_channels};
  }
};

// grad[r] = sum over branches, taps and chosen rows; source_of(d) makes the source of a branch, of rows S.
template <typename T, typename S, typename SourceOf>
void run_input_gradient(const Inputs& inputs, bool has_bits, const SourceOf& source_of,
                        const Tensor& gradient) {
  const auto weights = inputs.packed_weights<T>(
      true, std::is_same_v<S, T> && !has_bits ? RowsOf::kStorage : RowsOf::kAccumulators);
  const int64_t width = inputs.shape.sps.features;
  T* target = static_cast<T*>(gradient.mutable_data_ptr());
  for_row_blocks(
      gradient.size(0), kBlockRows, [&] { return ProductBlock<S>(weights[0], has_bits); },
      [&](ProductBlock<S>& block, int64_t first, int64_t count) {
        block.clear(count);
        for (int64_t d = 0; d < inputs.shape.branches(); ++d) {
          auto source = source_of(d);
          block.add(weights[d], source, first, count);
        }
        block.join_groups(weights[0], count);
        for (int64_t i = 0; i < count; ++i) store_row(block.sums(i), width, target + (first + i) * width);
      });
}

template <typename T, typename Id>
void run_passive_gradient(const Inputs& inputs, const IdMap<Id>& map, const OutputGradient<T>& grad,
                          const Tensor& gradient) {
  std::vector<PassiveReaders> readers;
  for (int64_t d = 0; d < inputs.shape.branches(); ++d) {
    readers.emplace_back(map, inputs.geometry(d), inputs.shape.sps.active, inputs.shape.sps.passive);
  }
  run_input_gradient<T, accumulator_t<T>>(
      inputs, false, [&](int64_t d) { return PassiveSource<T>(readers[d], grad.of_branch(d)); }, gradient);
}

template <typename T, typename Id>
void run_weight_gradient(const Inputs& inputs, const IdMap<Id>& map, const OutputGradient<T>& grad,
                         const std::vector<Tensor>& gradients) {
  for (int64_t d = 0; d < inputs.shape.branches(); ++d) {
    const GradRows<T> rows = grad.of_branch(d);
    weight_gradient<T, T>(
        inputs.channels(d), inputs.shape.sps.active, [&] { return inputs.neighbors<T>(map, d); },
        [&](int64_t i) { return rows.signed_row(i); }, inputs.shape.relu,
        static_cast<T*>(gradients[d].mutable_data_ptr()));
  }
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> sps_conv2d_backward(
    const Tensor& grad_output,          // [NA, O]
    const Tensor& signs,                // [D, NA, ceil(O / 8)]
    const Tensor& active,               // [NA, F]
    const Tensor& passive,              // [NP, F]
    const Tensor& index_map,            // [R, H, W]
    const Tensor& roi,                  // [NA]
    const Tensor& xy,                   // [NA, 2]
    const std::vector<Tensor>& weight,  // D x [O, F / groups, k, k]
    const std::vector<int64_t>& dilation, int64_t activation, int64_t groups, bool need_active,
    bool need_passive, bool need_weight, bool need_bias, bool /*deterministic: always*/) {
  const SpsConvShape shape =
      check_sps_conv2d(active, passive, index_map, roi, xy, weight, {}, dilation, activation, groups);
  check_sps_conv2d_grad(grad_output, signs, active, shape);
  const Inputs inputs(shape, active, passive, index_map, roi, xy, weight, dilation);
  const auto new_gradient = [](const Tensor& like, bool needed) {
    return empty_of(like, needed ? std::vector<int64_t>(like.sizes().begin(), like.sizes().end())
                                 : std::vector<int64_t>{0});
  };
  const Tensor grad_active = new_gradient(active, need_active);
  const Tensor grad_passive = new_gradient(passive, need_passive);
  std::vector<Tensor> grad_weight, grad_bias;
  for (const Tensor& w : weight) grad_weight.push_back(new_gradient(w, need_weight));
  for (size_t d = 0; need_bias && d < weight.size(); ++d) {
    grad_bias.push_back(empty_of(active, {shape.out_channels}));
  }
  with_types(inputs, [&](auto tag, const auto& map) {
    using T = typename decltype(tag)::type;
    using Id = std::remove_const_t<std::remove_pointer_t<decltype(map.ids)>>;
    const OutputGradient<T> grad{as_contiguous(grad_output), as_contiguous(signs), shape};
    if (need_active) {
      const auto source_of = [&](int64_t d) {
        return ReaderSource<T, Id>{map, inputs.geometry(d), grad.of_branch(d), shape.sps.active};
      };
      run_input_gradient<T, T>(inputs, shape.relu, source_of, grad_active);
    }
    if (need_passive) run_passive_gradient(inputs, map, grad, grad_passive);
    if (need_weight) run_weight_gradient(inputs, map, grad, grad_weight);
    for (size_t d = 0; d < grad_bias.size(); ++d) {
      const GradRows<T> rows = grad.of_branch(static_cast<int64_t>(d));
      bias_gradient<T, T>(
          shape.sps.active, shape.out_channels, [&](int64_t i) { return rows.signed_row(i); }, shape.relu,
          static_cast<T*>(grad_bias[d].mutable_data_ptr()));
    }
  });
  return {grad_active, grad_passive, grad_weight, grad_bias};
}

}  // namespace
}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("sps_conv2d", TORCH_BOX(&effops::rowconv::sps_conv2d));
  m.impl("sps_conv2d_backward", TORCH_BOX(&effops::rowconv::sps_conv2d_backward));
}
