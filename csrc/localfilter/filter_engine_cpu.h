// Filters applied to an image on the CPU, and their gradients: what filter_flow, expected_flow,
// neighborhood_dot and neighborhood_mix are front ends of. Checked arguments only.
#pragma once

#include <optional>

#include "filter_flow.h"

namespace effops::localfilter {

struct FilterForward {
  FilterShape shape;
  std::optional<Tensor> image;  // none with 0 channels
  Tensor filters;               // [N, G * K * K, Ho, Wo]
  std::optional<Tensor> output, flow;
  Tensor normalizer;  // contiguous; [0] if none is saved
};
void filter_forward(const FilterForward& call);

struct FilterBackward {
  FilterShape shape;  // flow: flow and grad_flow are there
  std::optional<Tensor> grad_output, grad_flow;
  std::optional<Tensor> image;           // none with 0 channels
  std::optional<Tensor> filters;  // may be missing if they are not normalised and grad_image is not wanted
  std::optional<Tensor> output, flow;  // needed if filters are normalised
  std::optional<Tensor> normalizer;
  std::optional<Tensor> grad_image, grad_filters;  // those that are wanted
};
void filter_backward(const FilterBackward& call);

// Sizes of what the forward ops return.
inline Tensor new_normalizer(const FilterShape& shape, const Tensor& filters) {
  const Window& w = shape.window;
  return empty_of(filters,
                  shape.normalizer()
                      ? std::vector<int64_t>{shape.batch, shape.groups, w.out_height, w.out_width}
                      : std::vector<int64_t>{0},
                  accumulator_dtype(filters));
}

}  // namespace effops::localfilter
