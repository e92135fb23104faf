// torch's own convolution of all positions, for masks that keep so many that choosing them does not pay.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "../common/torch.h"

namespace effops::rowconv {

inline Tensor dense_conv2d(const Tensor& x,                    // [N, Ci, H, W]
                           const Tensor& weight,               // [Co, Ci / groups, kh, kw]
                           const std::optional<Tensor>& bias,  // [Co]
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(x),       from(weight),   from(bias),  from(stride),
                                    from(padding), from(dilation), from(groups)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace effops::rowconv
