// neighborhood_dot and neighborhood_mix on the CPU: filters that are not normalised, and their gradient; see
// filter_engine_cpu.h.
#include "neighborhood.h"

#include "../common/maps.h"
#include "filter_engine_cpu.h"

namespace effops::localfilter {
namespace {

FilterShape as_filters(const NeighborhoodShape& shape) {
  return {shape.batch, shape.channels, 1, shape.window, kNone, false};
}

Tensor empty_or_like(const Tensor& maps, bool wanted) {
  return wanted ? new_maps(maps, {maps.size(0), maps.size(1), maps.size(2), maps.size(3)})
                : empty_of(maps, {0});
}

// sum_k weights_k(p) v(p + o_k)
void mix(const FilterShape& shape, const Tensor& weights, const Tensor& v, const Tensor& output) {
  filter_forward({shape, v, weights, output, std::nullopt, empty_of(weights, {0})});
}

Tensor neighborhood_dot(const Tensor& q,  // [N, C, H, W]
                        const Tensor& k,  // [N, C, H, W]
                        int64_t window, int64_t dilation) {
  const NeighborhoodShape shape = check_neighborhood_dot(q, k, window, dilation);
  const Window& w = shape.window;
  const Tensor output = new_maps(q, {shape.batch, w.taps(), w.height, w.width});
  // The gradient of filters that are not normalised.
  filter_backward({as_filters(shape), q, {}, k, {}, {}, {}, {}, {}, output});
  return output;
}

std::tuple<Tensor, Tensor> neighborhood_dot_backward(const Tensor& grad_output,  // [N, K * K, H, W]
                                                     const Tensor& q,            // [N, C, H, W]
                                                     const Tensor& k,            // [N, C, H, W]
                                                     int64_t window, int64_t dilation, bool need_q,
                                                     bool need_k) {
  const FilterShape shape = as_filters(check_neighborhood_dot_grad(grad_output, q, k, window, dilation));
  const Tensor grad_q = empty_or_like(q, need_q), grad_k = empty_or_like(k, need_k);
  if (need_q) mix(shape, grad_output, k, grad_q);
  if (need_k) filter_backward({shape, q, {}, k, grad_output, {}, {}, {}, grad_k, {}});
  return {grad_q, grad_k};
}

Tensor neighborhood_mix(const Tensor& weights,  // [N, K * K, H, W]
                        const Tensor& v,        // [N, C, H, W]
                        int64_t dilation) {
  const NeighborhoodShape shape = check_neighborhood_mix(weights, v, dilation);
  const Tensor output = empty_or_like(v, true);
  mix(as_filters(shape), weights, v, output);
  return output;
}

std::tuple<Tensor, Tensor> neighborhood_mix_backward(const Tensor& grad_output,  // [N, C, H, W]
                                                     const Tensor& weights,      // [N, K * K, H, W]
                                                     const Tensor& v,            // [N, C, H, W]
                                                     int64_t dilation, bool need_weights, bool need_v) {
  const FilterShape shape = as_filters(check_neighborhood_mix_grad(grad_output, weights, v, dilation));
  const Tensor grad_weights = empty_or_like(weights, need_weights), grad_v = empty_or_like(v, need_v);
  FilterBackward call{shape, grad_output, {}, v, weights, {}, {}, {}, {}, {}};
  if (need_v) call.grad_image = grad_v;
  if (need_weights) call.grad_filters = grad_weights;
  filter_backward(call);
  return {grad_weights, grad_v};
}

}  // namespace
}  // namespace effops::localfilter

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("neighborhood_dot", TORCH_BOX(&effops::localfilter::neighborhood_dot));
  m.impl("neighborhood_dot_backward", TORCH_BOX(&effops::localfilter::neighborhood_dot_backward));
  m.impl("neighborhood_mix", TORCH_BOX(&effops::localfilter::neighborhood_mix));
  m.impl("neighborhood_mix_backward", TORCH_BOX(&effops::localfilter::neighborhood_mix_backward));
}
