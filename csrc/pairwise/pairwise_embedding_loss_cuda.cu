// pairwise_embedding_loss on CUDA: arguments, launches.
#include "pairwise_embedding_loss.h"

#include "../common/cuda_launch.cuh"
#include "../common/dtype_switch.h"
#include "pairwise_embedding_loss_backward_kernels.cuh"

namespace effops::pairwise {
namespace {

// Contiguous.
struct Inputs {
  Tensor x, order, segments, weights;
  std::optional<Tensor> costs;  // of the backward op
};

// Calls run(TypeTag<Engine>{}) with the fastest engine for these points.
template <typename Run>
void with_engine(const Tensor& x, int64_t channels, const Run& run) {
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index()));
  if (x.scalar_type() == ScalarType::Double) {
    run(TypeTag<PlainPairs<double>>{});
  } else if (major >= 8 && channels <= kSplitMaxChannels) {
    run(TypeTag<SplitPairs>{});
  } else {
    run(TypeTag<PlainPairs<float>>{});
  }
}

template <typename A>
A* data_of(const Tensor& tensor) {
  return static_cast<A*>(tensor.mutable_data_ptr());
}

// The points in tiles, and the launches that they are made for.
template <typename Engine>
class TiledPoints {
 public:
  using A = typename Engine::A;

  TiledPoints(const CudaScope& scope, const LossShape& shape, const Inputs& inputs)
      : scope_(scope),
        like_(inputs.x),
        alpha_(static_cast<A>(shape.alpha)),
        points_(make_loss_points<Engine>(shape.batch, shape.points, shape.channels)),
        tiling_(make_loss_tiling(shape.batch, points_.tiles)) {
    const int64_t tiles = points_.all_tiles();
    points_.rows = scratch<void>(points_.row_bytes());
    points_.tags = scratch<TileTags<A>>(tiles * int64_t{sizeof(TileTags<A>)});
    points_.info = scratch<TileInfo>(tiles * int64_t{sizeof(TileInfo)});
    points_.places = scratch<int32_t>(tiles * kTilePoints * int64_t{sizeof(int32_t)});
    points_.sums = scratch<A>(tiles * shape.channels * int64_t{sizeof(A)});
    const auto read = [](const Tensor& tensor) { return static_cast<const A*>(tensor.const_data_ptr()); };
    const LossInputs<A> arguments{read(inputs.x), inputs.order.const_data_ptr<int64_t>(),
                                  inputs.segments.const_data_ptr<int64_t>(), read(inputs.weights),
                                  inputs.costs.has_value() ? read(*inputs.costs) : nullptr};
    scope.launch(&loss_points_kernel<A, Engine::kSplit>, tiles, kPointThreads, 0, arguments, points_);
  }

  void loss(int64_t normalize, const Tensor& loss, const Tensor& costs) {
    A* pair_costs = scratch<A>(partial_rows() * int64_t{sizeof(A)});
    run_pairs(&pair_costs_kernel<Engine>, pair_costs);
    scope_.launch(&point_costs_kernel<A, Engine::kSplit>, points_.all_tiles(), kPointThreads, 0, points_,
                  tiling_, pair_costs, data_of<A>(costs));
    scope_.launch(&embedding_loss_kernel<A>, 1, kPointThreads, 0, points_, normalize, data_of<A>(loss));
  }

  void gradients(const Tensor& x, const LossGradients<A>& gradients) {
    A* sums = nullptr;
    if (gradients.x != nullptr) {
      sums = scratch<A>(partial_rows() * points_.pitch * int64_t{sizeof(A)});
      run_pairs(&pair_gradient_kernel<Engine>, sums);
    }
    scope_.launch(&loss_gradient_kernel<A>, points_.all_tiles(), kPointThreads, 0, points_, tiling_,
                  static_cast<const A*>(x.const_data_ptr()), sums, gradients);
  }

 private:
  int64_t partial_rows() const { return tiling_.splits * points_.all_tiles() * kTilePoints; }

  template <typename Kernel>
  void run_pairs(Kernel kernel, A* result) const {
    scope_.launch(kernel, tiling_.works(), Engine::kThreads, Engine::shared_bytes(points_.pitch), points_,
                  tiling_, alpha_, result);
  }

  template <typename T>
  T* scratch(int64_t bytes) {
    memory_.push_back(empty_of(like_, {bytes}, ScalarType::Byte));
    return static_cast<T*>(memory_.back().mutable_data_ptr());
  }

  const CudaScope& scope_;
  Tensor like_;
  A alpha_;
  LossPoints<A> points_;
  LossTiling tiling_;
  std::vector<Tensor> memory_;
};

void check_size(const LossShape& shape) {
  if (shape.points <= INT32_MAX) return;
  fail("pairwise_embedding_loss: expected at most ", INT32_MAX, " points on CUDA, got ", shape.points);
}

std::tuple<Tensor, Tensor> pairwise_embedding_loss(const Tensor& x,         // [B, N, D]
                                                   const Tensor& order,     // [B, N]
                                                   const Tensor& segments,  // [B, N]
                                                   const Tensor& weights,   // [B, N]
                                                   double alpha, int64_t normalize) {
  const LossShape shape = check_pairwise_embedding_loss(x, order, segments, weights, alpha, normalize);
  check_size(shape);
  const CudaScope scope(x);
  const Tensor loss = zeros_of(x, {}), costs = zeros_of(x, {shape.batch, shape.points});
  if (costs.numel() == 0) return {loss, costs};
  const Inputs inputs{as_contiguous(x), as_contiguous(order), as_contiguous(segments), as_contiguous(weights),
                      std::nullopt};
  with_engine(x, shape.channels, [&](auto engine) {
    TiledPoints<typename decltype(engine)::type>(scope, shape, inputs).loss(shape.normalize, loss, costs);
  });
  return {loss, costs};
}

// All kernels are deterministic.
std::tuple<Tensor, Tensor> pairwise_embedding_loss_backward(const Tensor& grad_loss,  // []
                                                            const Tensor& x,          // [B, N, D]
                                                            const Tensor& order,      // [B, N]
                                                            const Tensor& segments,   // [B, N]
                                                            const Tensor& weights,    // [B, N]
                                                            const Tensor& costs,      // [B, N]
                                                            double alpha, int64_t normalize, bool need_x,
                                                            bool need_weights) {
  const LossShape shape =
      check_pairwise_embedding_loss_grad(grad_loss, x, order, segments, weights, costs, alpha, normalize);
  check_size(shape);
  const CudaScope scope(x);
  const Tensor grad_x = need_x ? zeros_of(x, {shape.batch, shape.points, shape.channels}) : empty_of(x, {0});
  const Tensor grad_weights = need_weights ? zeros_of(x, {shape.batch, shape.points}) : empty_of(x, {0});
  if (costs.numel() == 0 || !(need_x || need_weights)) return {grad_x, grad_weights};
  const Inputs inputs{as_contiguous(x), as_contiguous(order), as_contiguous(segments), as_contiguous(weights),
                      as_contiguous(costs)};
  with_engine(x, shape.channels, [&](auto tag) {
    using Engine = typename decltype(tag)::type;
    using A = typename Engine::A;
    const LossGradients<A> gradients{static_cast<const A*>(grad_loss.const_data_ptr()),
                                     static_cast<const A*>(inputs.costs->const_data_ptr()), shape.normalize,
                                     need_x ? data_of<A>(grad_x) : nullptr,
                                     need_weights ? data_of<A>(grad_weights) : nullptr};
    TiledPoints<Engine>(scope, shape, inputs).gradients(inputs.x, gradients);
  });
  return {grad_x, grad_weights};
}

}  // namespace
}  // namespace effops::pairwise

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("pairwise_embedding_loss", TORCH_BOX(&effops::pairwise::pairwise_embedding_loss));
  m.impl("pairwise_embedding_loss_backward", TORCH_BOX(&effops::pairwise::pairwise_embedding_loss_backward));
}
