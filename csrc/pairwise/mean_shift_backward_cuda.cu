// The gradients of mean_shift on CUDA: outputs, registration.
#include "mean_shift_backward.cuh"
#include "mean_shift_cuda.cuh"

namespace effops::pairwise {
namespace {

// All kernels are deterministic.
std::tuple<Tensor, Tensor, Tensor, Tensor> mean_shift_backward(
    const Tensor& grad_output, const Tensor& x, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& seeds, const std::optional<Tensor>& kappa_tensor, const Tensor& iterates,
    const Tensor& sums, const Tensor& steps, double kappa, double eta, int64_t precision, bool return_all,
    bool need_x, bool need_weights, bool need_seeds, bool need_kappa) {
  const MeanShiftShape shape = check_mean_shift_grad(grad_output, x, weights, seeds, kappa_tensor, iterates,
                                                     sums, steps, kappa, eta, precision, return_all, need_x,
                                                     need_weights, need_seeds, need_kappa);
  const MeanShiftInputs inputs = make_inputs(shape, x, weights, seeds, kappa_tensor);
  const Tensor grad = as_contiguous(grad_output), all = as_contiguous(iterates),
               saved_sums = as_contiguous(sums), taken = as_contiguous(steps);
  CudaDevice device(x);
  const auto make = [&](bool needed, const std::vector<int64_t>& sizes) {
    return empty_of(x, needed ? sizes : std::vector<int64_t>{0});
  };
  const Tensor grad_x = make(need_x, {shape.batch, shape.points, shape.channels});
  const Tensor grad_weights = make(need_weights, {shape.batch, shape.points});
  const Tensor grad_seeds = make(need_seeds, {shape.batch, shape.rows, shape.channels});
  const bool is_scalar = kappa_tensor.has_value() && kappa_tensor->dim() == 0;
  const Tensor grad_kappa = make(need_kappa, is_scalar ? std::vector<int64_t>{} : std::vector<int64_t>{1});
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    const MeanShiftSaved<T> saved{
        static_cast<const T*>(grad.const_data_ptr()), return_all, static_cast<const T*>(all.const_data_ptr()),
        static_cast<const T*>(saved_sums.const_data_ptr()), taken.const_data_ptr<int64_t>()};
    const MeanShiftGradients<T> gradients{data_of<T>(grad_x), data_of<T>(grad_weights),
                                          data_of<T>(grad_seeds), data_of<T>(grad_kappa)};
    MeanShiftBackward<T, CudaDevice>(device, inputs.call<T>(), saved, gradients).run();
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {grad_x, grad_weights, grad_seeds, grad_kappa};
}

}  // namespace
}  // namespace effops::pairwise

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("mean_shift_backward", TORCH_BOX(&effops::pairwise::mean_shift_backward));
}
