// sps_from_dense and sps_to_dense on CUDA: arguments, grids, launches.
#include "../common/dtype_switch.h"
#include "cell_buckets_cuda.cuh"
#include "id_map_cuda.cuh"
#include "scan_cuda.cuh"
#include "sps_dense.h"
#include "sps_dense_kernels.cuh"

namespace effops::rowconv {
namespace {

DenseLayout layout_of(const Tensor& dense) {  // [R, F, H, W]
  return {{dense.size(0), dense.size(2), dense.size(3)},
          dense.size(1),
          dense.stride(0),
          dense.stride(1),
          dense.stride(2),
          dense.stride(3)};
}

// What a move is of: the cells with the ids in `map`, or the cells of the active rows.
struct Ids {
  Tensor map, roi, xy;  // contiguous; the others are empty
  bool of_rows;
};

template <typename Word, bool kToRows>
void move_words(const CudaScope& scope, const Tensor& dense, const Tensor& active, const Tensor& passive,
                const Ids& ids) {
  const auto words = [](const Tensor& tensor) {
    return static_cast<Word*>(const_cast<void*>(tensor.const_data_ptr()));
  };
  MoveArguments<Word> arguments{layout_of(dense), words(dense), words(active), words(passive), active.size(0),
                                passive.size(0),  {},           nullptr,       nullptr};
  if (ids.of_rows) {
    arguments.roi = ids.roi.const_data_ptr<int32_t>();
    arguments.xy = ids.xy.const_data_ptr<int32_t>();
  } else {
    arguments.map = id_map_of(ids.map);
  }
  if (arguments.works() == 0) return;
  scope.launch(&sps_move_kernel<Word, kToRows>, arguments.works(), kMoveThreads, 0, arguments);
}

// Copies between maps of any strides and contiguous rows.
template <bool kToRows>
void move(const CudaScope& scope, const Tensor& dense, const Tensor& active, const Tensor& passive,
          const Ids& ids) {
  switch (dense.element_size()) {
    case 2: return move_words<uint16_t, kToRows>(scope, dense, active, passive, ids);
    case 4: return move_words<uint32_t, kToRows>(scope, dense, active, passive, ids);
    default: return move_words<uint64_t, kToRows>(scope, dense, active, passive, ids);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sps_from_dense(const Tensor& x,       // [R, F, H, W]
                                                                  const Tensor& mask) {  // [R, H, W]
  const DenseShape shape = check_sps_from_dense(x, mask);
  const CudaScope scope(x);
  const int64_t cells = shape.cells();
  const Tensor input = as_contiguous(mask);
  const ActiveSource source{static_cast<const uint8_t*>(input.const_data_ptr())};
  const Tensor sums = scan_sums(scope, x, source, cells);
  const int64_t num_active = total_on_host(sums);  // the only time that the host waits for the device
  const Tensor active = empty_of(x, {num_active, shape.features}),
               passive = empty_of(x, {cells - num_active, shape.features});
  const Tensor index_map = empty_of(x, {shape.maps, shape.height, shape.width},
                                    shape.wide_map() ? ScalarType::Long : ScalarType::Int);
  const Tensor roi = empty_of(x, {num_active}, ScalarType::Int),
               xy = empty_of(x, {num_active, 2}, ScalarType::Int);
  const FromDenseSink sink{{shape.maps, shape.height, shape.width},
                           num_active,
                           index_map.mutable_data_ptr(),
                           shape.wide_map(),
                           roi.mutable_data_ptr<int32_t>(),
                           xy.mutable_data_ptr<int32_t>()};
  scan_with_sums(scope, sums, source, sink, cells);
  move</*kToRows=*/true>(scope, x, active, passive, {index_map, roi, xy, /*of_rows=*/false});
  return {active, passive, index_map, roi, xy};
}

// Maps [R, F, H, W] of the rows of their ids.
Tensor dense_of(const Tensor& active, const Tensor& passive, const Tensor& index_map, const SpsShape& shape) {
  const CudaScope scope(active);
  const Tensor dense = empty_of(active, {shape.maps, shape.features, shape.height, shape.width});
  const Tensor map = as_contiguous(index_map);
  move</*kToRows=*/false>(scope, dense, as_contiguous(active), as_contiguous(passive),
                          {map, map, map, /*of_rows=*/false});
  return dense;
}

Tensor sps_from_dense_backward(const Tensor& grad_active,   // [NA, F]
                               const Tensor& grad_passive,  // [NP, F]
                               const Tensor& index_map) {   // [R, H, W]
  return dense_of(grad_active, grad_passive, index_map,
                  check_sps_from_dense_grad(grad_active, grad_passive, index_map));
}

Tensor sps_to_dense(const Tensor& active,     // [NA, F]
                    const Tensor& passive,    // [NP, F]
                    const Tensor& index_map,  // [R, H, W]
                    const Tensor& roi,        // [NA]
                    const Tensor& xy) {       // [NA, 2]
  return dense_of(active, passive, index_map, check_sps_to_dense(active, passive, index_map, roi, xy));
}

void sum_passive(const CudaScope& scope, const Tensor& grad_output, const Tensor& index_map,
                 const SpsShape& shape, const Tensor& grad_passive) {
  if (grad_passive.numel() == 0) return;
  const CellBuckets buckets = bucket_cells(scope, as_contiguous(index_map), shape.active, shape.passive);
  const PassiveCells cells{buckets.offsets.const_data_ptr<int64_t>(), buckets.cells.const_data_ptr<int64_t>(),
                           shape.passive};
  const int64_t works = (shape.passive + kScanWarps - 1) / kScanWarps *
                        ((shape.features + kWarpSize - 1) / kWarpSize);
  dispatch_floating("sps_to_dense_backward", "active", grad_output.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    scope.launch(&sps_passive_gradient_kernel<T>, works, kScanThreads, 0, layout_of(grad_output), cells,
                 static_cast<const T*>(grad_output.const_data_ptr()),
                 static_cast<T*>(grad_passive.mutable_data_ptr()));
  });
}

std::tuple<Tensor, Tensor> sps_to_dense_backward(const Tensor& grad_output,  // [R, F, H, W]
                                                 const Tensor& active,       // [NA, F]
                                                 const Tensor& passive,      // [NP, F]
                                                 const Tensor& index_map,    // [R, H, W]
                                                 const Tensor& roi,          // [NA]
                                                 const Tensor& xy,           // [NA, 2]
                                                 bool need_active, bool need_passive,
                                                 bool /*deterministic: always*/) {
  const SpsShape shape = check_sps_to_dense(active, passive, index_map, roi, xy);
  check_sps_to_dense_grad(grad_output, active, shape);
  const CudaScope scope(active);
  Tensor grad_active = empty_of(active, {0}), grad_passive = empty_of(active, {0});
  if (need_active) {
    grad_active = empty_of(active, {shape.active, shape.features});
    move</*kToRows=*/true>(scope, grad_output, grad_active, empty_of(active, {0, shape.features}),
                           {index_map, as_contiguous(roi), as_contiguous(xy), /*of_rows=*/true});
  }
  if (need_passive) {
    grad_passive = empty_of(active, {shape.passive, shape.features});
    sum_passive(scope, grad_output, index_map, shape, grad_passive);
  }
  return {grad_active, grad_passive};
}

}  // namespace
}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("sps_from_dense", TORCH_BOX(&effops::rowconv::sps_from_dense));
  m.impl("sps_from_dense_backward", TORCH_BOX(&effops::rowconv::sps_from_dense_backward));
  m.impl("sps_to_dense", TORCH_BOX(&effops::rowconv::sps_to_dense));
  m.impl("sps_to_dense_backward", TORCH_BOX(&effops::rowconv::sps_to_dense_backward));
}
