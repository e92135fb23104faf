// Checks of sps_from_dense and sps_to_dense that the CPU and the CUDA library share.
#pragma once

#include <limits>

#include "sps.h"

namespace effops::rowconv {

struct DenseShape {
  int64_t maps, features, height, width;  // R, F, H, W

  int64_t cells() const { return maps * height * width; }
  // Whether the ids of a new SPS of as many rows as cells need int64.
  bool wide_map() const { return cells() > std::numeric_limits<int32_t>::max(); }
};

inline DenseShape check_sps_from_dense(const Tensor& x,       // [R, F, H, W]
                                       const Tensor& mask) {  // [R, H, W]
  constexpr const char* op = "sps_from_dense";
  ShapeChecker sizes(op);
  sizes.match("x", x, "RFHW");
  sizes.match("mask", mask, "RHW");
  check_floating(op, "x", x);
  check_dtype(op, "mask", mask, ScalarType::Bool);
  check_same_device(op, "mask", mask, "x", x);
  check_sides(op, "x", sizes['H'], sizes['W'], kSideEnd);
  return {sizes['R'], sizes['F'], sizes['H'], sizes['W']};
}

inline SpsShape check_sps_from_dense_grad(const Tensor& grad_active,   // [NA, F]
                                          const Tensor& grad_passive,  // [NP, F]
                                          const Tensor& index_map) {   // [R, H, W]
  constexpr const char* op = "sps_from_dense_backward";
  ShapeChecker sizes(op);
  sizes.match("grad_active", grad_active, "AF");
  sizes.match("grad_passive", grad_passive, "PF");
  sizes.match("index_map", index_map, "RHW");
  check_floating(op, "grad_active", grad_active);
  check_dtype(op, "grad_passive", grad_passive, grad_active.scalar_type());
  check_int32_or_int64(op, "index_map", index_map);
  check_same_device(op, "grad_passive", grad_passive, "grad_active", grad_active);
  check_same_device(op, "index_map", index_map, "grad_active", grad_active);
  const int64_t cells = sizes['R'] * sizes['H'] * sizes['W'];
  if (sizes['A'] + sizes['P'] != cells) {
    fail(op, ": expected grad_active and grad_passive of one row per cell (", cells, "), got ", sizes['A'],
         " and ", sizes['P']);
  }
  return {sizes['A'],
          sizes['P'],
          sizes['F'],
          sizes['R'],
          sizes['H'],
          sizes['W'],
          index_map.scalar_type() == ScalarType::Long};
}

inline SpsShape check_sps_to_dense(const Tensor& active,     // [NA, F]
                                   const Tensor& passive,    // [NP, F]
                                   const Tensor& index_map,  // [R, H, W]
                                   const Tensor& roi,        // [NA]
                                   const Tensor& xy) {       // [NA, 2]
  return check_sps("sps_to_dense", active, passive, index_map, roi, xy);
}

inline void check_sps_to_dense_grad(const Tensor& grad_output,  // [R, F, H, W]
                                    const Tensor& active,       // [NA, F]
                                    const SpsShape& shape) {
  constexpr const char* op = "sps_to_dense_backward";
  if (grad_output.dim() != 4 || grad_output.size(0) != shape.maps || grad_output.size(1) != shape.features ||
      grad_output.size(2) != shape.height || grad_output.size(3) != shape.width) {
    fail(op, ": expected grad_output of shape [R=", shape.maps, ", F=", shape.features, ", H=", shape.height,
         ", W=", shape.width, "], got ", shape_text(grad_output));
  }
  check_dtype(op, "grad_output", grad_output, active.scalar_type());
  check_same_device(op, "grad_output", grad_output, "active", active);
}

}  // namespace effops::rowconv
