// Runs the CUDA kernels of sps_refine in the simulator, with the launches of sps_refine_cuda.cu.
#include "rowconv/sps_refine_kernels.cuh"
#include "simulate_scan.h"

namespace {

using namespace effops;
using namespace effops::rowconv;
using simulator::DType;

FloatType float_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return FloatType::kDouble;
    case DType::kBFloat16: return FloatType::kBFloat16;
    case DType::kFloat16: return FloatType::kHalf;
    default: return FloatType::kFloat;
  }
}

class Run {
 public:
  explicit Run(simulator::Call& call)
      : call_(call),
        active_(call.tensor("active")),
        passive_(call.tensor("passive")),
        map_(call.tensor("index_map")),
        features_(active_.size(1)) {
    const int64_t rows = active_.size(0), kept = std::min(call.integer("num_refine"), rows);
    const bool upsample = call.flag("upsample");
    const int64_t children = upsample ? 4 : 1, scale = upsample ? 2 : 1;
    kept_ = kept;
    shape_ = {rows, passive_.size(0), children * kept, passive_.size(0) + rows - kept, children};
    new_ids_ = call.output("new_ids", DType::kInt64, {rows}).data<int64_t>();
    wide_ = map_.dtype() == DType::kInt64 || call.flag("wide");
    new_map_ = call.output("index_map", wide_ ? DType::kInt64 : DType::kInt32,
                           {map_.size(0), scale * map_.size(1), scale * map_.size(2)})
                   .raw();
  }

  void choose_rows() {
    KeptRowSource source{};
    const simulator::Tensor& scores = call_.tensor("scores");
    source.scores = {scores.raw(), float_type_of(scores.dtype())};
    if (kept_ == 0 || kept_ == shape_.active) {
      source.constant_bound = {kept_ == 0 ? UINT64_MAX : 0, 0};
    } else {
      source.bound = find_bound(source.scores);
    }
    const RefineSink sink{source,
                          shape_,
                          call_.tensor("roi").data<const int32_t>(),
                          call_.tensor("xy").data<const int32_t>(),
                          new_ids_,
                          call_.output("roi", DType::kInt32, {shape_.new_active}).data<int32_t>(),
                          call_.output("xy", DType::kInt32, {shape_.new_active, 2}).data<int32_t>()};
    const simulator::Scan scan(call_, shape_.active);
    scan.sums(source);
    scan.run(source, sink);
  }

  void copy_rows() {
    const auto& new_active = call_.output("active", active_.dtype(), {shape_.new_active, features_});
    const auto& new_passive = call_.output("passive", active_.dtype(), {shape_.new_passive, features_});
    const int64_t row_bytes = features_ * static_cast<int64_t>(simulator::size_of(active_.dtype()));
    const auto run = [&](auto kernel, int64_t word_bytes) {
      const int64_t words = row_bytes / word_bytes;
      const int lanes_log2 = lanes_log2_of(words);
      simulator::launch_few_blocks(
          kernel, cell_blocks((shape_.active + shape_.passive) << lanes_log2), kCellThreads, shape_,
          static_cast<const uint8_t*>(active_.raw()), static_cast<const uint8_t*>(passive_.raw()), words,
          lanes_log2, static_cast<const int64_t*>(new_ids_), static_cast<uint8_t*>(new_active.raw()),
          static_cast<uint8_t*>(new_passive.raw()));
    };
    if (row_bytes % 16 == 0) return run(&refine_rows_kernel<16>, 16);
    if (row_bytes % 4 == 0) return run(&refine_rows_kernel<4>, 4);
    run(&refine_rows_kernel<2>, 2);
  }

  void write_map() {
    const CellGrid grid{map_.size(0), map_.size(1), map_.size(2)};
    const auto run = [&](auto kernel, auto* new_map) {
      const IdMap map{map_.raw(), map_.dtype() == DType::kInt64};
      simulator::launch_few_blocks(kernel, cell_blocks(grid.cells()), kCellThreads, shape_, grid, map,
                                   static_cast<const int64_t*>(new_ids_), new_map);
    };
    const bool doubles = shape_.children == 4;
    if (wide_) {
      run(doubles ? &refine_map_kernel<int64_t, true> : &refine_map_kernel<int64_t, false>,
          static_cast<int64_t*>(new_map_));
    } else {
      run(doubles ? &refine_map_kernel<int32_t, true> : &refine_map_kernel<int32_t, false>,
          static_cast<int32_t*>(new_map_));
    }
  }

 private:
  const RefineBound* find_bound(const ScoreView& scores) {
    RefineSelect select{scores, shape_.active, kept_, nullptr, nullptr};
    const int passes = select.passes();
    select.bounds =
        reinterpret_cast<RefineBound*>(call_.scratch("bounds", DType::kInt64, {passes + 1, 2}).raw());
    select.counts = static_cast<uint32_t*>(
        call_.scratch("counts", DType::kInt32, {passes, kDigits}, simulator::Fill::kZeros).raw());
    for (int pass = 0; pass <= passes; ++pass) {
      simulator::launch_few_blocks(&refine_select_kernel, pass < passes ? 2 : 1, kScanThreads, select, pass);
    }
    return select.bounds + passes;
  }

  simulator::Call& call_;
  const simulator::Tensor &active_, &passive_, &map_;
  int64_t features_, kept_ = 0;
  RefineShape shape_{};
  int64_t* new_ids_ = nullptr;
  bool wide_ = false;
  void* new_map_ = nullptr;
};

void sps_refine(simulator::Call& call) {
  Run run(call);
  run.choose_rows();
  run.copy_rows();
  run.write_map();
}

template <typename T>
void run_backward(simulator::Call& call) {
  const simulator::Tensor &rows = call.tensor("grad_active"), &passive_rows = call.tensor("grad_passive");
  const simulator::Tensor& new_ids = call.tensor("new_ids");
  const int64_t active = new_ids.size(0), passive = call.integer("passive"), features = rows.size(1);
  const RefineShape shape{active, passive, rows.size(0), passive_rows.size(0), call.flag("upsample") ? 4 : 1};
  T* grad_active = call.output("active", rows.dtype(), {active, features}).data<T>();
  T* grad_passive = call.output("passive", rows.dtype(), {passive, features}).data<T>();
  const auto run = [&](auto kernel, int64_t vector, T* of_active, T* of_passive) {
    const int lanes_log2 = lanes_log2_of(features / vector);
    simulator::launch_few_blocks(kernel, cell_blocks((active + passive) << lanes_log2), kCellThreads, shape,
                                 rows.data<const T>(), passive_rows.data<const T>(),
                                 new_ids.data<const int64_t>(), features, lanes_log2, of_active, of_passive);
  };
  if (features % kPackSize<T> == 0) {
    run(&refine_gradient_kernel<T, kPackSize<T>>, kPackSize<T>, grad_active, nullptr);
    run(&refine_gradient_kernel<T, kPackSize<T>>, kPackSize<T>, nullptr, grad_passive);
  } else {
    run(&refine_gradient_kernel<T, 1>, 1, grad_active, grad_passive);
  }
}

void sps_refine_backward(simulator::Call& call) {
  simulator::dispatch<float, double, bf16, f16>(
      call.tensor("grad_active").dtype(), [&]<typename T>(std::type_identity<T>) { run_backward<T>(call); });
}

}  // namespace

EFFOPS_SIMULATE("sps_refine", sps_refine)
EFFOPS_SIMULATE("sps_refine_backward", sps_refine_backward)
