// Checks of roi_align that the CPU and the CUDA library share.
#pragma once

#include <algorithm>
#include <limits>

#include "pyramid.h"
#include "roi_align_math.h"

namespace effops::sampling {

struct RoiAlignShape {
  PyramidShape pyramid;
  int64_t rois;  // R
};

inline RoiSettings make_roi_settings(int64_t height, int64_t width, int64_t sampling_ratio, bool aligned) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (height < 1 || width < 1 || height > most || width > most || height > most / width) {
    fail("roi_align: expected output_size of at least 1 and fewer than 2^31 bins, got (", height, ", ", width,
         ")");
  }
  return {static_cast<int32_t>(height), static_cast<int32_t>(width),
          static_cast<int32_t>(std::clamp<int64_t>(sampling_ratio, 0, most)), aligned};
}

// Checks everything that does not need the tensors' values.
inline RoiAlignShape check_roi_align(const std::vector<Tensor>& pyramid,  // L x [B, C, H_l, W_l]
                                     const Tensor& rois,                  // [R, 5]
                                     const Tensor& level,                 // [R]
                                     const std::vector<double>& strides) {
  constexpr const char* op = "roi_align";
  const PyramidShape shape = check_pyramid(op, pyramid);
  ShapeChecker sizes(op);
  sizes.match("rois", rois, "R5");
  sizes.match("level", level, "R");
  check_dtype_or_float(op, "rois", rois, pyramid[0].scalar_type());
  check_dtype(op, "level", level, ScalarType::Long);
  check_same_device(op, "rois", rois, "pyramid[0]", pyramid[0]);
  check_same_device(op, "level", level, "pyramid[0]", pyramid[0]);
  if (static_cast<int64_t>(strides.size()) != shape.levels) {
    fail(op, ": expected strides of length ", shape.levels, ", one per map, got ", strides.size());
  }
  for (const double stride : strides) {
    if (!(stride > 0 && stride <= std::numeric_limits<double>::max())) {
      fail(op, ": expected strides that are positive and finite, got ", stride);
    }
  }
  return {shape, sizes['R']};
}

// Checked arguments, contiguous where kernels read them.
struct RoiAlignInputs {
  const std::vector<Tensor>& pyramid;  // L x [B, C, H_l, W_l]
  Tensor rois, level;                  // [R, 5], [R]
  RoiSettings settings;
  std::vector<double> strides;
  RoiAlignShape shape;

  RoiAlignInputs(const std::vector<Tensor>& pyramid_in, const Tensor& rois_in, const Tensor& level_in,
                 const RoiSettings& settings_in, const std::vector<double>& strides_in)
      : pyramid(pyramid_in),
        rois(as_contiguous(rois_in)),
        level(as_contiguous(level_in)),
        settings(settings_in),
        strides(strides_in),
        shape(check_roi_align(pyramid, rois_in, level_in, strides)) {}

  bool is_empty() const { return shape.rois == 0 || shape.pyramid.channels == 0; }
};

inline void check_roi_align_grad(const Tensor& grad_output,  // [R, C, h, w]
                                 const Tensor& map, const RoiAlignShape& shape, const RoiSettings& settings) {
  constexpr const char* op = "roi_align_backward";
  if (grad_output.dim() != 4 || grad_output.size(0) != shape.rois ||
      grad_output.size(1) != shape.pyramid.channels || grad_output.size(2) != settings.height ||
      grad_output.size(3) != settings.width) {
    fail(op, ": expected grad_output of shape [R=", shape.rois, ", C=", shape.pyramid.channels,
         ", h=", settings.height, ", w=", settings.width, "], got ", shape_text(grad_output));
  }
  check_dtype(op, "grad_output", grad_output, map.scalar_type());
  check_same_device(op, "grad_output", grad_output, "pyramid[0]", map);
}

}  // namespace effops::sampling
