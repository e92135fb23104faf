// Runs the CUDA kernels of ms_deform_attn in the simulator, with the launches of ms_deform_attn_cuda.cu.
#include <algorithm>

#include "sampling/ms_deform_attn_backward_kernels.cuh"
#include "sampling/ms_deform_attn_deterministic_kernels.cuh"
#include "sampling/ms_deform_attn_forward_kernels.cuh"
#include "simulate.h"

namespace {

using namespace effops;
using namespace effops::sampling;

constexpr int64_t kMaxBlocks = 3;  // small, so that kernels loop over the rest of the work

template <typename T>
class Run {
 public:
  explicit Run(simulator::Call& call)
      : call_(call),
        value_(call.tensor("value")),
        weights_(call.tensor("weights")),
        shape_{value_.size(0),   value_.size(1),   value_.size(2),  value_.size(3),
               weights_.size(1), weights_.size(3), weights_.size(4)} {
    const simulator::Tensor& locations = call.tensor("locations");
    points_.locations = locations.raw();
    points_.weights = weights_.raw();
    points_.locations_as_value = locations.dtype() == value_.dtype();
    points_.weights_as_value = weights_.dtype() == value_.dtype();
    points_.points = static_cast<int32_t>(shape_.points);
    points_.total_points = static_cast<int32_t>(shape_.levels * shape_.points);
    set_levels();
  }

  void run() {
    // The same choice as in ms_deform_attn_cuda.cu, made by the test.
    constexpr int kVector = kPackSize<T>;
    if (call_.flag("forward")) call_.flag("vectors") ? forward<kVector>() : forward<1>();
    if (call_.flag("backward")) call_.flag("vectors") ? backward<kVector>() : backward<1>();
    if (call_.flag("deterministic")) value_gradient();
  }

 private:
  void set_levels() {
    Pyramid& pyramid = points_.pyramid;
    pyramid.levels = shape_.levels;
    pyramid.rows = shape_.rows;
    const int64_t* sizes = call_.tensor("spatial_shapes").data<int64_t>();
    const int64_t* starts = call_.has("level_starts") ? call_.tensor("level_starts").data<int64_t>()
                                                      : nullptr;
    if (call_.flag("sizes_on_device")) {
      pyramid.shapes = sizes;
      pyramid.starts = starts;
    } else {
      for (int64_t l = 0, next = 0; l < shape_.levels; next += sizes[2 * l] * sizes[2 * l + 1], ++l) {
        pyramid.shape_values[l][0] = sizes[2 * l];
        pyramid.shape_values[l][1] = sizes[2 * l + 1];
        pyramid.start_values[l] = starts ? starts[l] : next;
      }
    }
    if (call_.flag("table")) {
      static_assert(sizeof(Level) == 2 * sizeof(int64_t));
      auto* table =
          static_cast<Level*>(call_.scratch("table", simulator::DType::kInt64, {shape_.levels * 2}).raw());
      const auto blocks = static_cast<unsigned>((shape_.levels + 31) / 32);
      simulator::launch(dim3(blocks), dim3(32), 0, &level_table_kernel<>, pyramid, table);
      pyramid.table = table;
    }
  }

  template <typename Kernel, typename Arguments>
  void launch(Kernel kernel, int64_t blocks, int threads, int64_t shared_bytes, const Arguments& arguments) {
    const int64_t level_bytes = points_.pyramid.table ? 0
                                                      : shape_.levels * static_cast<int64_t>(sizeof(Level));
    simulator::launch(dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                      static_cast<size_t>(shared_bytes + level_bytes), kernel, arguments);
  }

  template <int kVector>
  int64_t grid(const Tiling& tiling) const {
    return kVector == 1 ? std::min(tiling.works, kMaxBlocks) : tiling.works;
  }

  template <int kVector>
  void forward() {
    const Tiling tiling = make_tiling<T>(shape_, kVector, 1);
    const simulator::Tensor& output = call_.output(
        "output", value_.dtype(), {shape_.batch, shape_.queries, shape_.heads * shape_.channels});
    const ForwardArguments<T> arguments{points_, tiling, value_.data<const T>(), output.data<T>()};
    launch(&ms_deform_attn_forward_kernel<T, kVector>, grid<kVector>(tiling), kThreads, 0, arguments);
  }

  template <int kVector>
  void backward() {
    using A = accumulator_t<T>;
    const Tiling tiling = make_tiling<T>(shape_, kVector, 2);
    BackwardArguments<T> arguments{
        points_, tiling, value_.data<const T>(), call_.tensor("grad_output").data<const T>(), nullptr,
        nullptr, nullptr};
    const bool need_value = call_.flag("need_value"), need_points = call_.flag("need_points");
    if (need_value) {
      arguments.grad_value =
          call_.output("grad_value", simulator::kDTypeOf<A>, value_.sizes(), simulator::Fill::kZeros)
              .template data<A>();
    }
    if (need_points) {
      const simulator::Tensor& locations = call_.tensor("locations");
      arguments.grad_locations = call_.output("grad_locations", locations.dtype(), locations.sizes()).raw();
      arguments.grad_weights = call_.output("grad_weights", weights_.dtype(), weights_.sizes()).raw();
    }
    const auto kernel = need_value && need_points ? &ms_deform_attn_backward_kernel<T, kVector, true, true>
                        : need_value              ? &ms_deform_attn_backward_kernel<T, kVector, true, false>
                                                  : &ms_deform_attn_backward_kernel<T, kVector, false, true>;
    launch(kernel, grid<kVector>(tiling), kThreads, 0, arguments);
  }

  void value_gradient() {
    const simulator::Tensor& grad_value =
        call_.output("deterministic_grad_value", value_.dtype(), value_.sizes());
    const auto arguments = make_owner_arguments(shape_, points_, call_.tensor("grad_output").data<const T>(),
                                                grad_value.data<T>());
    launch(&ms_deform_attn_value_gradient_kernel<T>, std::min(arguments.works, kMaxBlocks), kOwnerThreads,
           kTileBytes, arguments);
  }

  simulator::Call& call_;
  const simulator::Tensor& value_;
  const simulator::Tensor& weights_;
  MsDeformAttnShape shape_;
  PointArguments<T> points_{};
};

void ms_deform_attn(simulator::Call& call) {
  simulator::dispatch<float, double, bf16, f16>(
      call.tensor("value").dtype(), [&]<typename T>(std::type_identity<T>) { Run<T>(call).run(); });
}

}  // namespace

EFFOPS_SIMULATE("ms_deform_attn", ms_deform_attn)
