// select_conv2d on CUDA: arguments, launches.
#include "select_conv2d.h"

#include "../common/dtype_switch.h"
#include "id_map_cuda.cuh"
#include "row_pixel_cuda.cuh"
#include "scan_cuda.cuh"

namespace effops::rowconv {
namespace {

// Checked inputs, laid out as the kernels read them.
struct Inputs {
  SelectShape shape;
  Tensor x, weights, choice;
  std::vector<int64_t> dilations;
  uint32_t identity = 0, convolved = 0;  // bit per branch

  Inputs(const char* op, const SelectShape& checked, const Tensor& x_in, const Tensor& weights_in,
         const Tensor& choice_in, const std::vector<int64_t>& dilations_in)
      : shape(checked),
        x(x_in),
        weights(as_contiguous(weights_in)),
        choice(as_contiguous(choice_in)),
        dilations(dilations_in) {
    check_kernel_limits(op, shape.branches, shape.branches * shape.kernel * shape.kernel, shape.out_channels,
                        shape.in_channels);
    for (int64_t p = 0; p < shape.branches; ++p) (dilations[p] == 0 ? identity : convolved) |= 1u << p;
  }

  int64_t cells() const { return shape.batch * shape.height * shape.width; }
  bool is_convolved(int64_t branch) const { return (convolved >> branch & 1u) != 0; }
  Geometry geometry(int64_t branch) const {
    return same_geometry(shape.height, shape.width, shape.kernel, dilations[branch]);
  }
  template <typename T>
  const T* weight(int64_t branch) const {
    const int64_t elements = shape.out_channels * shape.in_channels * shape.kernel * shape.kernel;
    return static_cast<const T*>(weights.const_data_ptr()) + branch * elements;
  }
  template <typename T>
  WeightPack<T> pack(bool transposed) const {
    WeightPack<T> pack{};
    pack.outputs = shape.out_channels;
    pack.inputs = shape.in_channels;
    pack.transposed = transposed;
    return pack;
  }
};

// The cells of one branch after the other, in the same memory: kernels of one stream follow each other.
class BranchCells {
 public:
  BranchCells(const CudaScope& scope, const Inputs& inputs)
      : scope_(scope),
        inputs_(inputs),
        positions_(empty_of(inputs.x, {inputs.cells()}, ScalarType::Long)),
        count_(empty_of(inputs.x, {1}, ScalarType::Long)) {}

  void find(int64_t branch) const {
    const ChoiceSink sink{positions_.mutable_data_ptr<int64_t>(), count_.mutable_data_ptr<int64_t>()};
    scan(scope_, inputs_.x, ChoiceSource{id_map_of(inputs_.choice), branch}, sink, inputs_.cells());
  }
  const int64_t* positions() const { return positions_.const_data_ptr<int64_t>(); }
  const int64_t* count() const { return count_.const_data_ptr<int64_t>(); }

 private:
  const CudaScope& scope_;
  const Inputs& inputs_;
  Tensor positions_, count_;
};

// Where no branch convolves: copies of `input` for the identity, else 0.
template <typename T>
void copy_identity(const CudaScope& scope, const Inputs& inputs, const Tensor& input, const Tensor& output,
                   const MapLayout& layout, bool clears_convolved) {
  const CopyArguments<T> copy{id_map_of(inputs.choice),
                              inputs.cells(),
                              input.size(1),
                              inputs.identity,
                              inputs.convolved,
                              static_cast<const T*>(input.const_data_ptr()),
                              layout_of(input),
                              static_cast<T*>(output.mutable_data_ptr()),
                              layout,
                              clears_convolved};
  scope.launch(&copy_identity_kernel<T>, element_blocks(copy.cells * copy.channels), kElementThreads, 0,
               copy);
}

template <typename T>
void run_forward(const CudaScope& scope, const Inputs& inputs, const std::optional<Tensor>& bias,
                 const Tensor& output) {
  const SelectShape& shape = inputs.shape;
  const Tensor pixels = pixel_rows_of(inputs.x);
  const MapLayout layout = layout_of(output);
  if (inputs.identity != 0) {
    copy_identity<T>(scope, inputs, as_maps(inputs.x), output, layout, false);
  } else {
    Tensor target = output;
    torch::stable::zero_(target);
  }
  const BranchCells cells(scope, inputs);
  for (int64_t p = 0; p < shape.branches; ++p) {
    if (!inputs.is_convolved(p)) continue;
    cells.find(p);
    RowGemm<T> gemm{};
    gemm.source = pixel_rows(inputs.geometry(p), shape.batch, cells.positions());
    gemm.branches = one_branch(inputs.geometry(p));
    gemm.groups = 1;
    gemm.operand = operand_rows<T>(pixels, shape.in_channels, 1);
    gemm.rows = gemm.limit = inputs.cells();
    gemm.count = cells.count();
    gemm.positions = cells.positions();
    if (bias) gemm.bias[0] = static_cast<const T*>(bias->const_data_ptr()) + p * shape.out_channels;
    gemm.result = output.mutable_data_ptr();
    gemm.layout = layout;
    WeightPack<T> pack = inputs.pack<T>(false);
    pack.weight[0] = inputs.weight<T>(p);
    run_row_gemm<T>(scope, output, gemm, pack);
  }
}

Tensor select_conv2d(const Tensor& x,                    // [N, Ci, H, W]
                     const Tensor& weights,              // [P, Co, Ci, k, k]
                     const Tensor& choice,               // [N, H, W]
                     const std::optional<Tensor>& bias,  // [P, Co]
                     const std::vector<int64_t>& dilations) {
  const SelectShape shape = check_select_conv2d(x, weights, choice, bias, dilations);
  const Inputs inputs("select_conv2d", shape, x, weights, choice, dilations);
  const CudaScope scope(x);
  const Tensor output = new_maps(x, {shape.batch, shape.out_channels, shape.height, shape.width});
  if (output.numel() == 0) return output;
  const auto contiguous_bias = bias ? std::optional<Tensor>(as_contiguous(*bias)) : std::nullopt;
  dispatch_floating("select_conv2d", "x", x.scalar_type(), [&](auto tag) {
    run_forward<typename decltype(tag)::type>(scope, inputs, contiguous_bias, output);
  });
  return output;
}

// ------------------------------------------------------------------------------------------ backward

// `grads`: pixel after pixel. All branches in one product, whose tiles skip the branches that they don't
// meet.
template <typename T>
void run_x(const CudaScope& scope, const Inputs& inputs, const Tensor& grads, const Tensor& grad_x) {
  const SelectShape& shape = inputs.shape;
  RowGemm<T> gemm{};
  WeightPack<T> pack = inputs.pack<T>(true);
  for (int64_t p = 0; p < shape.branches; ++p) {
    if (!inputs.is_convolved(p)) continue;
    Branch branch = one_branch(inputs.geometry(p)).branch[0];
    branch.choice = static_cast<int32_t>(p);
    pack.weight[gemm.branches.count] = inputs.weight<T>(p);
    add_branch(gemm.branches, branch);
  }
  gemm.source = pixel_rows_back(RowKind::kChoiceBack,
                                same_geometry(shape.height, shape.width, shape.kernel, 1), shape.batch,
                                id_map_of(inputs.choice), inputs.cells());
  gemm.groups = 1;
  gemm.operand = operand_rows<T>(grads, shape.out_channels, 1);
  gemm.rows = gemm.limit = inputs.cells();
  gemm.skips_taps = true;
  std::optional<Tensor> copies;
  if (inputs.identity != 0) {
    copies = empty_of(grads, {inputs.cells(), shape.in_channels});
    copy_identity<T>(scope, inputs, grads, *copies, row_layout(shape.in_channels), true);
    gemm.addend = static_cast<const T*>(copies->const_data_ptr());
  }
  gemm.result = grad_x.mutable_data_ptr();
  gemm.layout = layout_of(grad_x);
  run_row_gemm<T>(scope, grads, gemm, pack);
}

// The gradients of identity branches are 0 already.
template <typename T>
void run_weights(const CudaScope& scope, const Inputs& inputs, const Tensor& grads,
                 const Tensor& grad_weights, const Tensor& grad_bias) {
  const SelectShape& shape = inputs.shape;
  const Tensor pixels = pixel_rows_of(inputs.x);
  const BranchCells cells(scope, inputs);
  for (int64_t p = 0; p < shape.branches; ++p) {
    if (!inputs.is_convolved(p)) continue;
    cells.find(p);
    RowOuter<T> outer{};
    outer.source = pixel_rows(inputs.geometry(p), shape.batch, cells.positions());
    outer.branches = one_branch(inputs.geometry(p));
    outer.operand = operand_rows<T>(pixels, shape.in_channels, 1);
    outer.grad = operand_rows<T>(grads, shape.out_channels, 1);
    outer.grad_positions = cells.positions();
    outer.rows = inputs.cells();
    outer.count = cells.count();
    outer.groups = 1;
    outer.outputs = static_cast<int32_t>(shape.out_channels);
    outer.inputs = static_cast<int32_t>(shape.in_channels);
    WeightGradients<T> targets{};
    if (grad_weights.numel() > 0) {
      const int64_t elements = grad_weights.numel() / shape.branches;
      targets.weight[0] = static_cast<T*>(grad_weights.mutable_data_ptr()) + p * elements;
    }
    if (grad_bias.numel() > 0) {
      targets.bias[0] = static_cast<T*>(grad_bias.mutable_data_ptr()) + p * shape.out_channels;
    }
    run_row_outer<T>(scope, grads, outer, targets);
  }
}

// All kernels are deterministic.
std::tuple<Tensor, Tensor, Tensor> select_conv2d_backward(const Tensor& grad_output,  // [N, Co, H, W]
                                                          const Tensor& x,            // [N, Ci, H, W]
                                                          const Tensor& weights,      // [P, Co, Ci, k, k]
                                                          const Tensor& choice,       // [N, H, W]
                                                          const std::vector<int64_t>& dilations, bool need_x,
                                                          bool need_weights, bool need_bias, bool) {
  const SelectShape shape = check_select_conv2d_grad(grad_output, x, weights, choice, dilations);
  const Inputs inputs("select_conv2d_backward", shape, x, weights, choice, dilations);
  const CudaScope scope(x);
  const bool empty = grad_output.numel() == 0;
  Tensor grad_x = need_x ? new_maps(x, {shape.batch, shape.in_channels, shape.height, shape.width})
                         : empty_of(x, {0});
  if (empty) torch::stable::zero_(grad_x);
  // Identity branches have none.
  const auto make = [&](bool needed, const std::vector<int64_t>& sizes) {
    if (!needed) return empty_of(x, {0});
    return empty || inputs.identity != 0 ? zeros_of(x, sizes) : empty_of(x, sizes);
  };
  const Tensor grad_weights =
      make(need_weights, {shape.branches, shape.out_channels, shape.in_channels, shape.kernel, shape.kernel});
  const Tensor grad_bias = make(need_bias, {shape.branches, shape.out_channels});
  if (!empty) {
    dispatch_floating("select_conv2d_backward", "x", x.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const Tensor grads = pixel_rows_of(grad_output);
      if (grad_x.numel() > 0) run_x<T>(scope, inputs, grads, grad_x);
      if (need_weights || need_bias) run_weights<T>(scope, inputs, grads, grad_weights, grad_bias);
    });
  }
  return {grad_x, grad_weights, grad_bias};
}

}  // namespace
}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("select_conv2d", TORCH_BOX(&effops::rowconv::select_conv2d));
  m.impl("select_conv2d_backward", TORCH_BOX(&effops::rowconv::select_conv2d_backward));
}
