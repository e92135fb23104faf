// Checks of the five tensors of an SPS, shared by all its ops and by the CPU and the CUDA library.
#pragma once

#include "../common/check.h"
#include "../common/torch.h"

namespace effops::rowconv {

constexpr int64_t kSideEnd = int64_t{1} << 31;  // sides below it cannot overflow the sums of geometry_math.h

struct SpsShape {
  int64_t active, passive;  // NA, NP
  int64_t features;  // F
  int64_t maps, height, width;  // R, H, W
  bool wide_map;  // index_map is int64, not int32
};

inline void check_sides(const char* op, const char* argument, int64_t height, int64_t width, int64_t end) {
  if (height >= end || width >= end) {
    fail(op, ": expected ", argument, " of fewer than ", end, " rows and columns, got ", height, " x ",
         width);
  }
}

// Checks everything that does not need the tensors' values.
inline SpsShape check_sps(const char* op,
                          const Tensor& active,  // [NA, F]
                          const Tensor& passive,  // [NP, F]
                          const Tensor& index_map,  // [R, H, W]
                          const Tensor& roi,  // [NA]
                          const Tensor& xy) {  // [NA, 2]
  ShapeChecker sizes(op);
  sizes.match("active", active, "AF");
  sizes.match("passive", passive, "PF");
  sizes.match("index_map", index_map, "RHW");
  sizes.match("roi", roi, "A");
  sizes.match("xy", xy, "A2");
  check_floating(op, "active", active);
  check_dtype(op, "passive", passive, active.scalar_type());
  check_int32_or_int64(op, "index_map", index_map);
  check_dtype(op, "roi", roi, ScalarType::Int);
  check_dtype(op, "xy", xy, ScalarType::Int);
  check_same_device(op, "passive", passive, "active", active);
  check_same_device(op, "index_map", index_map, "active", active);
  check_same_device(op, "roi", roi, "active", active);
  check_same_device(op, "xy", xy, "active", active);
  check_sides(op, "index_map", sizes['H'], sizes['W'], kSideEnd);
  return {sizes['A'],
          sizes['P'],
          sizes['F'],
          sizes['R'],
          sizes['H'],
          sizes['W'],
          index_map.scalar_type() == ScalarType::Long};
}

}  // namespace effops::rowconv
