// torch's own convolution of all positions, for masks that keep so many that choosing them does not pay.
#pragma once

#include <array>
#include <optional>
#include <tuple>
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

// The gradients of x, weight and bias; undefined tensors where they are not needed.
inline std::tuple<Tensor, Tensor, Tensor> dense_conv2d_backward(
    const Tensor& grad_output,  // [N, Co, Ho, Wo]
    const Tensor& x,            // [N, Ci, H, W]
    const Tensor& weight,       // [Co, Ci / groups, kh, kw]
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, const std::array<bool, 3>& needs) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::vector<int64_t> none = {0, 0}, biases = {weight.size(0)};
  std::array<StableIValue, 11> stack{
      from(grad_output),
      from(x),
      from(weight),
      from(std::optional<std::vector<int64_t>>(biases)),
      from(stride),
      from(padding),
      from(dilation),
      from(false),
      from(none),
      from(groups),
      from(torch::headeronly::HeaderOnlyArrayRef<bool>(needs.data(), needs.size()))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

}  // namespace effops::rowconv
