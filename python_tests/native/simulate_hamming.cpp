// Runs the CUDA kernels of the Hamming ops in the simulator, with the launches of hamming_cuda.cu.
#include <algorithm>
#include <numeric>

#include "binary/hamming_distance_kernels.cuh"
#include "binary/hamming_match_kernels.cuh"
#include "binary/hamming_nearest_kernels.cuh"
#include "binary/hamming_select_kernels.cuh"
#include "simulate.h"

namespace {

using namespace effops;
using namespace effops::binary;
using simulator::DType;
using simulator::Fill;

constexpr int64_t kMaxBlocks = 5;  // fewer than there is work, so that the kernels loop

template <typename Kernel, typename... Arguments>
void launch_few_blocks(Kernel kernel, int64_t works, int64_t threads, int64_t shared_bytes,
                       const Arguments&... arguments) {
  simulator::launch(dim3(static_cast<unsigned>(std::min(works, kMaxBlocks))),
                    dim3(static_cast<unsigned>(threads)), static_cast<size_t>(shared_bytes), kernel,
                    arguments...);
}

// Sets a, b [B, rows, bytes], optionally lengths_a, lengths_b [B] and mask [B or 1, Na, Nb].
class Run {
 public:
  explicit Run(simulator::Call& call)
      : call_(call),
        batch_(call.tensor("a").size(0)),
        rows_a_(call.tensor("a").size(1)),
        rows_b_(call.tensor("b").size(1)),
        slots_(call.integer("slots")) {
    arguments_.a = set("a", rows_a_);
    arguments_.b = set("b", rows_b_);
    arguments_.bytes = static_cast<int32_t>(call.tensor("a").size(2));
    arguments_.alignment = static_cast<int32_t>(call.integer("alignment"));
    if (call.has("mask")) {
      arguments_.mask = static_cast<const uint8_t*>(call.tensor("mask").raw());
      arguments_.mask_stride = call.tensor("mask").size(0) == 1 ? 0 : rows_a_ * rows_b_;
    }
  }

  template <typename Counter>
  void distance(const std::string& name) {
    auto& output = call_.output(name, DType::kInt32, {batch_, rows_a_, rows_b_});
    const HammingTiling tiling = this->tiling();
    launch_few_blocks(&hamming_distance_kernel<Counter>, tiling.works, kTileThreads, 0, arguments_, tiling,
                      output.data<int32_t>());
  }

  // Outputs distances<k>, indices<k>, with the prefix.
  template <typename Counter>
  void neighbours(const std::string& prefix, bool mutual) {
    for (const int64_t k : {1, 2}) {
      const NearestKeys keys = nearest<Counter>(k == 2, mutual);
      const Outputs outputs = make_outputs(prefix, k);
      launch_few_blocks(&hamming_neighbours_kernel, row_steps(), kRowThreads, 0, keys, batch_ * rows_a_,
                        rows_a_, rows_b_, static_cast<int>(k), outputs.distances, outputs.indices);
    }
  }

  void select(const std::string& prefix, int64_t k, bool mutual) {
    const Outputs outputs = make_outputs(prefix, k);
    const SelectTiling tiling =
        make_select_tiling(batch_, rows_a_, rows_b_, arguments_.bytes, call_.integer("select_slots"));
    const auto run = [&](auto kernel, uint32_t* counts) {
      launch_few_blocks(kernel, tiling.works, tiling.threads(), select_shared_bytes(tiling), arguments_,
                        tiling, k, counts, outputs.distances, outputs.indices);
    };
    if (tiling.splits == 1) {
      run(&hamming_select_kernel<true, true>, nullptr);
    } else {
      const std::vector<int64_t> sizes{batch_, rows_a_, tiling.splits, tiling.bins};
      auto* counts = static_cast<uint32_t*>(call_.scratch("counts", DType::kInt32, sizes).raw());
      run(&hamming_select_kernel<true, false>, counts);
      run(&hamming_select_kernel<false, true>, counts);
    }
    if (!mutual) return;
    launch_few_blocks(&hamming_drop_one_sided_kernel, row_steps(), kRowThreads, 0,
                      nearest<TensorCounter>(false, true), batch_ * rows_a_, rows_a_, rows_b_, k,
                      outputs.distances, outputs.indices);
  }

  void match() {
    const bool has_ratio = call_.has("ratio");
    const NearestKeys keys = nearest<TensorCounter>(has_ratio, call_.flag("mutual"));
    const int64_t limit = call_.has("max_distance") ? call_.integer("max_distance") : kNoDistance;
    const MatchArguments arguments{keys, rows_a_, {has_ratio, has_ratio ? call_.real("ratio") : 0, limit}};
    const MatchTiling tiling = make_match_tiling(rows_a_, call_.integer("max_blocks"));
    int32_t* counts = call_.scratch("counts", DType::kInt32, {tiling.blocks}).data<int32_t>();
    const dim3 blocks(static_cast<unsigned>(tiling.blocks)), threads(kRowThreads);
    simulator::launch(blocks, threads, 0, &hamming_count_matches_kernel, arguments, tiling, counts);
    const int64_t found = std::accumulate(counts, counts + tiling.blocks, int64_t{0});
    auto& matches = call_.output("matches", DType::kInt64, {found, 2});
    auto& distances = call_.output("distances", DType::kInt32, {found});
    simulator::launch(blocks, threads, 0, &hamming_write_matches_kernel, arguments, tiling, counts,
                      matches.data<int64_t>(), distances.data<int32_t>());
  }

 private:
  struct Outputs {
    int32_t* distances;
    int64_t* indices;
  };

  HammingSet set(const std::string& name, int64_t rows) {
    const std::string lengths = "lengths_" + name;
    return {static_cast<const uint8_t*>(call_.tensor(name).raw()), rows,
            call_.has(lengths) ? call_.tensor(lengths).data<const int64_t>() : nullptr};
  }
  HammingTiling tiling() const {
    return make_hamming_tiling(batch_, rows_a_, rows_b_, slots_, kSplitColumns);
  }
  int64_t row_steps() const { return std::max<int64_t>(1, batch_ * rows_a_ / kRowThreads); }

  Outputs make_outputs(const std::string& prefix, int64_t k) {
    const std::string suffix = std::to_string(k);
    const std::vector<int64_t> sizes{batch_, rows_a_, k};
    return {call_.output(prefix + "distances" + suffix, DType::kInt32, sizes).data<int32_t>(),
            call_.output(prefix + "indices" + suffix, DType::kInt64, sizes).data<int64_t>()};
  }

  NeighbourKey* make_keys(int64_t rows) {
    int64_t* keys = call_.scratch("keys", DType::kInt64, {batch_, rows}, Fill::kZeros).data<int64_t>();
    std::fill_n(keys, batch_ * rows, -1);
    return reinterpret_cast<NeighbourKey*>(keys);
  }

  template <typename Counter>
  NearestKeys nearest(bool second, bool columns) {
    const NearestKeys keys{make_keys(rows_a_), second ? make_keys(rows_a_) : nullptr,
                           columns ? make_keys(rows_b_) : nullptr};
    const HammingTiling tiling = this->tiling();
    const auto run = [&](auto kernel) {
      if (tiling.works > 0) {
        launch_few_blocks(kernel, tiling.works, kTileThreads, 0, arguments_, tiling, keys);
      }
    };
    const auto choose = [&]<bool kMasked>(std::bool_constant<kMasked>) {
      if (second) {
        run(columns ? &hamming_nearest_kernel<Counter, true, true, kMasked>
                    : &hamming_nearest_kernel<Counter, true, false, kMasked>);
      } else {
        run(columns ? &hamming_nearest_kernel<Counter, false, true, kMasked>
                    : &hamming_nearest_kernel<Counter, false, false, kMasked>);
      }
    };
    arguments_.mask != nullptr ? choose(std::true_type{}) : choose(std::false_type{});
    return keys;
  }

  simulator::Call& call_;
  int64_t batch_, rows_a_, rows_b_, slots_;
  HammingArguments arguments_{};
};

void hamming_distance(simulator::Call& call) {
  Run run(call);
  run.distance<ScalarCounter>("scalar");
  run.distance<TensorCounter>("tensor");
}

void hamming_nearest(simulator::Call& call) {
  Run run(call);
  run.neighbours<ScalarCounter>("scalar_", call.flag("mutual"));
  run.neighbours<TensorCounter>("tensor_", call.flag("mutual"));
}

void hamming_select(simulator::Call& call) {
  Run run(call);
  for (const int64_t k : call.integers("k")) run.select("", k, call.flag("mutual"));
}

void hamming_match(simulator::Call& call) { Run(call).match(); }

}  // namespace

EFFOPS_SIMULATE("hamming_distance", hamming_distance)
EFFOPS_SIMULATE("hamming_nearest", hamming_nearest)
EFFOPS_SIMULATE("hamming_select", hamming_select)
EFFOPS_SIMULATE("hamming_match", hamming_match)
