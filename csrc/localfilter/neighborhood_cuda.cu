// neighborhood_dot and neighborhood_mix on CUDA: arguments, launches.
#include "neighborhood.h"

#include "../common/dtype_switch.h"
#include "neighborhood_cuda.cuh"
#include "neighborhood_kernels.cuh"

namespace effops::localfilter {
namespace {

// output[tap](p) = q(p) . k(p + offset of the tap).
void run_dot(const char* op, const CudaScope& scope, const NeighborhoodShape& shape, const Tensor& q,
             const Tensor& k, const Tensor& output) {
  if (output.numel() == 0) return;
  const Tensor q_maps = as_maps(q), k_maps = as_maps(k);
  dispatch_floating(op, "q", q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const DotArguments<T> arguments{tiling_of<T>(q, shape.window, shape.batch, false, kDotNeeds),
                                    device_maps<const T>(q_maps), device_maps<const T>(k_maps),
                                    device_maps<T>(output)};
    launch_tiles(scope, &neighborhood_dot_kernel<T>, arguments);
  });
}

// output(p) = sum over the taps of weights[tap](p) v(p + offset of the tap), or its transpose.
void run_mix(const char* op, const CudaScope& scope, const NeighborhoodShape& shape, const Tensor& weights,
             const Tensor& v, const Tensor& output, bool transposed) {
  if (output.numel() == 0) return;
  const Tensor weight_maps = as_maps(weights), v_maps = as_maps(v);
  dispatch_floating(op, "v", v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tiling tiling = tiling_of<T>(v, shape.window, shape.batch, transposed, kMixNeeds);
    const Sums<T> sums(tiling, output);
    const MixArguments<T> arguments{tiling, device_maps<const T>(weight_maps), device_maps<const T>(v_maps),
                                    sums.target(), transposed};
    launch_tiles(scope, &neighborhood_mix_kernel<T>, arguments);
  });
}

Tensor new_gradient(bool needed, const Tensor& input) {
  if (!needed) return empty_of(input, {0});
  return new_maps(input, {input.size(0), input.size(1), input.size(2), input.size(3)});
}

Tensor neighborhood_dot(const Tensor& q,  // [N, C, H, W]
                        const Tensor& k,  // [N, C, H, W]
                        int64_t window, int64_t dilation) {
  const NeighborhoodShape shape = check_neighborhood_dot(q, k, window, dilation);
  const CudaScope scope(q);
  const Window& w = shape.window;
  const Tensor output = new_maps(q, {shape.batch, w.taps(), w.height, w.width});
  run_dot("neighborhood_dot", scope, shape, q, k, output);
  return output;
}

std::tuple<Tensor, Tensor> neighborhood_dot_backward(const Tensor& grad_output,  // [N, K * K, H, W]
                                                     const Tensor& q,            // [N, C, H, W]
                                                     const Tensor& k,            // [N, C, H, W]
                                                     int64_t window, int64_t dilation, bool need_q,
                                                     bool need_k) {
  constexpr const char* op = "neighborhood_dot_backward";
  const NeighborhoodShape shape = check_neighborhood_dot_grad(grad_output, q, k, window, dilation);
  const CudaScope scope(q);
  const Tensor grad_q = new_gradient(need_q, q), grad_k = new_gradient(need_k, k);
  run_mix(op, scope, shape, grad_output, k, grad_q, false);
  run_mix(op, scope, shape, grad_output, q, grad_k, true);
  return {grad_q, grad_k};
}

Tensor neighborhood_mix(const Tensor& weights,  // [N, K * K, H, W]
                        const Tensor& v,        // [N, C, H, W]
                        int64_t dilation) {
  const NeighborhoodShape shape = check_neighborhood_mix(weights, v, dilation);
  const CudaScope scope(v);
  const Tensor output = new_maps(v, {shape.batch, shape.channels, shape.window.height, shape.window.width});
  run_mix("neighborhood_mix", scope, shape, weights, v, output, false);
  return output;
}

std::tuple<Tensor, Tensor> neighborhood_mix_backward(const Tensor& grad_output,  // [N, C, H, W]
                                                     const Tensor& weights,      // [N, K * K, H, W]
                                                     const Tensor& v,            // [N, C, H, W]
                                                     int64_t dilation, bool need_weights, bool need_v) {
  constexpr const char* op = "neighborhood_mix_backward";
  const NeighborhoodShape shape = check_neighborhood_mix_grad(grad_output, weights, v, dilation);
  const CudaScope scope(v);
  const Tensor grad_weights = new_gradient(need_weights, weights), grad_v = new_gradient(need_v, v);
  run_dot(op, scope, shape, grad_output, v, grad_weights);
  run_mix(op, scope, shape, weights, grad_output, grad_v, true);
  return {grad_weights, grad_v};
}

}  // namespace
}  // namespace effops::localfilter

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("neighborhood_dot", TORCH_BOX(&effops::localfilter::neighborhood_dot));
  m.impl("neighborhood_dot_backward", TORCH_BOX(&effops::localfilter::neighborhood_dot_backward));
  m.impl("neighborhood_mix", TORCH_BOX(&effops::localfilter::neighborhood_mix));
  m.impl("neighborhood_mix_backward", TORCH_BOX(&effops::localfilter::neighborhood_mix_backward));
}
