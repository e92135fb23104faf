// Runs the CUDA kernels of sps_conv2d in the simulator, with the launches of sps_conv2d_cuda.cu.
#include "simulate_rowconv.h"

namespace {

using namespace effops;
using namespace effops::rowconv;
using simulator::DType;

// active [NA, F], passive [NP, F], index_map, roi, xy, weight<d>, optionally bias<d>; dilation, groups, relu,
// engine, grad_output [NA, O], splits.
template <typename T>
class Run {
 public:
  explicit Run(simulator::Call& call)
      : call_(call),
        dilation_(call.integers("dilation")),
        groups_(call.integer("groups")),
        relu_(call.flag("relu")),
        features_(call.tensor("active").size(1)),
        outputs_(call.tensor("weight0").size(0)) {
    std::vector<int64_t> kernels;
    for (size_t d = 0; d < dilation_.size(); ++d) {
      const auto& weight = call.tensor("weight" + std::to_string(d));
      kernels.push_back(weight.size(2));
      weights_.push_back(weight.template data<const T>());
    }
    branches_ = same_branches(kernels, dilation_);
    const auto& map = call.tensor("index_map");
    map_ = {simulator::id_map(map),
            call.tensor("roi").template data<const int32_t>(),
            call.tensor("xy").template data<const int32_t>(),
            call.tensor("active").size(0),
            call.tensor("passive").size(0),
            map.size(0),
            map.size(1),
            map.size(2)};
  }

  void forward() {
    const int64_t bytes = (outputs_ + 7) / 8, branches = relu_ ? branches_.count : 0;
    auto& output = call_.output("output", kType, {map_.active, outputs_});
    auto& signs = call_.output("signs", DType::kUInt8, {branches, map_.active, bytes});
    signs_ = signs.template data<uint8_t>();
    RowGemm<T> gemm{};
    gemm.source = map_rows(RowKind::kMap, map_);
    gemm.operand = features();
    for (int32_t d = 0; d < branches_.count && call_.has("bias0"); ++d) {
      gemm.bias[d] = data("bias" + std::to_string(d));
    }
    gemm.relu = relu_;
    gemm.signs = relu_ ? signs_ : nullptr;
    gemm.sign_bytes = bytes;
    run(gemm, "packed", false, map_.active, output);
  }

  // After forward().
  void backward() {
    OperandRows<T> grads{data("grad_output"), nullptr, INT64_MAX, outputs_, 0, is_aligned(outputs_)};
    if (relu_) {
      auto& memory = call_.scratch("branch_grads", kType, {branches_.count, map_.active, outputs_});
      simulator::launch_few_blocks(&split_gradient_kernel<T>, 2, kWeightThreads, grads.first,
                                   static_cast<const uint8_t*>(signs_), map_.active, outputs_,
                                   branches_.count, memory.template data<T>());
      grads.first = memory.template data<T>();
      grads.branch_stride = map_.active * outputs_;
      grads.aligned = grads.aligned && grads.branch_stride * sizeof(T) % 16 == 0;
    }
    backward_features(RowKind::kMapBack, "active", grads);
    backward_features(RowKind::kBuckets, "passive", grads);
    RowOuter<T> outer{};
    outer.source = map_rows(RowKind::kMap, map_);
    outer.branches = branches_;
    outer.operand = features();
    outer.grad = grads;
    outer.rows = map_.active;
    outer.groups = static_cast<int32_t>(groups_);
    outer.outputs = static_cast<int32_t>(outputs_ / groups_);
    outer.inputs = static_cast<int32_t>(features_ / groups_);
    std::vector<T*> weights, biases;
    for (int32_t d = 0; d < branches_.count; ++d) {
      const std::string number = std::to_string(d);
      const auto& sizes = call_.tensor("weight" + number).sizes();
      weights.push_back(call_.output("grad_weight" + number, kType, sizes).template data<T>());
      biases.push_back(call_.output("grad_bias" + number, kType, {outputs_}).template data<T>());
    }
    simulator::run_outer<T, std::is_same_v<T, f16> ? 4 : 2>(call_, outer, weights, biases);
  }

 private:
  static constexpr DType kType = simulator::kDTypeOf<T>;
  const T* data(const std::string& name) const { return call_.tensor(name).template data<const T>(); }

  // Of rows of so many channels.
  bool is_aligned(int64_t channels) const {
    const int64_t together = groups_ == channels ? channels : channels / groups_;
    return together * sizeof(T) % 16 == 0;
  }
  OperandRows<T> features() const {
    return {data("active"), data("passive"), map_.active, features_, 0, is_aligned(features_)};
  }

  void backward_features(RowKind kind, const std::string& name, const OperandRows<T>& grads) {
    const int64_t rows = call_.tensor(name).size(0);
    auto& result = call_.output("grad_" + name, kType, {rows, features_});
    RowGemm<T> gemm{};
    gemm.source = kind == RowKind::kBuckets ? buckets() : map_rows(kind, map_);
    gemm.operand = grads;
    run(gemm, "packed_" + name, true, rows, result);
  }

  RowSource buckets() {
    const int64_t cells = map_.active * branches_.taps;
    auto& ids = call_.scratch("tap_buckets", DType::kInt32, {cells});
    simulator::launch_few_blocks(&tap_buckets_kernel<int32_t>, 2, kCellThreads, map_rows(RowKind::kMap, map_),
                                 branches_, map_.active, ids.template data<int32_t>());
    const BucketArguments arguments{{ids.raw(), false}, cells, 0, map_.passive * branches_.taps};
    const auto found = simulator::bucket_cells(call_, arguments, /*output=*/false);
    return bucket_rows(found.offsets, found.cells, map_.active);
  }

  void run(RowGemm<T>& gemm, const std::string& name, bool transposed, int64_t rows,
           simulator::Tensor& result) {
    gemm.branches = branches_;
    gemm.rows = gemm.limit = rows;
    gemm.groups = static_cast<int32_t>(groups_);
    simulator::pack_weights<T>(call_, name, weights_, transposed, outputs_ / groups_, features_ / groups_,
                               gemm);
    gemm.result = result.raw();
    gemm.layout = row_layout(result.size(1));
    if constexpr (std::is_same_v<T, bf16>) {
      simulator::run_gemm<T, 1, 4>(call_, gemm);
    } else {
      simulator::run_gemm<T, 2>(call_, gemm);
    }
  }

  simulator::Call& call_;
  std::vector<int64_t> dilation_;
  int64_t groups_;
  bool relu_;
  int64_t features_, outputs_;
  std::vector<const T*> weights_;
  BranchList branches_;
  MapTensors map_;
  uint8_t* signs_ = nullptr;
};

void sps_conv2d(simulator::Call& call) {
  simulator::dispatch<float, bf16, f16>(call.tensor("active").dtype(),
                                        [&]<typename T>(std::type_identity<T>) {
                                          Run<T> run(call);
                                          run.forward();
                                          run.backward();
                                        });
}

}  // namespace

EFFOPS_SIMULATE("sps_conv2d", sps_conv2d)
