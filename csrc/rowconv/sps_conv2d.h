// Checks of sps_conv2d that the CPU and the CUDA library share.
#pragma once

#include <string>
#include <vector>

#include "sps.h"

namespace effops::rowconv {

struct SpsConvShape {
  SpsShape sps;
  int64_t out_channels;          // O
  int64_t groups;
  std::vector<int64_t> kernels;  // k of each of the D branches
  bool has_bias;
  bool relu;

  int64_t branches() const { return static_cast<int64_t>(kernels.size()); }
  int64_t sign_bytes() const { return (out_channels + 7) / 8; }  // of one row of one branch
};

inline void check_groups(const char* op, int64_t groups, int64_t in_channels, int64_t out_channels) {
  if (groups < 1 || in_channels % groups != 0 || out_channels % groups != 0) {
    fail(op, ": expected groups >= 1 that divides ", in_channels, " input and ", out_channels,
         " output channels, got ", groups);
  }
}

inline void check_dilation(const char* op, const char* argument, int64_t dilation, int64_t kernel) {
  if (dilation >= kSideEnd || (kernel > 1 && dilation > (kSideEnd - 1) / (kernel - 1))) {
    fail(op, ": expected ", argument, " times (kernel size - 1) of less than 2^31, got ", dilation, " and ",
         kernel, " - 1");
  }
}

inline void check_sps_weights(const char* op, const Tensor& active,                    // [NA, F]
                              const std::vector<Tensor>& weight,
                              int64_t groups) {  // D x [O, F / groups, k, k]
  if (weight.empty()) fail(op, ": expected at least one weight, got none");
  const int64_t features = active.size(1);
  const int64_t outputs = weight[0].dim() == 4 ? weight[0].size(0) : 0;
  check_groups(op, groups, features, outputs);
  for (size_t d = 0; d < weight.size(); ++d) {
    const std::string name = "weight[" + std::to_string(d) + "]";
    const Tensor& w = weight[d];
    if (w.dim() != 4 || w.size(0) != outputs || w.size(1) != features / groups || w.size(2) != w.size(3) ||
        w.size(2) % 2 == 0) {
      fail(op, ": expected ", name, " of shape [O=", outputs, ", F / groups=", features / groups,
           ", k, k] with k odd, got ", shape_text(w));
    }
    check_dtype(op, name.c_str(), w, active.scalar_type());
    check_same_device(op, name.c_str(), w, "active", active);
  }
}

// Checks everything that does not need the tensors' values. An empty list of biases stands for none.
inline SpsConvShape check_sps_conv2d(const Tensor& active,               // [NA, F]
                                     const Tensor& passive,              // [NP, F]
                                     const Tensor& index_map,            // [R, H, W]
                                     const Tensor& roi,                  // [NA]
                                     const Tensor& xy,                   // [NA, 2]
                                     const std::vector<Tensor>& weight,  // D x [O, F / groups, k, k]
                                     const std::vector<Tensor>& bias,    // D x [O]
                                     const std::vector<int64_t>& dilation, int64_t activation,
                                     int64_t groups) {
  constexpr const char* op = "sps_conv2d";
  const SpsShape sps = check_sps(op, active, passive, index_map, roi, xy);
  check_sps_weights(op, active, weight, groups);
  const int64_t outputs = weight[0].size(0);
  SpsConvShape shape{sps, outputs, groups, {}, !bias.empty(), activation == 1};
  if (!bias.empty() && bias.size() != weight.size()) {
    fail(op, ": expected one bias per weight (", weight.size(), "), got ", bias.size());
  }
  for (size_t d = 0; d < bias.size(); ++d) {
    const std::string name = "bias[" + std::to_string(d) + "]";
    if (bias[d].dim() != 1 || bias[d].size(0) != outputs) {
      fail(op, ": expected ", name, " of shape [O=", outputs, "], got ", shape_text(bias[d]));
    }
    check_dtype(op, name.c_str(), bias[d], active.scalar_type());
    check_same_device(op, name.c_str(), bias[d], "active", active);
  }
  if (dilation.size() != weight.size()) {
    fail(op, ": expected one dilation per weight (", weight.size(), "), got ", dilation.size());
  }
  for (size_t d = 0; d < weight.size(); ++d) {
    if (dilation[d] < 1) fail(op, ": expected dilation >= 1, got ", dilation[d]);
    check_dilation(op, "dilation", dilation[d], weight[d].size(2));
    shape.kernels.push_back(weight[d].size(2));
  }
  if (activation != 0 && activation != 1) {
    fail(op, ": expected activation 0 (none) or 1 (relu), got ", activation);
  }
  return shape;
}

inline void check_sps_conv2d_grad(const Tensor& grad_output,  // [NA, O]
                                  const Tensor& signs,        // [D or 0, NA, ceil(O / 8)]
                                  const Tensor& active,       // [NA, F]
                                  const SpsConvShape& shape) {
  constexpr const char* op = "sps_conv2d_backward";
  if (grad_output.dim() != 2 || grad_output.size(0) != shape.sps.active ||
      grad_output.size(1) != shape.out_channels) {
    fail(op, ": expected grad_output of shape [A=", shape.sps.active, ", O=", shape.out_channels, "], got ",
         shape_text(grad_output));
  }
  const int64_t sign_maps = shape.relu ? shape.branches() : 0;
  if (signs.dim() != 3 || signs.size(0) != sign_maps || signs.size(1) != shape.sps.active ||
      signs.size(2) != shape.sign_bytes()) {
    fail(op, ": expected signs of shape [", sign_maps, ", A=", shape.sps.active, ", ", shape.sign_bytes(),
         "], got ", shape_text(signs));
  }
  check_dtype(op, "grad_output", grad_output, active.scalar_type());
  check_dtype(op, "signs", signs, ScalarType::Byte);
  check_same_device(op, "grad_output", grad_output, "active", active);
  check_same_device(op, "signs", signs, "active", active);
}

}  // namespace effops::rowconv
