// perforated_conv2d on CUDA: plans, arguments, launches.
#include "../common/dtype_switch.h"
#include "cell_buckets_cuda.cuh"
#include "dense_conv2d.h"
#include "mask_plan_cuda.cuh"
#include "perforated_conv2d.h"
#include "row_pixel_cuda.cuh"

namespace effops::rowconv {
namespace {

// From which share of kept positions on the dense convolution and a fill replace the gathered one, where a
// plan says how many they are. Estimated, not measured: without tensor cores, and with them by mma.sync, the
// gathered product reaches about half the rate of torch's.
constexpr double kDenseShare = 0.5;

// Checked inputs, laid out as the kernels read them.
struct Inputs {
  PerforatedShape shape;
  Tensor x, weight, mask, positions, rows;
  std::optional<Tensor> bias, count;  // count: of a plan that only the device knows
  BranchList branches;

  Inputs(const char* op, const CudaScope& scope, const PerforatedShape& checked, const Tensor& x_in,
         const Tensor& weight_in, const Tensor& mask_in, const std::optional<Tensor>& bias_in,
         const std::optional<Tensor>& positions_in, const std::optional<Tensor>& rows_in)
      : shape(checked),
        x(x_in),
        weight(as_contiguous(weight_in)),
        mask(as_contiguous(mask_in)),
        bias(bias_in ? std::optional<Tensor>(as_contiguous(*bias_in)) : std::nullopt),
        branches(one_branch(checked.geometry)) {
    check_kernel_limits(op, 1, shape.geometry.taps(), shape.out_channels, shape.in_channels);
    if (positions_in) {
      positions = as_contiguous(*positions_in);
      rows = as_contiguous(*rows_in);
    } else {
      const DevicePlan plan = make_device_plan(scope, mask);
      positions = plan.positions;
      rows = plan.rows;
      count = plan.kept;
    }
  }

  int64_t capacity() const { return positions.numel(); }
  int64_t outputs() const { return shape.batch * shape.geometry.out_cells(); }  // positions, kept or not
  const int64_t* position_data() const { return positions.const_data_ptr<int64_t>(); }
  const int64_t* row_data() const { return rows.const_data_ptr<int64_t>(); }
  const int64_t* count_data() const { return count ? count->const_data_ptr<int64_t>() : nullptr; }
  const void* scale() const { return shape.float_mask ? mask.const_data_ptr() : nullptr; }
  bool scale_is_float() const { return mask.scalar_type() == ScalarType::Float; }
  RowSource source() const { return pixel_rows(shape.geometry, shape.batch, position_data()); }

  template <typename T>
  WeightPack<T> weights(bool transposed) const {
    WeightPack<T> pack{};
    pack.weight[0] = static_cast<const T*>(weight.const_data_ptr());
    pack.outputs = shape.out_channels / shape.groups;
    pack.inputs = shape.in_channels / shape.groups;
    pack.transposed = transposed;
    return pack;
  }

  // conv(x) + bias at the kept positions; without the result. `pixels`: of x.
  template <typename T>
  RowGemm<T> gemm(const Tensor& pixels) const {
    RowGemm<T> gemm{};
    gemm.source = source();
    gemm.branches = branches;
    gemm.groups = static_cast<int32_t>(shape.groups);
    gemm.operand = operand_rows<T>(pixels, shape.in_channels, shape.groups);
    gemm.rows = capacity();
    gemm.count = count_data();
    if (bias) gemm.bias[0] = static_cast<const T*>(bias->const_data_ptr());
    return gemm;
  }

  // Of maps of outputs; changes nothing yet.
  template <typename T>
  FillArguments<T> fill(const Tensor& maps) const {
    FillArguments<T> fill{};
    fill.rows = row_data();
    fill.positions = position_data();
    fill.capacity = capacity();
    fill.cells = outputs();
    fill.channels = shape.out_channels;
    fill.output = static_cast<T*>(maps.mutable_data_ptr());
    fill.layout = layout_of(maps);
    return fill;
  }
};

template <typename T>
void launch_fill(const CudaScope& scope, const FillArguments<T>& fill) {
  scope.launch(&fill_pixels_kernel<T>, element_blocks(fill.cells * fill.channels), kElementThreads, 0, fill);
}

// ------------------------------------------------------------------------------------------- forward

template <typename T>
void run_gathered(const CudaScope& scope, const Inputs& inputs, const Tensor& output) {
  if (inputs.capacity() == 0) return;
  const Tensor pixels = pixel_rows_of(inputs.x);
  RowGemm<T> gemm = inputs.gemm<T>(pixels);
  gemm.positions = inputs.position_data();
  gemm.limit = inputs.outputs();
  gemm.scale = inputs.scale();
  gemm.scale_is_float = inputs.scale_is_float();
  gemm.result = output.mutable_data_ptr();
  gemm.layout = layout_of(output);
  run_row_gemm<T>(scope, output, gemm, inputs.weights<T>(false));
}

// Of all positions, kept or not.
template <typename T>
void run_dense(const CudaScope& scope, const Inputs& inputs, const Tensor& output) {
  const Geometry& g = inputs.shape.geometry;
  const Tensor dense = dense_conv2d(as_maps(inputs.x), inputs.weight, inputs.bias, {g.stride_y, g.stride_x},
                                    {g.padding_y, g.padding_x}, {g.dilation_y, g.dilation_x},
                                    inputs.shape.groups);
  Tensor target = output;
  torch::stable::copy_(target, dense);
  if (!inputs.shape.float_mask) return;
  FillArguments<T> fill = inputs.fill<T>(output);
  fill.scale = inputs.scale();
  fill.scale_is_float = inputs.scale_is_float();
  launch_fill(scope, fill);
}

template <typename T>
void fill_skipped(const CudaScope& scope, const Inputs& inputs, const std::optional<Tensor>& base,
                  const Tensor& output) {
  FillArguments<T> fill = inputs.fill<T>(output);
  fill.fills_skipped = true;
  std::optional<Tensor> other;
  if (base) {
    other = as_maps(*base);
    fill.base = static_cast<const T*>(other->const_data_ptr());
    fill.base_layout = layout_of(*other);
  }
  if (inputs.shape.fill == kFillNearest) {
    other = nearest_rows(scope, inputs.rows);
    fill.nearest = other->const_data_ptr<int64_t>();
  }
  launch_fill(scope, fill);
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
  const CudaScope scope(x);
  const Tensor output =
      new_maps(x, {shape.batch, shape.out_channels, shape.geometry.out_height, shape.geometry.out_width});
  if (output.numel() == 0) return output;
  const Inputs inputs("perforated_conv2d", scope, shape, x, weight, mask, bias, positions, rows);
  const bool dense = !deterministic && !inputs.count && shape.in_channels > 0 &&
                     static_cast<double>(inputs.capacity()) >
                         kDenseShare * static_cast<double>(inputs.outputs());
  dispatch_floating("perforated_conv2d", "x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (dense) {
      run_dense<T>(scope, inputs, output);
    } else {
      run_gathered<T>(scope, inputs, output);
    }
    fill_skipped<T>(scope, inputs, base, output);
  });
  return output;
}

// ------------------------------------------------------------------------------------------ backward

template <typename T>
class Backward {
 public:
  Backward(const CudaScope& scope, const Inputs& inputs, const Tensor& grad_output)
      : scope_(scope), inputs_(inputs), grad_(as_maps(grad_output)) {
    const PerforatedShape& shape = inputs.shape;
    reaching_ = {static_cast<const T*>(grad_.const_data_ptr()),
                 layout_of(grad_),
                 inputs.outputs(),
                 inputs.position_data(),
                 inputs.capacity(),
                 shape.out_channels,
                 inputs.count_data(),
                 nullptr,
                 nullptr};
    if (shape.fill == kFillNearest) {
      copies_ = bucket_cells(scope, nearest_rows(scope, inputs.rows), 0, inputs.capacity());
      reaching_.copy_offsets = copies_->offsets.template const_data_ptr<int64_t>();
      reaching_.copies = copies_->cells.template const_data_ptr<int64_t>();
    }
  }

  // The rows that the other gradients are made of. Comes first.
  void make_rows() {
    rows_ = empty_of(grad_, {inputs_.capacity(), inputs_.shape.out_channels});
    if (rows_.numel() == 0) return;
    scope_.launch(&reaching_gradient_kernel<T>, element_blocks(rows_.numel()), kElementThreads, 0, reaching_,
                  inputs_.scale(), inputs_.scale_is_float(), static_cast<T*>(rows_.mutable_data_ptr()));
  }

  // grad_mask: zeros.
  void run_mask(const Tensor& grad_mask) const {
    if (inputs_.capacity() == 0) return;
    const int64_t channels = inputs_.shape.out_channels;
    const Tensor pixels = pixel_rows_of(inputs_.x);
    const Tensor products = empty_of(grad_, {inputs_.capacity(), channels},
                                     sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
    RowGemm<T> gemm = inputs_.template gemm<T>(pixels);
    gemm.limit = inputs_.capacity();
    gemm.result = products.mutable_data_ptr();
    gemm.wide_result = true;
    gemm.layout = row_layout(channels);
    run_row_gemm<T>(scope_, grad_, gemm, inputs_.template weights<T>(false));
    scope_.launch(&mask_gradient_kernel<T>, element_blocks(inputs_.capacity() * kWarpSize), kElementThreads,
                  0, reaching_, static_cast<const accumulator_t<T>*>(products.const_data_ptr()),
                  grad_mask.mutable_data_ptr(), grad_mask.scalar_type() == ScalarType::Float);
  }

  void run_x(const Tensor& grad_x) const {
    const PerforatedShape& shape = inputs_.shape;
    RowGemm<T> gemm{};
    gemm.source = pixel_rows_back(RowKind::kPixelsBack, shape.geometry, shape.batch,
                                  {inputs_.rows.const_data_ptr(), true}, inputs_.capacity());
    gemm.branches = inputs_.branches;
    gemm.groups = static_cast<int32_t>(shape.groups);
    gemm.operand = operand_rows<T>(rows_, shape.out_channels, shape.groups);
    gemm.rows = gemm.limit = shape.batch * shape.geometry.in_cells();
    gemm.skips_taps = true;
    gemm.result = grad_x.mutable_data_ptr();
    gemm.layout = layout_of(grad_x);
    run_row_gemm<T>(scope_, grad_, gemm, inputs_.template weights<T>(true));
  }

  void run_weight(const Tensor* grad_weight, const Tensor* grad_bias) const {
    const PerforatedShape& shape = inputs_.shape;
    const Tensor pixels = pixel_rows_of(inputs_.x);
    RowOuter<T> outer{};
    outer.source = inputs_.source();
    outer.branches = inputs_.branches;
    outer.operand = operand_rows<T>(pixels, shape.in_channels, shape.groups);
    outer.grad = operand_rows<T>(rows_, shape.out_channels, shape.groups);
    outer.rows = inputs_.capacity();
    outer.count = inputs_.count_data();
    outer.groups = static_cast<int32_t>(shape.groups);
    outer.outputs = static_cast<int32_t>(shape.out_channels / shape.groups);
    outer.inputs = static_cast<int32_t>(shape.in_channels / shape.groups);
    WeightGradients<T> targets{};
    if (grad_weight != nullptr) targets.weight[0] = static_cast<T*>(grad_weight->mutable_data_ptr());
    if (grad_bias != nullptr) targets.bias[0] = static_cast<T*>(grad_bias->mutable_data_ptr());
    run_row_outer<T>(scope_, grad_, outer, targets);
  }

  void run_base(const Tensor& grad_base) const {
    FillArguments<T> fill = inputs_.template fill<T>(grad_base);
    fill.clears_kept = fill.fills_skipped = true;
    fill.base = static_cast<const T*>(grad_.const_data_ptr());
    fill.base_layout = layout_of(grad_);
    launch_fill(scope_, fill);
  }

 private:
  const CudaScope& scope_;
  const Inputs& inputs_;
  Tensor grad_, rows_;
  std::optional<CellBuckets> copies_;
  ReachingGradient<T> reaching_;
};

// All kernels are deterministic.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> perforated_conv2d_backward(
    const Tensor& grad_output,          // [N, Co, Ho, Wo]
    const Tensor& x,                    // [N, Ci, H, W]
    const Tensor& weight,               // [Co, Ci / groups, kh, kw]
    const Tensor& mask,                 // [N, Ho, Wo]
    const std::optional<Tensor>& bias,  // [Co]
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, int64_t fill,
    const std::optional<Tensor>& positions,  // [K]
    const std::optional<Tensor>& rows,       // [N, Ho, Wo]
    bool need_x, bool need_weight, bool need_mask, bool need_bias, bool need_base, bool) {
  const PerforatedShape shape = check_perforated_conv2d_grad(
      grad_output, x, weight, mask, bias, stride, padding, dilation, groups, fill, positions, rows);
  const CudaScope scope(x);
  const bool empty = grad_output.numel() == 0 || x.numel() == 0;
  const auto sizes_if = [](bool needed, const Tensor& like) {
    return needed ? std::vector<int64_t>(like.sizes().begin(), like.sizes().end()) : std::vector<int64_t>{0};
  };
  const auto make = [&](const Tensor& like, const std::vector<int64_t>& sizes) {
    return empty ? zeros_of(like, sizes) : empty_of(like, sizes);
  };
  Tensor grad_x = need_x ? new_maps(x, sizes_if(true, x)) : empty_of(x, {0});
  const Tensor grad_weight = make(weight, sizes_if(need_weight, weight));
  const Tensor grad_mask = zeros_of(mask, sizes_if(need_mask, mask));
  const Tensor grad_bias = make(x, {need_bias ? shape.out_channels : 0});
  const Tensor grad_base = need_base ? new_maps(x, sizes_if(true, grad_output)) : empty_of(x, {0});
  if (grad_output.numel() == 0 && need_x) torch::stable::zero_(grad_x);
  if (grad_output.numel() > 0) {
    const Inputs inputs("perforated_conv2d_backward", scope, shape, x, weight, mask, bias, positions, rows);
    dispatch_floating("perforated_conv2d_backward", "x", x.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      Backward<T> backward(scope, inputs, grad_output);
      if (need_base) backward.run_base(grad_base);
      if (need_mask) backward.run_mask(grad_mask);
      if (!need_x && !need_weight && !need_bias) return;
      backward.make_rows();
      if (need_x && x.numel() > 0) backward.run_x(grad_x);
      if (need_weight || need_bias) {
        backward.run_weight(need_weight ? &grad_weight : nullptr, need_bias ? &grad_bias : nullptr);
      }
    });
  }
  return {grad_x, grad_weight, grad_mask, grad_bias, grad_base};
}

}  // namespace
}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("perforated_conv2d", TORCH_BOX(&effops::rowconv::perforated_conv2d));
  m.impl("perforated_conv2d_backward", TORCH_BOX(&effops::rowconv::perforated_conv2d_backward));
}
