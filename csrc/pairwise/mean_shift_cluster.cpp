// mean_shift_cluster: mean_shift and assign_modes one after the other, on the device of the points.
#include <array>

#include "assign_modes.h"
#include "mean_shift.h"

namespace effops::pairwise {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// Calls an op with as many arguments and results as the stack has room for; a result lies where the
// arguments were.
template <size_t count>
void call(const char* op, std::array<StableIValue, count>& stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
}

Tensor mean_shift_cluster(const Tensor& x,  // [B, N, D]
                          double kappa, int64_t iterations, double threshold, int64_t min_size) {
  constexpr const char* op = "mean_shift_cluster";
  check_mean_shift_inputs(op, x, std::nullopt, std::nullopt, std::nullopt, kappa, /*eta=*/1, kHigh);
  check_iterations(op, iterations);
  check_labelling(op, threshold, min_size);

  std::array detached{from(x)};
  call("aten::detach", detached);
  const double eta = 1, no_tol = -1;
  std::array shifted{detached[0],          from(std::nullopt), from(std::nullopt), from(std::nullopt),
                     from(kappa),          from(eta),          from(iterations),   from(no_tol),
                     from(int64_t{kHigh}), from(false),        from(false)};
  call("effops::mean_shift", shifted);
  const auto modes = to<Tensor>(shifted[0]);
  for (size_t i = 1; i < 4; ++i) to<Tensor>(shifted[i]);  // owned by us: what backward would read
  std::array labelled{from(modes), from(threshold), from(min_size)};
  call("effops::assign_modes", labelled);
  return to<Tensor>(labelled[0]);
}

}  // namespace
}  // namespace effops::pairwise

STABLE_TORCH_LIBRARY_IMPL(effops, CompositeExplicitAutograd, m) {
  m.impl("mean_shift_cluster", TORCH_BOX(&effops::pairwise::mean_shift_cluster));
}
