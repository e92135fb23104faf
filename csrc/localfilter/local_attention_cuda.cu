// local_attention on CUDA: arguments, launches.
#include "local_attention.h"

#include "../common/dtype_switch.h"
#include "local_attention_backward_kernels.cuh"
#include "local_attention_kernels.cuh"
#include "neighborhood_cuda.cuh"

namespace effops::localfilter {
namespace {

template <typename T>
void run_forward(const CudaScope& scope, const AttentionShape& shape, const Tensor& q, const Tensor& k,
                 const Tensor& v, const Tensor& output, const Tensor& log_sum_exp) {
  using A = accumulator_t<T>;
  const Tiling tiling = tiling_of<T>(q, shape.window, shape.batch, false, kAttentionNeeds);
  const Sums<T> sums(tiling, output);
  const AttentionArguments<T> arguments{tiling,
                                        device_maps<const T>(q),
                                        device_maps<const T>(k),
                                        device_maps<const T>(v),
                                        sums.target(),
                                        static_cast<A*>(log_sum_exp.mutable_data_ptr()),
                                        static_cast<A>(shape.scale)};
  launch_tiles(scope, &local_attention_kernel<T>, arguments);
}

std::tuple<Tensor, Tensor> local_attention(const Tensor& q,  // [N, C, H, W]
                                           const Tensor& k,  // [N, C, H, W]
                                           const Tensor& v,  // [N, Cv, H, W]
                                           int64_t window, int64_t dilation, double scale, int64_t border) {
  const AttentionShape shape = check_local_attention(q, k, v, window, dilation, scale, border);
  const CudaScope scope(q);
  const int64_t height = shape.window.height, width = shape.window.width;
  const Tensor output = new_maps(q, {shape.batch, shape.value_channels, height, width});
  const Tensor log_sum_exp = empty_of(q, {shape.batch, height, width}, accumulator_dtype(q));
  if (log_sum_exp.numel() == 0) return {output, log_sum_exp};
  const Tensor q_maps = as_maps(q), k_maps = as_maps(k), v_maps = as_maps(v);
  dispatch_floating("local_attention", "q", q.scalar_type(), [&](auto tag) {
    run_forward<typename decltype(tag)::type>(scope, shape, q_maps, k_maps, v_maps, output, log_sum_exp);
  });
  return {output, log_sum_exp};
}

// ------------------------------------------------------------------------------------------ backward

struct Gradients {
  bool need_q, need_k, need_v;
  Tensor q, k, v;
};

// Inputs of the backward op, as the kernels read them.
struct Saved {
  Tensor grad_output, q, k, v, output, log_sum_exp;
};

template <typename T>
void run_backward(const CudaScope& scope, const AttentionShape& shape, const Saved& saved,
                  const Gradients& gradients) {
  using A = accumulator_t<T>;
  const int64_t pixels = shape.window.height * shape.window.width;
  AttentionGradArguments<T> arguments{};
  arguments.q = device_maps<const T>(saved.q);
  arguments.k = device_maps<const T>(saved.k);
  arguments.v = device_maps<const T>(saved.v);
  arguments.grad_output = device_maps<const T>(saved.grad_output);
  arguments.log_sum_exp = static_cast<const A*>(saved.log_sum_exp.const_data_ptr());
  arguments.scale = static_cast<A>(shape.scale);
  const Tensor delta = empty_of(saved.q, {shape.batch, pixels}, accumulator_dtype(saved.q));
  if (gradients.need_q || gradients.need_k) {
    scope.launch(&attention_delta_kernel<T>, (shape.batch * pixels + kDeltaThreads - 1) / kDeltaThreads,
                 kDeltaThreads, 0, arguments.grad_output, device_maps<const T>(saved.output), shape.batch,
                 pixels, static_cast<A*>(delta.mutable_data_ptr()));
  }
  arguments.delta = static_cast<const A*>(delta.const_data_ptr());
  if (gradients.need_q) {
    arguments.tiling = tiling_of<T>(saved.q, shape.window, shape.batch, false, kQueryGradNeeds);
    const Sums<T> sums(arguments.tiling, gradients.q);
    arguments.grad_q = sums.target();
    launch_tiles(scope, &attention_query_grad_kernel<T>, arguments);
  }
  arguments.need_k = gradients.need_k;
  arguments.need_v = gradients.need_v;
  if (gradients.need_k || gradients.need_v) {
    arguments.tiling = tiling_of<T>(saved.q, shape.window, shape.batch, true, kKeyGradNeeds);
    const auto no_sums = std::optional<Sums<T>>();
    const auto k_sums = gradients.need_k ? Sums<T>(arguments.tiling, gradients.k) : no_sums;
    const auto v_sums = gradients.need_v ? Sums<T>(arguments.tiling, gradients.v) : no_sums;
    if (k_sums) arguments.grad_k = k_sums->target();
    if (v_sums) arguments.grad_v = v_sums->target();
    launch_tiles(scope, &attention_key_grad_kernel<T>, arguments);
  }
}

// All kernels are deterministic.
std::tuple<Tensor, Tensor, Tensor> local_attention_backward(const Tensor& grad_output,  // [N, Cv, H, W]
                                                            const Tensor& q,            // [N, C, H, W]
                                                            const Tensor& k,            // [N, C, H, W]
                                                            const Tensor& v,            // [N, Cv, H, W]
                                                            const Tensor& output,       // [N, Cv, H, W]
                                                            const Tensor& log_sum_exp,  // [N, H, W]
                                                            int64_t window, int64_t dilation, double scale,
                                                            int64_t border, bool need_q, bool need_k,
                                                            bool need_v) {
  const AttentionShape shape =
      check_local_attention_grad(grad_output, q, k, v, output, log_sum_exp, window, dilation, scale, border);
  const CudaScope scope(q);
  const auto make = [](bool needed, const Tensor& input) {
    return needed ? new_maps(input, {input.size(0), input.size(1), input.size(2), input.size(3)})
                  : empty_of(input, {0});
  };
  const Gradients gradients{need_q, need_k, need_v, make(need_q, q), make(need_k, k), make(need_v, v)};
  if (log_sum_exp.numel() > 0) {
    const Saved saved{as_maps(grad_output), as_maps(q),      as_maps(k),
                      as_maps(v),           as_maps(output), as_contiguous(log_sum_exp)};
    dispatch_floating("local_attention_backward", "q", q.scalar_type(), [&](auto tag) {
      run_backward<typename decltype(tag)::type>(scope, shape, saved, gradients);
    });
  }
  return {gradients.q, gradients.k, gradients.v};
}

}  // namespace
}  // namespace effops::localfilter

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("local_attention", TORCH_BOX(&effops::localfilter::local_attention));
  m.impl("local_attention_backward", TORCH_BOX(&effops::localfilter::local_attention_backward));
}
