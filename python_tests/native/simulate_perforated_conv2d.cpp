// Runs the CUDA kernels of perforated_conv2d in the simulator, with the launches of
// perforated_conv2d_cuda.cu.
#include "simulate_rowconv.h"

#include "rowconv/row_pixel_kernels.cuh"

namespace {

using namespace effops;
using namespace effops::rowconv;
using simulator::DType;

constexpr int64_t kNearest = 2;  // fill

// x, grad_output, base as pixels [N, H, W, C] or maps [N, C, H, W] (flag channels_last; x always as pixels);
// weight, bias; mask; stride, padding, dilation, groups, fill, engine, splits. The plan: positions of the
// capacity, rows, count, and for the nearest: nearest, copy_offsets, copies.
template <typename T>
class Run {
 public:
  explicit Run(simulator::Call& call)
      : call_(call),
        x_(call.tensor("x")),
        weight_(call.tensor("weight")),
        groups_(call.integer("groups")),
        fill_(call.integer("fill")),
        capacity_(call.tensor("positions").numel()),
        positions_(call.tensor("positions").template data<const int64_t>()),
        rows_(call.tensor("rows").template data<const int64_t>()) {
    const auto stride = call.integers("stride"), padding = call.integers("padding");
    const auto dilation = call.integers("dilation");
    const auto& rows = call.tensor("rows");
    geometry_ = {x_.size(1), x_.size(2), rows.size(1), rows.size(2), weight_.size(2), weight_.size(3),
                 stride[0],  stride[1],  padding[0],   padding[1],   dilation[0],     dilation[1]};
    branches_ = one_branch(geometry_);
    layout_ = map_layout(call.flag("channels_last"), outputs(), geometry_.out_cells());
    if (fill_ == kNearest) {
      nearest_ = call.tensor("nearest").template data<const int64_t>();
      reaching_.copy_offsets = call.tensor("copy_offsets").template data<const int64_t>();
      reaching_.copies = call.tensor("copies").template data<const int64_t>();
    }
    reaching_.grad = data("grad_output");
    reaching_.layout = layout_;
    reaching_.cells = cells();
    reaching_.positions = positions_;
    reaching_.rows = capacity_;
    reaching_.channels = outputs();
    reaching_.count = count();
  }

  void forward() {
    auto& output = call_.output("output", kType, call_.tensor("grad_output").sizes());
    RowGemm<T> gemm = products();
    gemm.positions = positions_;
    gemm.limit = cells();
    gemm.scale = scale();
    gemm.scale_is_float = scale_is_float();
    gemm.result = output.raw();
    gemm.layout = layout_;
    run(gemm, "packed", false);
    FillArguments<T> fill = this->fill(output);
    fill.fills_skipped = true;
    if (call_.has("base")) {
      fill.base = data("base");
      fill.base_layout = layout_;
    }
    fill.nearest = nearest_;
    launch(&fill_pixels_kernel<T>, fill);
  }

  // The dense way: "dense" is the convolution of all positions.
  void multiply_dense() {
    auto& output = call_.output("multiplied", kType, call_.tensor("dense").sizes(), simulator::Fill::kZeros);
    std::copy_n(data("dense"), output.numel(), output.template data<T>());
    FillArguments<T> fill = this->fill(output);
    fill.scale = scale();
    fill.scale_is_float = scale_is_float();
    launch(&fill_pixels_kernel<T>, fill);
  }

  void backward() {
    auto& rows = call_.scratch("gradient_rows", kType, {capacity_, outputs()});
    launch(&reaching_gradient_kernel<T>, reaching_, scale(), scale_is_float(), rows.template data<T>());
    backward_x(rows);
    backward_weight(rows);
    if (scale() != nullptr) backward_mask();
    FillArguments<T> fill = this->fill(call_.output("grad_base", kType, call_.tensor("grad_output").sizes()));
    fill.clears_kept = fill.fills_skipped = true;
    fill.base = reaching_.grad;
    fill.base_layout = layout_;
    launch(&fill_pixels_kernel<T>, fill);
  }

 private:
  static constexpr DType kType = simulator::kDTypeOf<T>;
  const T* data(const std::string& name) const { return call_.tensor(name).template data<const T>(); }
  int64_t inputs() const { return x_.size(3); }
  int64_t outputs() const { return weight_.size(0); }
  int64_t cells() const { return x_.size(0) * geometry_.out_cells(); }
  const int64_t* count() const { return call_.tensor("count").template data<const int64_t>(); }
  const void* scale() const {
    return call_.tensor("mask").dtype() == DType::kBool ? nullptr : call_.tensor("mask").raw();
  }
  bool scale_is_float() const { return call_.tensor("mask").dtype() == DType::kFloat32; }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), const Arguments&... arguments) const {
    simulator::launch_few_blocks(kernel, 2, kElementThreads, arguments...);
  }
  OperandRows<T> rows_of(const T* rows, int64_t channels) const {
    const int64_t together = groups_ == channels ? channels : channels / groups_;
    return {rows, nullptr, INT64_MAX, channels, 0, together * sizeof(T) % 16 == 0};
  }
  FillArguments<T> fill(simulator::Tensor& maps) const {
    FillArguments<T> fill{};
    fill.rows = rows_;
    fill.positions = positions_;
    fill.capacity = capacity_;
    fill.cells = cells();
    fill.channels = outputs();
    fill.output = maps.template data<T>();
    fill.layout = layout_;
    return fill;
  }

  RowGemm<T> products() const {
    RowGemm<T> gemm{};
    gemm.source = pixel_rows(geometry_, x_.size(0), positions_);
    gemm.operand = rows_of(data("x"), inputs());
    gemm.rows = capacity_;
    gemm.count = count();
    if (call_.has("bias")) gemm.bias[0] = data("bias");
    return gemm;
  }

  void run(RowGemm<T>& gemm, const std::string& name, bool transposed) {
    gemm.branches = branches_;
    gemm.groups = static_cast<int32_t>(groups_);
    simulator::pack_weights<T>(call_, name, {data("weight")}, transposed, outputs() / groups_,
                               inputs() / groups_, gemm);
    simulator::run_gemm<T, 1>(call_, gemm);
  }

  void backward_x(simulator::Tensor& rows) {
    RowGemm<T> gemm{};
    gemm.source = pixel_rows_back(RowKind::kPixelsBack, geometry_, x_.size(0), {rows_, true}, capacity_);
    gemm.operand = rows_of(rows.template data<T>(), outputs());
    gemm.rows = gemm.limit = x_.size(0) * geometry_.in_cells();
    gemm.skips_taps = true;
    gemm.result = call_.output("grad_x", kType, x_.sizes()).raw();
    gemm.layout = row_layout(inputs());
    run(gemm, "packed_back", true);
  }

  void backward_weight(simulator::Tensor& rows) {
    RowOuter<T> outer{};
    outer.source = pixel_rows(geometry_, x_.size(0), positions_);
    outer.branches = branches_;
    outer.operand = rows_of(data("x"), inputs());
    outer.grad = rows_of(rows.template data<T>(), outputs());
    outer.rows = capacity_;
    outer.count = count();
    outer.groups = static_cast<int32_t>(groups_);
    outer.outputs = static_cast<int32_t>(outputs() / groups_);
    outer.inputs = static_cast<int32_t>(inputs() / groups_);
    simulator::run_outer<T, 2>(call_, outer,
                               {call_.output("grad_weight", kType, weight_.sizes()).template data<T>()},
                               {call_.output("grad_bias", kType, {outputs()}).template data<T>()});
  }

  void backward_mask() {
    using A = accumulator_t<T>;
    auto& products = call_.scratch("products", simulator::kDTypeOf<A>, {capacity_, outputs()});
    RowGemm<T> gemm = this->products();
    gemm.limit = capacity_;
    gemm.result = products.raw();
    gemm.wide_result = true;
    gemm.layout = row_layout(outputs());
    run(gemm, "packed_again", false);
    auto& grad_mask = call_.output("grad_mask", call_.tensor("mask").dtype(), call_.tensor("mask").sizes(),
                                   simulator::Fill::kZeros);
    launch(&mask_gradient_kernel<T>, reaching_, products.template data<const A>(), grad_mask.raw(),
           scale_is_float());
  }

  simulator::Call& call_;
  const simulator::Tensor &x_, &weight_;
  int64_t groups_, fill_, capacity_;
  const int64_t *positions_, *rows_, *nearest_ = nullptr;
  Geometry geometry_;
  BranchList branches_;
  MapLayout layout_;
  ReachingGradient<T> reaching_{};
};

void perforated_conv2d(simulator::Call& call) {
  simulator::dispatch<float, bf16>(call.tensor("x").dtype(), [&]<typename T>(std::type_identity<T>) {
    Run<T> run(call);
    run.forward();
    if (call.has("dense")) run.multiply_dense();
    run.backward();
  });
}

}  // namespace

EFFOPS_SIMULATE("perforated_conv2d", perforated_conv2d)
