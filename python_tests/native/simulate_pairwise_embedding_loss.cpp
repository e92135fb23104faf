// Runs the CUDA kernels of pairwise_embedding_loss in the simulator, with the launches of
// pairwise_embedding_loss_cuda.cu.
#include <algorithm>
#include <string>

#include "pairwise/pairwise_embedding_loss_backward_kernels.cuh"
#include "simulate.h"

namespace {

using namespace effops;
using namespace effops::pairwise;
using simulator::DType;

constexpr int64_t kMaxBlocks = 5;  // fewer than there is work, so that the kernels loop

// x [B, N, D], order, segments, weights [B, N], grad_loss [], alpha, normalize, splits (0: as the op
// chooses). Outputs loss, costs, grad_x, grad_weights.
template <typename Engine>
class Run {
 public:
  using A = typename Engine::A;

  explicit Run(simulator::Call& call)
      : call_(call),
        x_(call.tensor("x")),
        points_(make_loss_points<Engine>(x_.size(0), x_.size(1), x_.size(2))),
        tiling_(make_loss_tiling(points_.batch, points_.tiles)) {
    const int64_t splits = call.integer("splits");
    if (splits > 0) tiling_.splits = static_cast<int32_t>(splits);
    const int64_t tiles = points_.all_tiles();
    points_.rows = scratch("rows", DType::kUInt8, points_.row_bytes());
    points_.tags = static_cast<TileTags<A>*>(scratch("tags", DType::kUInt8, tiles * sizeof(TileTags<A>)));
    points_.info = static_cast<TileInfo*>(scratch("info", DType::kUInt8, tiles * sizeof(TileInfo)));
    points_.places = static_cast<int32_t*>(scratch("places", DType::kInt32, tiles * kTilePoints));
    points_.sums = static_cast<A*>(scratch("sums", kType, tiles * points_.channels));
  }

  void forward() {
    make_points(nullptr);
    auto* pair_costs = static_cast<A*>(scratch("pair_costs", kType, partial_rows()));
    run_pairs(&pair_costs_kernel<Engine>, pair_costs);
    costs_ = call_.output("costs", kType, {points_.batch, points_.points}, simulator::Fill::kZeros)
                 .template data<A>();
    auto* loss = call_.output("loss", kType, {}).template data<A>();
    launch(&point_costs_kernel<A, Engine::kSplit>, points_.all_tiles(), points_, tiling_, pair_costs, costs_);
    launch(&embedding_loss_kernel<A>, 1, points_, call_.integer("normalize"), loss);
  }

  // After forward().
  void backward() {
    make_points(costs_);
    auto* sums = static_cast<A*>(scratch("pair_sums", kType, partial_rows() * points_.pitch));
    run_pairs(&pair_gradient_kernel<Engine>, sums);
    const auto gradient = [&](const char* name, std::vector<int64_t> sizes) {
      return call_.output(name, kType, std::move(sizes), simulator::Fill::kZeros).template data<A>();
    };
    const LossGradients<A> gradients{data("grad_loss"), costs_, call_.integer("normalize"),
                                     gradient("grad_x", x_.sizes()),
                                     gradient("grad_weights", {points_.batch, points_.points})};
    launch(&loss_gradient_kernel<A>, points_.all_tiles(), points_, tiling_, data("x"), sums, gradients);
  }

 private:
  static constexpr DType kType = simulator::kDTypeOf<A>;

  int64_t partial_rows() const { return tiling_.splits * points_.all_tiles() * kTilePoints; }
  const A* data(const char* name) const { return call_.tensor(name).template data<const A>(); }

  void* scratch(const char* name, DType dtype, int64_t size) {
    return call_.scratch(name, dtype, {size}).raw();
  }

  void make_points(const A* costs) {
    const LossInputs<A> inputs{data("x"), call_.tensor("order").template data<const int64_t>(),
                               call_.tensor("segments").template data<const int64_t>(), data("weights"),
                               costs};
    launch(&loss_points_kernel<A, Engine::kSplit>, points_.all_tiles(), inputs, points_);
  }

  template <typename Kernel, typename... Arguments>
  void launch(Kernel kernel, int64_t works, const Arguments&... arguments) {
    simulator::launch(dim3(static_cast<unsigned>(std::min(works, kMaxBlocks))), dim3(kPointThreads), 0,
                      kernel, arguments...);
  }

  template <typename Kernel>
  void run_pairs(Kernel kernel, A* result) {
    simulator::launch(dim3(static_cast<unsigned>(std::min(tiling_.works(), kMaxBlocks))),
                      dim3(Engine::kThreads), static_cast<size_t>(Engine::shared_bytes(points_.pitch)),
                      kernel, points_, tiling_, static_cast<A>(call_.real("alpha")), result);
  }

  simulator::Call& call_;
  const simulator::Tensor& x_;
  LossPoints<A> points_;
  LossTiling tiling_;
  A* costs_ = nullptr;
};

template <typename Engine>
void run(simulator::Call& call) {
  Run<Engine> all(call);
  all.forward();
  all.backward();
}

// tensor_cores: where they can be used.
void pairwise_embedding_loss(simulator::Call& call) {
  if (call.tensor("x").dtype() == DType::kFloat64) {
    run<PlainPairs<double>>(call);
  } else if (call.flag("tensor_cores")) {
    run<SplitPairs>(call);
  } else {
    run<PlainPairs<float>>(call);
  }
}

}  // namespace

EFFOPS_SIMULATE("pairwise_embedding_loss", pairwise_embedding_loss)
