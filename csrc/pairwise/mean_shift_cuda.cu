// mean_shift on CUDA: outputs, registration.
#include "mean_shift_cuda.cuh"
#include "mean_shift_forward.cuh"

namespace effops::pairwise {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> mean_shift(const Tensor& x,                       // [B, N, D]
                                                      const std::optional<Tensor>& weights,  // [B, N]
                                                      const std::optional<Tensor>& seeds,    // [B, M, D]
                                                      const std::optional<Tensor>& kappa_tensor, double kappa,
                                                      double eta, int64_t iterations, double tol,
                                                      int64_t precision, bool return_all, bool save) {
  const MeanShiftShape shape = check_mean_shift(x, weights, seeds, kappa_tensor, kappa, eta, iterations, tol,
                                                precision, return_all, save);
  const MeanShiftInputs inputs = make_inputs(shape, x, weights, seeds, kappa_tensor);
  CudaDevice device(x);
  const std::vector<int64_t> all_sizes{iterations + 1, shape.batch, shape.rows, shape.channels};
  const Tensor output = return_all ? empty_of(x, all_sizes)
                                   : empty_of(x, {shape.batch, shape.rows, shape.channels});
  const Tensor iterates = save && !return_all ? empty_of(x, all_sizes) : empty_of(x, {0});
  const Tensor sums = save ? empty_of(x, {iterations, 2, shape.batch, shape.rows}) : empty_of(x, {0});
  const Tensor steps = empty_of(x, {shape.batch}, ScalarType::Long);
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    MeanShiftResult<T> result{};
    (return_all ? result.iterates : result.output) = data_of<T>(output);
    if (!return_all) result.iterates = data_of<T>(iterates);
    result.sums = data_of<T>(sums);
    result.steps = data_of<int64_t>(steps);
    MeanShiftForward<T, CudaDevice>(device, inputs.call<T>(), result).run();
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {output, iterates, sums, steps};
}

}  // namespace
}  // namespace effops::pairwise

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) { m.impl("mean_shift", TORCH_BOX(&effops::pairwise::mean_shift)); }
