// Runs the CUDA kernels of select_conv2d in the simulator, with the launches of select_conv2d_cuda.cu.
#include "simulate_rowconv.h"

#include "rowconv/row_pixel_kernels.cuh"

namespace {

using namespace effops;
using namespace effops::rowconv;
using simulator::DType;

// x, grad_output as pixels [N, H, W, C], weights [P, Co, Ci, k, k], choice, optionally bias; dilations,
// engine, splits.
template <typename T>
class Run {
 public:
  explicit Run(simulator::Call& call)
      : call_(call),
        x_(call.tensor("x")),
        weights_(call.tensor("weights")),
        choice_(simulator::id_map(call.tensor("choice"))),
        dilations_(call.integers("dilations")),
        cells_(call.tensor("choice").numel()) {
    for (size_t p = 0; p < dilations_.size(); ++p) (dilations_[p] == 0 ? identity_ : convolved_) |= 1u << p;
  }

  void forward() {
    auto& output = call_.output("output", kType, call_.tensor("grad_output").sizes());
    copy_identity(x_, output, false);
    for (size_t p = 0; p < dilations_.size(); ++p) {
      if (dilations_[p] == 0) continue;
      const Cells cells = find(p);
      RowGemm<T> gemm{};
      gemm.source = pixel_rows(geometry(p), x_.size(0), cells.positions);
      gemm.branches = one_branch(geometry(p));
      gemm.operand = rows_of(x_);
      gemm.count = cells.count;
      gemm.positions = cells.positions;
      if (call_.has("bias")) gemm.bias[0] = data("bias") + static_cast<int64_t>(p) * outputs();
      gemm.layout = row_layout(outputs());
      run(gemm, "packed" + std::to_string(p), {weight(p)}, false, output);
    }
  }

  void backward() {
    const auto& grads = call_.tensor("grad_output");
    backward_x(grads);
    const size_t branches = dilations_.size();
    auto& weights = call_.output("grad_weights", kType, weights_.sizes(), simulator::Fill::kZeros);
    auto& biases = call_.output("grad_bias", kType, {weights_.size(0), outputs()}, simulator::Fill::kZeros);
    for (size_t p = 0; p < branches; ++p) {
      if (dilations_[p] == 0) continue;
      const Cells cells = find(p);
      RowOuter<T> outer{};
      outer.source = pixel_rows(geometry(p), x_.size(0), cells.positions);
      outer.branches = one_branch(geometry(p));
      outer.operand = rows_of(x_);
      outer.grad = rows_of(grads);
      outer.grad_positions = cells.positions;
      outer.rows = cells_;
      outer.count = cells.count;
      outer.groups = 1;
      outer.outputs = static_cast<int32_t>(outputs());
      outer.inputs = static_cast<int32_t>(x_.size(3));
      simulator::run_outer<T, 2>(call_, outer,
                                 {weights.template data<T>() + static_cast<int64_t>(p) * weights_.stride(0)},
                                 {biases.template data<T>() + static_cast<int64_t>(p) * outputs()});
    }
  }

 private:
  static constexpr DType kType = simulator::kDTypeOf<T>;
  struct Cells {
    int64_t *positions, *count;
  };
  const T* data(const std::string& name) const { return call_.tensor(name).template data<const T>(); }
  const T* weight(size_t p) const { return data("weights") + static_cast<int64_t>(p) * weights_.stride(0); }
  int64_t outputs() const { return weights_.size(1); }
  Geometry geometry(size_t p) const {
    return same_geometry(x_.size(1), x_.size(2), weights_.size(3), dilations_[p]);
  }
  OperandRows<T> rows_of(const simulator::Tensor& pixels) const {
    const int64_t channels = pixels.size(3);
    return {pixels.template data<const T>(), nullptr, INT64_MAX, channels, 0, channels * sizeof(T) % 16 == 0};
  }

  Cells find(size_t p) {
    Cells cells{call_.scratch("positions", DType::kInt64, {cells_}).template data<int64_t>(),
                call_.scratch("count", DType::kInt64, {1}).template data<int64_t>()};
    const simulator::Scan scan(call_, cells_);
    const ChoiceSource source{choice_, static_cast<int64_t>(p)};
    scan.sums(source);
    scan.run(source, ChoiceSink{cells.positions, cells.count});
    return cells;
  }

  void copy_identity(const simulator::Tensor& input, simulator::Tensor& output, bool clears_convolved) {
    const MapLayout layout = row_layout(input.size(3));
    const CopyArguments<T> copy{choice_,
                                cells_,
                                output.size(-1),
                                identity_,
                                convolved_,
                                input.template data<const T>(),
                                layout,
                                output.template data<T>(),
                                row_layout(output.size(-1)),
                                clears_convolved};
    simulator::launch_few_blocks(&copy_identity_kernel<T>, 2, kElementThreads, copy);
  }

  void run(RowGemm<T>& gemm, const std::string& name, const std::vector<const T*>& weights, bool transposed,
           simulator::Tensor& result) {
    gemm.groups = 1;
    gemm.rows = gemm.limit = cells_;
    gemm.result = result.raw();
    simulator::pack_weights<T>(call_, name, weights, transposed, outputs(), x_.size(3), gemm);
    simulator::run_gemm<T, 1>(call_, gemm);
  }

  void backward_x(const simulator::Tensor& grads) {
    RowGemm<T> gemm{};
    std::vector<const T*> weights;
    for (size_t p = 0; p < dilations_.size(); ++p) {
      if (dilations_[p] == 0) continue;
      Branch branch = one_branch(geometry(p)).branch[0];
      branch.choice = static_cast<int32_t>(p);
      add_branch(gemm.branches, branch);
      weights.push_back(weight(p));
    }
    gemm.source = pixel_rows_back(RowKind::kChoiceBack, geometry(0), x_.size(0), choice_, cells_);
    gemm.operand = rows_of(grads);
    gemm.skips_taps = true;
    if (identity_ != 0) {
      auto& copies = call_.scratch("copies", kType, {cells_, x_.size(3)});
      copy_identity(grads, copies, true);
      gemm.addend = copies.template data<T>();
    }
    gemm.layout = row_layout(x_.size(3));
    run(gemm, "packed_back", weights, true, call_.output("grad_x", kType, x_.sizes()));
  }

  simulator::Call& call_;
  const simulator::Tensor &x_, &weights_;
  IdMap choice_;
  std::vector<int64_t> dilations_;
  int64_t cells_;
  uint32_t identity_ = 0, convolved_ = 0;
};

void select_conv2d(simulator::Call& call) {
  simulator::dispatch<double, f16>(call.tensor("x").dtype(), [&]<typename T>(std::type_identity<T>) {
    Run<T> run(call);
    run.forward();
    run.backward();
  });
}

}  // namespace

EFFOPS_SIMULATE("select_conv2d", select_conv2d)
