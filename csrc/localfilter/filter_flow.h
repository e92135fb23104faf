// Checks of filter_flow and expected_flow that the CPU and the CUDA library share.
#pragma once

#include <optional>

#include "window_check.h"

namespace effops::localfilter {

struct FilterShape {
  int64_t batch, channels, groups;  // N, C, G
  Window window;
  int normalize;  // a Normalize
  bool flow;      // the expected displacement is wanted, or has a gradient

  // Whether what the weights are normalised by is saved for backward.
  bool normalizer() const { return normalize != kNone || window.padding == kRenormalize; }
};

inline void check_normalize(const char* op, int64_t normalize) {
  if (normalize < kSoftmax || normalize > kSum) {
    fail(op, ": expected normalize 0 (softmax), 1 (none) or 2 (sum), got ", normalize);
  }
}

// float32 maths serves every mixture with float32; float64 stays among its own.
inline void check_filter_dtype(const char* op, const Tensor& image, const Tensor& filters) {
  check_floating(op, "image", image);
  check_floating(op, "filters", filters);
  const ScalarType dtype = image.scalar_type(), got = filters.scalar_type();
  if (got == dtype) return;
  const bool is_single = dtype == ScalarType::Float || got == ScalarType::Float;
  if (!is_single || dtype == ScalarType::Double || got == ScalarType::Double) {
    fail(op, ": expected filters of dtype ", dtype_name(dtype),
         dtype == ScalarType::Double  ? ""
         : dtype == ScalarType::Float ? ", bfloat16 or float16"
                                      : " or float32",
         ", got ", dtype_name(got));
  }
}

// All arguments that both directions have.
inline FilterShape check_filters(const char* op,
                                 const Tensor& image,    // [N, C, H, W]
                                 const Tensor& filters,  // [N, G * K * K, Ho, Wo]
                                 int64_t normalize, int64_t padding_mode, int64_t stride, int64_t upsample,
                                 int64_t dilation, int64_t groups, bool flow) {
  if (image.dim() != 4) fail(op, ": expected image of shape [N, C, H, W], got ", shape_text(image));
  if (filters.dim() != 4) {
    fail(op, ": expected filters of shape [N, G * K * K, Ho, Wo], got ", shape_text(filters));
  }
  check_filter_dtype(op, image, filters);
  check_same_device(op, "filters", filters, "image", image);
  check_normalize(op, normalize);
  if (padding_mode < kZeros || padding_mode > kRenormalize) {
    fail(op, ": expected padding_mode 0 (zeros), 1 (replicate), 2 (reflect) or 3 (renormalize), got ",
         padding_mode);
  }
  check_factor(op, "stride", stride);
  check_factor(op, "upsample", upsample);
  if (stride > 1 && upsample > 1) {
    fail(op, ": expected stride or upsample to be 1, got ", stride, " and ", upsample);
  }
  const int64_t channels = image.size(1);
  if (groups < 1 || channels % groups != 0) {
    fail(op, ": expected groups >= 1 that divides ", channels, " channels of image, got ", groups);
  }
  const int64_t kernel = kernel_of(op, "filters", filters, groups);
  check_dilation(op, dilation, kernel);
  check_sides(op, "image", image);
  check_sides(op, "filters", filters);
  int64_t out[2];
  for (const int axis : {0, 1}) out[axis] = (image.size(2 + axis) * upsample + stride - 1) / stride;
  if (filters.size(0) != image.size(0) || filters.size(2) != out[0] || filters.size(3) != out[1]) {
    fail(op, ": expected filters of shape [N=", image.size(0), ", G * K * K, Ho=", out[0], ", Wo=", out[1],
         "], got ", shape_text(filters));
  }
  const Window window{image.size(2), image.size(3), out[0],
                      out[1],        kernel,        dilation,
                      stride,        upsample,      static_cast<int>(padding_mode)};
  return {image.size(0), channels, groups, window, static_cast<int>(normalize), flow};
}

// What the forward op saved; tensors may have any strides.
inline void check_saved_normalizer(const char* op, const Tensor& normalizer,  // [N, G, Ho, Wo], or [0]
                                   const FilterShape& shape, const Tensor& filters) {
  const Window& w = shape.window;
  if (shape.normalizer()) {
    check_maps(op, "normalizer", normalizer, shape.batch, shape.groups, w.out_height, w.out_width,
               accumulator_dtype(filters), "filters", filters);
  } else if (normalizer.dim() != 1 || normalizer.size(0) != 0) {
    fail(op, ": expected normalizer of shape [0] beside weights that are not normalised, got ",
         shape_text(normalizer));
  }
}

inline void check_flow(const char* op, const char* argument, const Tensor& flow,  // [N, 2 G, Ho, Wo]
                       const FilterShape& shape, const Tensor& filters) {
  const Window& w = shape.window;
  check_maps(op, argument, flow, shape.batch, 2 * shape.groups, w.out_height, w.out_width,
             accumulator_dtype(filters), "filters", filters);
}

// Checks everything that does not need the tensors' values.
inline FilterShape check_filter_flow(const Tensor& image,    // [N, C, H, W]
                                     const Tensor& filters,  // [N, G * K * K, Ho, Wo]
                                     int64_t normalize, int64_t padding_mode, int64_t stride,
                                     int64_t upsample, int64_t dilation, int64_t groups, bool return_flow) {
  return check_filters("filter_flow", image, filters, normalize, padding_mode, stride, upsample, dilation,
                       groups, return_flow);
}

inline FilterShape check_filter_flow_grad(const Tensor& grad_output,               // [N, C, Ho, Wo]
                                          const std::optional<Tensor>& grad_flow,  // [N, 2 G, Ho, Wo]
                                          const Tensor& image,                     // [N, C, H, W]
                                          const Tensor& filters,              // [N, G * K * K, Ho, Wo]
                                          const std::optional<Tensor>& output,  // [N, C, Ho, Wo]
                                          const std::optional<Tensor>& flow,  // [N, 2 G, Ho, Wo]
                                          const Tensor& normalizer,           // [N, G, Ho, Wo], or [0]
                                          int64_t normalize, int64_t padding_mode, int64_t stride,
                                          int64_t upsample, int64_t dilation, int64_t groups) {
  constexpr const char* op = "filter_flow_backward";
  const FilterShape shape = check_filters(op, image, filters, normalize, padding_mode, stride, upsample,
                                          dilation, groups, grad_flow.has_value());
  const Window& w = shape.window;
  check_maps(op, "grad_output", grad_output, shape.batch, shape.channels, w.out_height, w.out_width,
             image.scalar_type(), "image", image);
  if (!output && shape.normalizer())
    fail(op, ": expected output beside weights that are normalised, got none");
  if (output) {
    check_maps(op, "output", *output, shape.batch, shape.channels, w.out_height, w.out_width,
               image.scalar_type(), "image", image);
  }
  if (grad_flow.has_value() != flow.has_value()) {
    fail(op, ": expected grad_flow and flow or none of them, got only ", flow ? "flow" : "grad_flow");
  }
  if (grad_flow) check_flow(op, "grad_flow", *grad_flow, shape, filters);
  if (flow) check_flow(op, "flow", *flow, shape, filters);
  check_saved_normalizer(op, normalizer, shape, filters);
  return shape;
}

inline FilterShape check_flow_filters(const char* op, const Tensor& filters,  // [N, G * K * K, H, W]
                                      int64_t normalize, int64_t dilation, int64_t groups) {
  if (filters.dim() != 4) {
    fail(op, ": expected filters of shape [N, G * K * K, H, W], got ", shape_text(filters));
  }
  check_floating(op, "filters", filters);
  check_normalize(op, normalize);
  if (groups < 1) fail(op, ": expected groups >= 1, got ", groups);
  const int64_t kernel = kernel_of(op, "filters", filters, groups);
  check_dilation(op, dilation, kernel);
  check_sides(op, "filters", filters);
  const Window window = same_window(filters.size(2), filters.size(3), kernel, dilation, kZeros);
  return {filters.size(0), 0, groups, window, static_cast<int>(normalize), true};
}

// Checks everything that does not need the tensors' values. There is no image: it has 0 channels.
inline FilterShape check_expected_flow(const Tensor& filters,  // [N, G * K * K, H, W]
                                       int64_t normalize, int64_t dilation, int64_t groups) {
  return check_flow_filters("expected_flow", filters, normalize, dilation, groups);
}

inline FilterShape check_expected_flow_grad(const Tensor& grad_flow,   // [N, 2 G, H, W]
                                            const Tensor& filters,     // [N, G * K * K, H, W]
                                            const Tensor& flow,        // [N, 2 G, H, W]
                                            const Tensor& normalizer,  // [N, G, H, W], or [0]
                                            int64_t normalize, int64_t dilation, int64_t groups) {
  constexpr const char* op = "expected_flow_backward";
  const FilterShape shape = check_flow_filters(op, filters, normalize, dilation, groups);
  check_flow(op, "grad_flow", grad_flow, shape, filters);
  check_flow(op, "flow", flow, shape, filters);
  check_saved_normalizer(op, normalizer, shape, filters);
  return shape;
}

}  // namespace effops::localfilter
