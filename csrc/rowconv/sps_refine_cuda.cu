// sps_refine on CUDA: arguments, grids, launches.
#include "../common/dtype_switch.h"
#include "id_map_cuda.cuh"
#include "scan_cuda.cuh"
#include "sps_refine.h"
#include "sps_refine_kernels.cuh"

namespace effops::rowconv {
namespace {

RefineShape kernel_shape(const SpsRefineShape& shape) {
  return {shape.sps.active, shape.sps.passive, shape.new_active, shape.new_passive, shape.children};
}

// The rule that says which rows are kept. The tensors keep its memory.
struct KeptRows {
  KeptRowSource source;
  Tensor scores, bounds, counts;
};

KeptRows select_rows(const CudaScope& scope, const Tensor& scores, int64_t kept) {
  const int64_t active = scores.numel();
  KeptRows rows{{}, as_contiguous(scores), empty_of(scores, {0}), empty_of(scores, {0})};
  rows.source.scores = {rows.scores.const_data_ptr(), float_type_of(scores.scalar_type())};
  if (kept == 0 || kept == active) {
    rows.source.constant_bound = {kept == 0 ? UINT64_MAX : 0, 0};
    return rows;
  }
  RefineSelect select{rows.source.scores, active, kept, nullptr, nullptr};
  const int passes = select.passes();
  constexpr int64_t kBoundWords = sizeof(RefineBound) / sizeof(int64_t);
  rows.bounds = empty_of(scores, {(passes + 1) * kBoundWords}, ScalarType::Long);
  rows.counts = zeros_of(scores, {passes, kDigits}, ScalarType::Int);
  select.bounds = reinterpret_cast<RefineBound*>(rows.bounds.mutable_data_ptr<int64_t>());
  select.counts = reinterpret_cast<uint32_t*>(rows.counts.mutable_data_ptr<int32_t>());
  const int64_t blocks = std::min((active + kSelectScores - 1) / kSelectScores, kMaxScanBlocks);
  for (int pass = 0; pass <= passes; ++pass) {
    scope.launch(&refine_select_kernel, pass < passes ? blocks : 1, kScanThreads, 0, select, pass);
  }
  rows.source.bound = select.bounds + passes;
  return rows;
}

void copy_rows(const CudaScope& scope, const SpsRefineShape& shape, const Tensor& active,
               const Tensor& passive, const Tensor& new_ids, const Tensor& new_active,
               const Tensor& new_passive) {
  const int64_t row_bytes = shape.sps.features * static_cast<int64_t>(active.element_size());
  if (row_bytes == 0 || shape.sps.active + shape.sps.passive == 0) return;
  const Tensor active_rows = as_contiguous(active), passive_rows = as_contiguous(passive);
  const auto run = [&](auto kernel, int64_t word_bytes) {
    const int64_t words = row_bytes / word_bytes;
    const int lanes_log2 = lanes_log2_of(words);
    scope.launch(kernel, cell_blocks((shape.sps.active + shape.sps.passive) << lanes_log2), kCellThreads, 0,
                 kernel_shape(shape), static_cast<const uint8_t*>(active_rows.const_data_ptr()),
                 static_cast<const uint8_t*>(passive_rows.const_data_ptr()), words, lanes_log2,
                 new_ids.const_data_ptr<int64_t>(), static_cast<uint8_t*>(new_active.mutable_data_ptr()),
                 static_cast<uint8_t*>(new_passive.mutable_data_ptr()));
  };
  const auto fits = [&](int64_t bytes) {
    return row_bytes % bytes == 0 && is_aligned(active_rows, static_cast<uintptr_t>(bytes)) &&
           is_aligned(passive_rows, static_cast<uintptr_t>(bytes));
  };
  if (fits(16)) {
    run(&refine_rows_kernel<16>, 16);
  } else if (fits(4)) {
    run(&refine_rows_kernel<4>, 4);
  } else {
    run(&refine_rows_kernel<2>, 2);
  }
}

template <typename NewId>
void write_map(const CudaScope& scope, const SpsRefineShape& shape, const Tensor& index_map,
               const Tensor& new_ids, const Tensor& new_map) {
  const CellGrid grid{shape.sps.maps, shape.sps.height, shape.sps.width};
  if (grid.cells() == 0) return;
  const Tensor map = as_contiguous(index_map);
  const auto run = [&](auto kernel) {
    scope.launch(kernel, cell_blocks(grid.cells()), kCellThreads, 0, kernel_shape(shape), grid,
                 id_map_of(map), new_ids.const_data_ptr<int64_t>(),
                 static_cast<NewId*>(new_map.mutable_data_ptr()));
  };
  if (shape.children == 4) {
    run(&refine_map_kernel<NewId, true>);
  } else {
    run(&refine_map_kernel<NewId, false>);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sps_refine(const Tensor& active,     // [NA, F]
                                                                      const Tensor& passive,    // [NP, F]
                                                                      const Tensor& index_map,  // [R, H, W]
                                                                      const Tensor& roi,  // [NA]
                                                                      const Tensor& xy,  // [NA, 2]
                                                                      const Tensor& scores,  // [NA]
                                                                      int64_t num_refine, bool upsample) {
  const SpsRefineShape shape =
      check_sps_refine(active, passive, index_map, roi, xy, scores, num_refine, upsample);
  const int64_t rows = shape.sps.active, features = shape.sps.features, scale = upsample ? 2 : 1;
  if (rows > kMaxRefineRows) {
    fail("sps_refine: expected at most ", kMaxRefineRows, " active rows on CUDA, got ", rows);
  }
  const CudaScope scope(active);
  const Tensor new_active = empty_of(active, {shape.new_active, features}),
               new_passive = empty_of(active, {shape.new_passive, features});
  const Tensor new_map = empty_of(active, {shape.sps.maps, scale * shape.sps.height, scale * shape.sps.width},
                                  shape.wide_new_map ? ScalarType::Long : ScalarType::Int);
  const Tensor new_roi = empty_of(active, {shape.new_active}, ScalarType::Int),
               new_xy = empty_of(active, {shape.new_active, 2}, ScalarType::Int),
               new_ids = empty_of(active, {rows}, ScalarType::Long);
  if (rows > 0) {
    const KeptRows kept = select_rows(scope, scores, shape.kept);
    const Tensor old_roi = as_contiguous(roi), old_xy = as_contiguous(xy);
    const RefineSink sink{kept.source,
                          kernel_shape(shape),
                          old_roi.const_data_ptr<int32_t>(),
                          old_xy.const_data_ptr<int32_t>(),
                          new_ids.mutable_data_ptr<int64_t>(),
                          new_roi.mutable_data_ptr<int32_t>(),
                          new_xy.mutable_data_ptr<int32_t>()};
    scan(scope, active, kept.source, sink, rows);
  }
  copy_rows(scope, shape, active, passive, new_ids, new_active, new_passive);
  if (shape.wide_new_map) {
    write_map<int64_t>(scope, shape, index_map, new_ids, new_map);
  } else {
    write_map<int32_t>(scope, shape, index_map, new_ids, new_map);
  }
  return {new_active, new_passive, new_map, new_roi, new_xy, new_ids};
}

template <typename T>
void run_backward(const SpsRefineGradShape& shape, const Tensor& new_grad_active,
                  const Tensor& new_grad_passive, const Tensor& new_ids, T* grad_active, T* grad_passive) {
  const CudaScope scope(new_ids);
  const auto run = [&](auto kernel, int64_t vector) {
    const int lanes_log2 = lanes_log2_of(shape.features / vector);
    const RefineShape rows{shape.active, shape.passive, shape.new_active, shape.new_passive, shape.children};
    scope.launch(kernel, cell_blocks((shape.active + shape.passive) << lanes_log2), kCellThreads, 0, rows,
                 static_cast<const T*>(new_grad_active.const_data_ptr()),
                 static_cast<const T*>(new_grad_passive.const_data_ptr()), new_ids.const_data_ptr<int64_t>(),
                 shape.features, lanes_log2, grad_active, grad_passive);
  };
  if (shape.features % kPackSize<T> == 0 && is_aligned(new_grad_active, 16) &&
      is_aligned(new_grad_passive, 16)) {
    run(&refine_gradient_kernel<T, kPackSize<T>>, kPackSize<T>);
  } else {
    run(&refine_gradient_kernel<T, 1>, 1);
  }
}

std::tuple<Tensor, Tensor> sps_refine_backward(const Tensor& grad_active,  // [NA', F]
                                               const Tensor& grad_passive,  // [NP', F]
                                               const Tensor& new_ids,  // [NA]
                                               int64_t num_passive, bool upsample, bool need_active,
                                               bool need_passive) {
  const SpsRefineGradShape shape =
      check_sps_refine_grad(grad_active, grad_passive, new_ids, num_passive, upsample);
  const CudaScope scope(grad_active);
  const auto gradient_of = [&](bool needed, int64_t rows) {
    return needed ? empty_of(grad_active, {rows, shape.features}) : empty_of(grad_active, {0});
  };
  const Tensor active = gradient_of(need_active, shape.active),
               passive = gradient_of(need_passive, shape.passive);
  if (active.numel() + passive.numel() == 0) return {active, passive};
  const Tensor rows = as_contiguous(grad_active), passive_rows = as_contiguous(grad_passive);
  const Tensor ids = as_contiguous(new_ids);
  dispatch_floating("sps_refine_backward", "grad_active", grad_active.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto data = [](bool needed, const Tensor& gradient) {
      return needed ? static_cast<T*>(gradient.mutable_data_ptr()) : nullptr;
    };
    run_backward<T>(shape, rows, passive_rows, ids, data(need_active, active), data(need_passive, passive));
  });
  return {active, passive};
}

}  // namespace
}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("sps_refine", TORCH_BOX(&effops::rowconv::sps_refine));
  m.impl("sps_refine_backward", TORCH_BOX(&effops::rowconv::sps_refine_backward));
}
