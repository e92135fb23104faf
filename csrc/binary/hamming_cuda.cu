// hamming_distance, hamming_knn and hamming_match on CUDA: arguments, grids, launches.
#include <numeric>
#include <type_traits>

#include "../common/cuda_launch.cuh"
#include "hamming.h"
#include "hamming_distance_kernels.cuh"
#include "hamming_match_kernels.cuh"
#include "hamming_nearest_kernels.cuh"
#include "hamming_select_kernels.cuh"

namespace effops::binary {
namespace {

// Checked inputs, laid out as the kernels read them.
struct Inputs {
  HammingShape shape;
  Tensor a, b;
  std::optional<Tensor> lengths_a, lengths_b, mask;

  Inputs(const HammingShape& shape_in, const Tensor& a_in, const Tensor& b_in)
      : shape(shape_in), a(as_contiguous(a_in)), b(as_contiguous(b_in)) {}

  int64_t rows() const { return shape.batch * shape.rows_a; }
  int64_t columns() const { return shape.batch * shape.rows_b; }
  bool has_pairs() const { return rows() > 0 && columns() > 0; }

  HammingArguments arguments() const {
    const auto set = [](const Tensor& rows, int64_t count, const std::optional<Tensor>& lengths) {
      return HammingSet{static_cast<const uint8_t*>(rows.const_data_ptr()), count,
                        lengths.has_value() ? lengths->const_data_ptr<int64_t>() : nullptr};
    };
    HammingArguments result{};
    result.a = set(a, shape.rows_a, lengths_a);
    result.b = set(b, shape.rows_b, lengths_b);
    result.bytes = static_cast<int32_t>(shape.bytes);
    result.alignment = alignment();
    if (mask.has_value()) {
      result.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
      result.mask_stride = mask->dim() == 2 ? 0 : mask->stride(0);
    }
    return result;
  }

 private:
  int32_t alignment() const {
    for (const int32_t bytes : {16, 4}) {
      if (shape.bytes % bytes == 0 && is_aligned(a, static_cast<uintptr_t>(bytes)) &&
          is_aligned(b, static_cast<uintptr_t>(bytes))) {
        return bytes;
      }
    }
    return 1;
  }
};

// As it is where each batch item is contiguous: a mask that the batch shares may have stride 0.
std::optional<Tensor> prepare_mask(const std::optional<Tensor>& mask) {
  if (!mask.has_value()) return mask;
  const bool is_packed = mask->dim() == 3 && mask->stride(2) == 1 && mask->stride(1) == mask->size(2);
  return is_packed ? *mask : as_contiguous(*mask);
}

std::optional<Tensor> prepare_lengths(const std::optional<Tensor>& lengths) {
  return lengths.has_value() ? std::optional<Tensor>(as_contiguous(*lengths)) : lengths;
}

int device_attribute(cudaDeviceAttr attribute, const Tensor& tensor) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, tensor.get_device_index()));
  return value;
}

int64_t multiprocessors(const Tensor& tensor) {
  return device_attribute(cudaDevAttrMultiProcessorCount, tensor);
}

// Calls run(counter) with the faster way of counting on the device of `tensor`; see kHasBitMma.
template <typename Run>
void with_counter(const Tensor& tensor, const Run& run) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, tensor);
  if (major == 8 || major == 9) {
    run(TensorCounter{});
  } else {
    run(ScalarCounter{});
  }
}

template <typename Counter>
HammingTiling make_tiling(const Inputs& inputs) {
  return make_hamming_tiling(inputs.shape.batch, inputs.shape.rows_a, inputs.shape.rows_b,
                             Counter::kBlocks * multiprocessors(inputs.a), kSplitColumns);
}

Tensor hamming_distance(const Tensor& a, const Tensor& b) {
  const Inputs inputs(check_hamming("hamming_distance", a, b), a, b);
  const CudaScope scope(a);
  const Tensor output = empty_of(a, inputs.shape.sizes(inputs.shape.rows_b), ScalarType::Int);
  if (!inputs.has_pairs()) return output;
  with_counter(inputs.a, [&](auto counter) {
    const auto tiling = make_tiling<decltype(counter)>(inputs);
    scope.launch(&hamming_distance_kernel<decltype(counter)>, tiling.works, kTileThreads, 0,
                 inputs.arguments(), tiling, output.mutable_data_ptr<int32_t>());
  });
  return output;
}

// ------------------------------------------------------------------------------------- two neighbours

// The nearest neighbours of both sets, one allocation.
struct Nearest {
  Tensor memory;
  NearestKeys keys;

  Nearest(const Inputs& inputs, const CudaScope& scope, bool second, bool columns)
      : memory(empty_of(inputs.a, {inputs.rows() * (second ? 2 : 1) + (columns ? inputs.columns() : 0)},
                        ScalarType::Long)) {
    torch::stable::fill_(memory, -1);  // kNoNeighbour
    auto* data = reinterpret_cast<NeighbourKey*>(memory.mutable_data_ptr<int64_t>());
    keys.best = data;
    keys.second = second ? data + inputs.rows() : nullptr;
    keys.columns = columns ? data + inputs.rows() * (second ? 2 : 1) : nullptr;
    if (inputs.has_pairs()) find(inputs, scope);
  }

 private:
  void find(const Inputs& inputs, const CudaScope& scope) const {
    with_counter(inputs.a, [&](auto counter) {
      using Counter = decltype(counter);
      const HammingTiling tiling = make_tiling<Counter>(inputs);
      const auto run = [&](auto kernel) {
        scope.launch(kernel, tiling.works, kTileThreads, 0, inputs.arguments(), tiling, keys);
      };
      const auto choose = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        if (keys.second != nullptr) {
          run(keys.columns != nullptr ? &hamming_nearest_kernel<Counter, true, true, kMasked>
                                      : &hamming_nearest_kernel<Counter, true, false, kMasked>);
        } else {
          run(keys.columns != nullptr ? &hamming_nearest_kernel<Counter, false, true, kMasked>
                                      : &hamming_nearest_kernel<Counter, false, false, kMasked>);
        }
      };
      if (inputs.mask.has_value()) {
        choose(std::true_type{});
      } else {
        choose(std::false_type{});
      }
    });
  }
};

int64_t row_blocks(int64_t rows) { return (rows + kRowThreads - 1) / kRowThreads; }

// -------------------------------------------------------------------------------------- k neighbours

void select_neighbours(const Inputs& inputs, const CudaScope& scope, int64_t k, const Tensor& distances,
                       const Tensor& indices) {
  constexpr int64_t kBlocksPerMultiprocessor = 2;
  const HammingArguments arguments = inputs.arguments();
  const SelectTiling tiling = make_select_tiling(inputs.shape.batch, inputs.shape.rows_a, inputs.shape.rows_b,
                                                 arguments.bytes,
                                                 kBlocksPerMultiprocessor * multiprocessors(inputs.a));
  const auto run = [&](auto kernel, uint32_t* counts) {
    scope.launch(kernel, tiling.works, static_cast<int>(tiling.threads()), select_shared_bytes(tiling),
                 arguments, tiling, k, counts, distances.mutable_data_ptr<int32_t>(),
                 indices.mutable_data_ptr<int64_t>());
  };
  if (tiling.splits == 1) {
    run(&hamming_select_kernel<true, true>, nullptr);
    return;
  }
  const Tensor memory = empty_of(inputs.a, {inputs.rows() * tiling.splits * tiling.bins}, ScalarType::Int);
  auto* counts = reinterpret_cast<uint32_t*>(memory.mutable_data_ptr<int32_t>());
  run(&hamming_select_kernel<true, false>, counts);
  run(&hamming_select_kernel<false, true>, counts);
}

std::tuple<Tensor, Tensor> hamming_knn(const Tensor& a,  // [B, Na, W] or [Na, W]
                                       const Tensor& b,  // [B, Nb, W] or [Nb, W]
                                       int64_t k, const std::optional<Tensor>& lengths_a,
                                       const std::optional<Tensor>& lengths_b,
                                       const std::optional<Tensor>& mask, bool mutual) {
  Inputs inputs(check_hamming_knn(a, b, k, lengths_a, lengths_b, mask), a, b);
  inputs.lengths_a = prepare_lengths(lengths_a);
  inputs.lengths_b = prepare_lengths(lengths_b);
  inputs.mask = prepare_mask(mask);
  const CudaScope scope(a);
  const Tensor distances = empty_of(a, inputs.shape.sizes(k), ScalarType::Int);
  const Tensor indices = empty_of(a, inputs.shape.sizes(k), ScalarType::Long);
  if (inputs.rows() == 0 || k == 0) return {distances, indices};
  const bool few = k <= 2;
  if (!few) select_neighbours(inputs, scope, k, distances, indices);
  if (!few && !mutual) return {distances, indices};
  const Nearest nearest(inputs, scope, k == 2, mutual);
  const auto finish = [&](auto kernel, int64_t blocks, auto count) {
    scope.launch(kernel, blocks, kRowThreads, 0, nearest.keys, inputs.rows(), inputs.shape.rows_a,
                 inputs.shape.rows_b, count, distances.mutable_data_ptr<int32_t>(),
                 indices.mutable_data_ptr<int64_t>());
  };
  if (few) {
    finish(&hamming_neighbours_kernel, row_blocks(inputs.rows()), static_cast<int>(k));
  } else {
    finish(&hamming_drop_one_sided_kernel, row_blocks(inputs.rows() * kWarpSize), k);
  }
  return {distances, indices};
}

// -------------------------------------------------------------------------------------------- matches

std::tuple<Tensor, Tensor> hamming_match(const Tensor& a,  // [Na, W]
                                         const Tensor& b,  // [Nb, W]
                                         std::optional<double> ratio, std::optional<int64_t> max_distance,
                                         bool mutual, const std::optional<Tensor>& mask) {
  Inputs inputs(check_hamming_match(a, b, ratio, max_distance, mask), a, b);
  inputs.mask = prepare_mask(mask);
  const CudaScope scope(a);
  int64_t found = 0;
  const auto make_outputs = [&] {
    return std::make_tuple(empty_of(a, {found, 2}, ScalarType::Long), empty_of(a, {found}, ScalarType::Int));
  };
  if (!inputs.has_pairs()) return make_outputs();
  const Nearest nearest(inputs, scope, ratio.has_value(), mutual);
  const MatchArguments arguments{nearest.keys, inputs.rows(), make_match_rule(ratio, max_distance)};
  const MatchTiling tiling = make_match_tiling(inputs.rows(), kMaxMatchBlocks);
  const Tensor counts = empty_of(a, {tiling.blocks}, ScalarType::Int);
  scope.launch(&hamming_count_matches_kernel, tiling.blocks, kRowThreads, 0, arguments, tiling,
               counts.mutable_data_ptr<int32_t>());
  // The only time that the host waits for the device.
  const Tensor on_host = torch::stable::to(counts, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const int32_t* block_counts = on_host.const_data_ptr<int32_t>();
  found = std::accumulate(block_counts, block_counts + tiling.blocks, int64_t{0});
  const auto outputs = make_outputs();
  if (found == 0) return outputs;
  scope.launch(&hamming_write_matches_kernel, tiling.blocks, kRowThreads, 0, arguments, tiling,
               counts.const_data_ptr<int32_t>(), std::get<0>(outputs).mutable_data_ptr<int64_t>(),
               std::get<1>(outputs).mutable_data_ptr<int32_t>());
  return outputs;
}

}  // namespace
}  // namespace effops::binary

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("hamming_distance", TORCH_BOX(&effops::binary::hamming_distance));
  m.impl("hamming_knn", TORCH_BOX(&effops::binary::hamming_knn));
  m.impl("hamming_match", TORCH_BOX(&effops::binary::hamming_match));
}
