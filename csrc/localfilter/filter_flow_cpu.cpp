// filter_flow and expected_flow on the CPU: checks and new tensors; see filter_engine_cpu.h.
#include "../common/maps.h"
#include "filter_engine_cpu.h"

namespace effops::localfilter {
namespace {

Tensor new_flow(const FilterShape& shape, const Tensor& maps, const Tensor& filters) {
  if (!shape.flow) return empty_of(filters, {0}, accumulator_dtype(filters));
  const Window& w = shape.window;
  return new_maps(maps, {shape.batch, 2 * shape.groups, w.out_height, w.out_width},
                  accumulator_dtype(filters));
}

std::tuple<Tensor, Tensor, Tensor> filter_flow(const Tensor& image,    // [N, C, H, W]
                                               const Tensor& filters,  // [N, G * K * K, Ho, Wo]
                                               int64_t normalize, int64_t padding_mode, int64_t stride,
                                               int64_t upsample, int64_t dilation, int64_t groups,
                                               bool return_flow) {
  const FilterShape shape = check_filter_flow(image, filters, normalize, padding_mode, stride, upsample,
                                              dilation, groups, return_flow);
  const Window& w = shape.window;
  const Tensor output = new_maps(image, {shape.batch, shape.channels, w.out_height, w.out_width});
  const Tensor flow = new_flow(shape, image, filters);
  const Tensor normalizer = new_normalizer(shape, filters);
  FilterForward call{shape, image, filters, output, std::nullopt, normalizer};
  if (return_flow) call.flow = flow;
  filter_forward(call);
  return {output, flow, normalizer};
}

std::tuple<Tensor, Tensor> filter_flow_backward(const Tensor& grad_output,               // [N, C, Ho, Wo]
                                                const std::optional<Tensor>& grad_flow,  // [N, 2 G, Ho, Wo]
                                                const Tensor& image,  // [N, C, H, W]
                                                const Tensor& filters,  // [N, G * K * K, Ho, Wo]
                                                const std::optional<Tensor>& output,  // [N, C, Ho, Wo]
                                                const std::optional<Tensor>& flow,  // [N, 2 G, Ho, Wo]
                                                const Tensor& normalizer,  // [N, G, Ho, Wo], or [0]
                                                int64_t normalize, int64_t padding_mode, int64_t stride,
                                                int64_t upsample, int64_t dilation, int64_t groups,
                                                bool need_image, bool need_filters) {
  const FilterShape shape = check_filter_flow_grad(grad_output, grad_flow, image, filters, output, flow,
                                                   normalizer, normalize, padding_mode, stride, upsample,
                                                   dilation, groups);
  const Window& w = shape.window;
  FilterBackward call{shape, grad_output, grad_flow, image, filters, output, flow, normalizer, {}, {}};
  const Tensor grad_image = need_image ? new_maps(image, {shape.batch, shape.channels, w.height, w.width})
                                       : empty_of(image, {0});
  const Tensor grad_filters =
      need_filters ? new_maps(filters, {shape.batch, shape.groups * w.taps(), w.out_height, w.out_width})
                   : empty_of(filters, {0});
  if (need_image) call.grad_image = grad_image;
  if (need_filters) call.grad_filters = grad_filters;
  filter_backward(call);
  return {grad_image, grad_filters};
}

std::tuple<Tensor, Tensor> expected_flow(const Tensor& filters,  // [N, G * K * K, H, W]
                                         int64_t normalize, int64_t dilation, int64_t groups) {
  const FilterShape shape = check_expected_flow(filters, normalize, dilation, groups);
  const Tensor flow = new_flow(shape, filters, filters), normalizer = new_normalizer(shape, filters);
  filter_forward({shape, std::nullopt, filters, std::nullopt, flow, normalizer});
  return {flow, normalizer};
}

Tensor expected_flow_backward(const Tensor& grad_flow,  // [N, 2 G, H, W]
                              const Tensor& filters,  // [N, G * K * K, H, W]
                              const Tensor& flow,  // [N, 2 G, H, W]
                              const Tensor& normalizer,  // [N, G, H, W], or [0]
                              int64_t normalize, int64_t dilation, int64_t groups) {
  const FilterShape shape =
      check_expected_flow_grad(grad_flow, filters, flow, normalizer, normalize, dilation, groups);
  const Tensor grad_filters =
      new_maps(filters, {filters.size(0), filters.size(1), filters.size(2), filters.size(3)});
  FilterBackward call{shape, {}, grad_flow, {}, filters, {}, flow, normalizer, {}, grad_filters};
  filter_backward(call);
  return grad_filters;
}

}  // namespace
}  // namespace effops::localfilter

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("filter_flow", TORCH_BOX(&effops::localfilter::filter_flow));
  m.impl("filter_flow_backward", TORCH_BOX(&effops::localfilter::filter_flow_backward));
  m.impl("expected_flow", TORCH_BOX(&effops::localfilter::expected_flow));
  m.impl("expected_flow_backward", TORCH_BOX(&effops::localfilter::expected_flow_backward));
}
