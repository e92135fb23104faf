// sps_conv2d on CUDA: arguments, launches.
#include "../common/dtype_switch.h"
#include "cell_buckets_cuda.cuh"
#include "row_gemm_cuda.cuh"
#include "sps_conv2d.h"

namespace effops::rowconv {
namespace {

// Checked inputs, laid out as the kernels read them.
struct Inputs {
  SpsConvShape shape;
  Tensor active, passive, index_map, roi, xy;
  std::vector<Tensor> weight;
  BranchList branches;

  Inputs(const char* op, SpsConvShape shape_in, const std::vector<Tensor>& sps,
         const std::vector<Tensor>& weight_in, const std::vector<int64_t>& dilation)
      : shape(std::move(shape_in)),
        active(as_contiguous(sps[0])),
        passive(as_contiguous(sps[1])),
        index_map(as_contiguous(sps[2])),
        roi(as_contiguous(sps[3])),
        xy(as_contiguous(sps[4])) {
    int64_t taps = 0;
    for (const int64_t kernel : shape.kernels) taps += kernel * kernel;
    check_kernel_limits(op, shape.branches(), taps, shape.out_channels, shape.sps.features);
    for (const Tensor& w : weight_in) weight.push_back(as_contiguous(w));
    branches = same_branches(shape.kernels, dilation);
  }

  bool is_empty() const {
    return shape.sps.active == 0 || shape.sps.features == 0 || shape.out_channels == 0;
  }

  RowSource source(RowKind kind) const {
    const SpsShape& sps = shape.sps;
    return map_rows(kind, {{index_map.const_data_ptr(), sps.wide_map},
                           roi.const_data_ptr<int32_t>(),
                           xy.const_data_ptr<int32_t>(),
                           sps.active,
                           sps.passive,
                           sps.maps,
                           sps.height,
                           sps.width});
  }

  template <typename T>
  OperandRows<T> features() const {
    OperandRows<T> rows = operand_rows<T>(active, shape.sps.features, shape.groups);
    rows.second = static_cast<const T*>(passive.const_data_ptr());
    rows.second_begin = shape.sps.active;
    rows.aligned = rows.aligned && is_aligned(passive, 16);
    return rows;
  }

  template <typename T>
  WeightPack<T> weights(bool transposed) const {
    WeightPack<T> pack{};
    for (size_t d = 0; d < weight.size(); ++d)
      pack.weight[d] = static_cast<const T*>(weight[d].const_data_ptr());
    pack.outputs = shape.out_channels / shape.groups;
    pack.inputs = shape.sps.features / shape.groups;
    pack.transposed = transposed;
    return pack;
  }

  // All but the operand and the source.
  template <typename T>
  RowGemm<T> gemm(const Tensor& result) const {
    RowGemm<T> gemm{};
    gemm.branches = branches;
    gemm.groups = static_cast<int32_t>(shape.groups);
    gemm.rows = gemm.limit = result.size(0);
    gemm.result = result.mutable_data_ptr();
    gemm.layout = row_layout(result.size(1));
    return gemm;
  }
};

std::tuple<Tensor, Tensor> sps_conv2d(const Tensor& active,     // [NA, F]
                                      const Tensor& passive,    // [NP, F]
                                      const Tensor& index_map,  // [R, H, W]
                                      const Tensor& roi,        // [NA]
                                      const Tensor& xy,         // [NA, 2]
                                      const std::vector<Tensor>& weight, const std::vector<Tensor>& bias,
                                      const std::vector<int64_t>& dilation, int64_t activation,
                                      int64_t groups) {
  const Inputs inputs(
      "sps_conv2d",
      check_sps_conv2d(active, passive, index_map, roi, xy, weight, bias, dilation, activation, groups),
      {active, passive, index_map, roi, xy}, weight, dilation);
  const SpsConvShape& shape = inputs.shape;
  const CudaScope scope(active);
  const int64_t rows = shape.sps.active;
  const Tensor output = empty_of(active, {rows, shape.out_channels});
  const Tensor signs =
      empty_of(active, {shape.relu ? shape.branches() : 0, rows, shape.sign_bytes()}, ScalarType::Byte);
  if (rows == 0 || shape.out_channels == 0) return {output, signs};
  std::vector<Tensor> biases;
  for (const Tensor& b : bias) biases.push_back(as_contiguous(b));
  dispatch_floating("sps_conv2d", "active", active.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    RowGemm<T> gemm = inputs.gemm<T>(output);
    gemm.source = inputs.source(RowKind::kMap);
    gemm.operand = inputs.features<T>();
    for (size_t d = 0; d < biases.size(); ++d)
      gemm.bias[d] = static_cast<const T*>(biases[d].const_data_ptr());
    gemm.relu = shape.relu;
    gemm.signs = shape.relu ? static_cast<uint8_t*>(signs.mutable_data_ptr()) : nullptr;
    gemm.sign_bytes = shape.sign_bytes();
    run_row_gemm<T>(scope, active, gemm, inputs.weights<T>(false));
  });
  return {output, signs};
}

// The gradients of the branches' results: that of the output, or with relu what of it has passed.
template <typename T>
struct BranchGradients {
  Tensor memory;
  OperandRows<T> rows;

  BranchGradients(const CudaScope& scope, const Inputs& inputs, const Tensor& grad_output,
                  const Tensor& signs)
      : memory(as_contiguous(grad_output)) {
    const SpsConvShape& shape = inputs.shape;
    const int64_t count = shape.sps.active, channels = shape.out_channels;
    if (shape.relu) {
      const Tensor grad = memory, bits = as_contiguous(signs);
      memory = empty_of(grad, {shape.branches(), count, channels});
      scope.launch(&split_gradient_kernel<T>,
                   (count * shape.sign_bytes() + kWeightThreads - 1) / kWeightThreads, kWeightThreads, 0,
                   static_cast<const T*>(grad.const_data_ptr()),
                   static_cast<const uint8_t*>(bits.const_data_ptr()), count, channels,
                   static_cast<int32_t>(shape.branches()), static_cast<T*>(memory.mutable_data_ptr()));
    }
    rows = operand_rows<T>(memory, channels, shape.groups);
    rows.branch_stride = shape.relu ? count * channels : 0;
    rows.aligned = rows.aligned && rows.branch_stride * sizeof(T) % 16 == 0;
  }
};

// The buckets of the passive rows: which active rows each tap of theirs is read by.
CellBuckets bucket_taps(const CudaScope& scope, const Inputs& inputs) {
  const SpsShape& sps = inputs.shape.sps;
  const int64_t buckets = sps.passive * inputs.branches.taps, cells = sps.active * inputs.branches.taps;
  const bool wide = buckets > INT32_MAX;
  const Tensor ids = empty_of(inputs.active, {cells}, wide ? ScalarType::Long : ScalarType::Int);
  const auto run = [&](auto kernel, auto* data) {
    scope.launch(kernel, cell_blocks(cells), kCellThreads, 0, inputs.source(RowKind::kMap), inputs.branches,
                 sps.active, data);
  };
  if (wide) {
    run(&tap_buckets_kernel<int64_t>, ids.mutable_data_ptr<int64_t>());
  } else {
    run(&tap_buckets_kernel<int32_t>, ids.mutable_data_ptr<int32_t>());
  }
  return bucket_cells(scope, ids, 0, buckets);
}

struct Gradients {
  Tensor active, passive;
  std::vector<Tensor> weight, bias;
};

template <typename T>
void run_features_backward(const CudaScope& scope, const Inputs& inputs, const BranchGradients<T>& grads,
                           const Gradients& gradients) {
  const auto run = [&](const RowSource& source, const Tensor& result) {
    RowGemm<T> gemm = inputs.gemm<T>(result);
    gemm.source = source;
    gemm.operand = grads.rows;
    run_row_gemm<T>(scope, result, gemm, inputs.weights<T>(true));
  };
  if (gradients.active.numel() > 0) run(inputs.source(RowKind::kMapBack), gradients.active);
  if (gradients.passive.numel() > 0) {
    const CellBuckets buckets = bucket_taps(scope, inputs);
    run(bucket_rows(buckets.offsets.const_data_ptr<int64_t>(), buckets.cells.const_data_ptr<int64_t>(),
                    inputs.shape.sps.active),
        gradients.passive);
  }
}

template <typename T>
void run_weights_backward(const CudaScope& scope, const Inputs& inputs, const BranchGradients<T>& grads,
                          const Gradients& gradients, bool need_weight, bool need_bias) {
  const SpsConvShape& shape = inputs.shape;
  RowOuter<T> outer{};
  outer.source = inputs.source(RowKind::kMap);
  outer.branches = inputs.branches;
  outer.operand = inputs.features<T>();
  outer.grad = grads.rows;
  outer.rows = shape.sps.active;
  outer.groups = static_cast<int32_t>(shape.groups);
  outer.outputs = static_cast<int32_t>(shape.out_channels / shape.groups);
  outer.inputs = static_cast<int32_t>(shape.sps.features / shape.groups);
  WeightGradients<T> targets{};
  for (int64_t d = 0; d < shape.branches(); ++d) {
    if (need_weight) targets.weight[d] = static_cast<T*>(gradients.weight[d].mutable_data_ptr());
    if (need_bias) targets.bias[d] = static_cast<T*>(gradients.bias[d].mutable_data_ptr());
  }
  run_row_outer<T>(scope, inputs.active, outer, targets);
}

// All kernels are deterministic.
std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> sps_conv2d_backward(
    const Tensor& grad_output,  // [NA, O]
    const Tensor& signs,        // [D or 0, NA, ceil(O / 8)]
    const Tensor& active,       // [NA, F]
    const Tensor& passive,      // [NP, F]
    const Tensor& index_map,    // [R, H, W]
    const Tensor& roi,          // [NA]
    const Tensor& xy,           // [NA, 2]
    const std::vector<Tensor>& weight, const std::vector<int64_t>& dilation, int64_t activation,
    int64_t groups, bool need_active, bool need_passive, bool need_weight, bool need_bias, bool) {
  const Inputs inputs(
      "sps_conv2d_backward",
      check_sps_conv2d(active, passive, index_map, roi, xy, weight, {}, dilation, activation, groups),
      {active, passive, index_map, roi, xy}, weight, dilation);
  const SpsConvShape& shape = inputs.shape;
  check_sps_conv2d_grad(grad_output, signs, active, shape);
  const CudaScope scope(active);
  const bool empty = inputs.is_empty();
  const auto make = [&](const std::vector<int64_t>& sizes) {
    return empty ? zeros_of(active, sizes) : empty_of(active, sizes);
  };
  const auto sizes_if = [](bool needed, const std::vector<int64_t>& sizes) {
    return needed ? sizes : std::vector<int64_t>{0};
  };
  Gradients gradients{make(sizes_if(need_active, {shape.sps.active, shape.sps.features})),
                      make(sizes_if(need_passive, {shape.sps.passive, shape.sps.features})),
                      {},
                      {}};
  for (const Tensor& w : weight) {
    gradients.weight.push_back(make(sizes_if(need_weight, {w.size(0), w.size(1), w.size(2), w.size(3)})));
    if (need_bias) gradients.bias.push_back(make({shape.out_channels}));
  }
  if (!empty) {
    dispatch_floating("sps_conv2d_backward", "active", active.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const BranchGradients<T> grads(scope, inputs, grad_output, signs);
      run_features_backward<T>(scope, inputs, grads, gradients);
      if (need_weight || need_bias) {
        run_weights_backward<T>(scope, inputs, grads, gradients, need_weight, need_bias);
      }
    });
  }
  return {gradients.active, gradients.passive, gradients.weight, gradients.bias};
}

}  // namespace
}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("sps_conv2d", TORCH_BOX(&effops::rowconv::sps_conv2d));
  m.impl("sps_conv2d_backward", TORCH_BOX(&effops::rowconv::sps_conv2d_backward));
}
