// ms_deform_attn on CUDA: arguments, grids, launches.
#include "../common/cuda_launch.cuh"
#include "../common/dtype_switch.h"
#include "ms_deform_attn.h"
#include "ms_deform_attn_backward_kernels.cuh"
#include "ms_deform_attn_deterministic_kernels.cuh"
#include "ms_deform_attn_forward_kernels.cuh"

namespace effops::sampling {
namespace {

// Checked inputs, laid out as the kernels read them.
struct Inputs {
  MsDeformAttnShape shape;
  Tensor value, locations, weights;
  std::optional<Tensor> level_shapes, level_starts;  // on the device; absent if by value or consecutive
  std::optional<Tensor> level_table;                 // memory of Pyramid::table
  Pyramid pyramid{};

  Inputs(const Tensor& value_in, const Tensor& spatial_shapes, const std::optional<Tensor>& level_start_index,
         const Tensor& sampling_locations, const Tensor& attention_weights)
      : shape(check_ms_deform_attn(value_in, spatial_shapes, level_start_index, sampling_locations,
                                   attention_weights)),
        value(as_contiguous(value_in)),
        // Pairs are read at once; 16 covers two elements of any type.
        locations(as_aligned(sampling_locations, 16)),
        weights(as_contiguous(attention_weights)) {
    if (!fits_kernels(shape)) {
      fail(
          "ms_deform_attn: expected fewer than 2^32 rows S, 2^30 points L * P and 2^29 channels M * D on CUDA, ",
          "got value ", shape_text(value), " and attention_weights ", shape_text(weights));
    }
    set_levels(spatial_shapes, level_start_index);
  }

  bool is_empty() const {
    return shape.batch == 0 || shape.rows == 0 || shape.heads == 0 || shape.channels == 0 ||
           shape.queries == 0 || shape.levels == 0 || shape.points == 0;
  }

  int64_t level_bytes() const {
    return pyramid.table ? 0 : shape.levels * static_cast<int64_t>(sizeof(Level));
  }

  template <typename T>
  PointArguments<T> points() const {
    return {pyramid,
            locations.const_data_ptr(),
            weights.const_data_ptr(),
            locations.scalar_type() == value.scalar_type(),
            weights.scalar_type() == value.scalar_type(),
            static_cast<int32_t>(shape.points),
            static_cast<int32_t>(shape.levels * shape.points)};
  }

  // Sizes that lie on the CPU are checked here and travel by value where they fit; sizes on the device
  // stay there, and the kernels skip levels that are wrong. Neither waits for the device.
  void set_levels(const Tensor& spatial_shapes, const std::optional<Tensor>& level_start_index) {
    pyramid.levels = shape.levels;
    pyramid.rows = shape.rows;
    const bool shapes_on_cpu = spatial_shapes.is_cpu();
    const bool starts_on_device = level_start_index && !level_start_index->is_cpu();
    if (shapes_on_cpu && !starts_on_device) {
      const std::vector<Level> levels = read_levels(spatial_shapes, level_start_index, shape.rows);
      if (shape.levels <= kLevelsByValue) {
        for (size_t l = 0; l < levels.size(); ++l) {
          pyramid.shape_values[l][0] = levels[l].height;
          pyramid.shape_values[l][1] = levels[l].width;
          pyramid.start_values[l] = levels[l].start;
        }
        return;
      }
    }
    level_shapes = as_contiguous(on_device_of(value, spatial_shapes));
    pyramid.shapes = level_shapes->const_data_ptr<int64_t>();
    if (level_start_index) {
      level_starts = as_contiguous(on_device_of(value, *level_start_index));
      pyramid.starts = level_starts->const_data_ptr<int64_t>();
    }
  }

  // More levels than shared memory holds are unpacked once.
  void make_level_table(const CudaScope& scope) {
    if (shape.levels <= kSharedLevels) return;
    level_table = empty_of(value, {shape.levels * 2}, ScalarType::Long);
    static_assert(sizeof(Level) == 2 * sizeof(int64_t));
    Level* table = static_cast<Level*>(level_table->mutable_data_ptr());
    scope.launch(&level_table_kernel<>, (shape.levels + 127) / 128, 128, 0, pyramid, table);
    pyramid.table = table;
  }
};

// Groups of at least this many lanes (log2): two points are sampled, four are reduced at a time.
constexpr int kForwardLanes = 1, kBackwardLanes = 2;

template <typename T>
bool use_vectors(const MsDeformAttnShape& shape, int minimum_lanes) {
  return shape.channels % kPackSize<T> == 0 &&
         make_tiling<T>(shape, kPackSize<T>, minimum_lanes).works <= INT32_MAX;
}

template <typename T>
void run_forward(const Inputs& inputs, const CudaScope& scope, const Tensor& output) {
  const auto run = [&](auto kernel, int vector) {
    const Tiling tiling = make_tiling<T>(inputs.shape, vector, kForwardLanes);
    const ForwardArguments<T> arguments{inputs.points<T>(), tiling,
                                        static_cast<const T*>(inputs.value.const_data_ptr()),
                                        static_cast<T*>(output.mutable_data_ptr())};
    scope.launch(kernel, tiling.works, kThreads, inputs.level_bytes(), arguments);
  };
  if (use_vectors<T>(inputs.shape, kForwardLanes) && is_aligned(inputs.value, 16)) {
    run(&ms_deform_attn_forward_kernel<T, kPackSize<T>>, kPackSize<T>);
  } else {
    run(&ms_deform_attn_forward_kernel<T, 1>, 1);
  }
}

// Gradients to compute; null = not needed.
struct Gradients {
  Tensor* value = nullptr;  // in the accumulator type, zeros
  Tensor* locations = nullptr;
  Tensor* weights = nullptr;
};

template <typename T, bool kNeedValue, bool kNeedPoints>
void run_backward(const Inputs& inputs, const CudaScope& scope, const Tensor& grad_output,
                  const Gradients& gradients) {
  const auto pointer = [](Tensor* tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; };
  const auto run = [&](auto kernel, int vector) {
    const Tiling tiling = make_tiling<T>(inputs.shape, vector, kBackwardLanes);
    const BackwardArguments<T> arguments{inputs.points<T>(),
                                         tiling,
                                         static_cast<const T*>(inputs.value.const_data_ptr()),
                                         static_cast<const T*>(grad_output.const_data_ptr()),
                                         static_cast<accumulator_t<T>*>(pointer(gradients.value)),
                                         pointer(gradients.locations),
                                         pointer(gradients.weights)};
    scope.launch(kernel, tiling.works, kThreads, inputs.level_bytes(), arguments);
  };
  constexpr int kVector = kPackSize<T>;
  if (use_vectors<T>(inputs.shape, kBackwardLanes) && inputs.shape.channels <= kWarpSize * kVector &&
      is_aligned(inputs.value, 16) && is_aligned(grad_output, 16)) {
    run(&ms_deform_attn_backward_kernel<T, kVector, kNeedValue, kNeedPoints>, kVector);
  } else {
    run(&ms_deform_attn_backward_kernel<T, 1, kNeedValue, kNeedPoints>, 1);
  }
}

template <typename T>
void run_backward(const Inputs& inputs, const CudaScope& scope, const Tensor& grad_output,
                  const Gradients& gradients) {
  const bool need_points = gradients.locations || gradients.weights;
  if (gradients.value && need_points) {
    run_backward<T, true, true>(inputs, scope, grad_output, gradients);
  } else if (gradients.value) {
    run_backward<T, true, false>(inputs, scope, grad_output, gradients);
  } else if (need_points) {
    run_backward<T, false, true>(inputs, scope, grad_output, gradients);
  }
}

template <typename T>
void run_value_gradient(const Inputs& inputs, const CudaScope& scope, const Tensor& grad_output,
                        const Tensor& grad_value) {
  const auto arguments = make_owner_arguments(inputs.shape, inputs.points<T>(),
                                              static_cast<const T*>(grad_output.const_data_ptr()),
                                              static_cast<T*>(grad_value.mutable_data_ptr()));
  scope.launch(&ms_deform_attn_value_gradient_kernel<T>, arguments.works, kOwnerThreads,
               kTileBytes + inputs.level_bytes(), arguments);
}

Tensor ms_deform_attn(const Tensor& value,                             // [B, S, M, D]
                      const Tensor& spatial_shapes,                    // [L, 2]
                      const std::optional<Tensor>& level_start_index,  // [L]
                      const Tensor& sampling_locations,                // [B, Q, M, L, P, 2]
                      const Tensor& attention_weights) {               // [B, Q, M, L, P]
  Inputs inputs(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const CudaScope scope(value);
  const MsDeformAttnShape& s = inputs.shape;
  if (inputs.is_empty()) return zeros_of(value, {s.batch, s.queries, s.heads * s.channels});
  inputs.make_level_table(scope);
  const Tensor output = empty_of(value, {s.batch, s.queries, s.heads * s.channels});
  dispatch_floating("ms_deform_attn", "value", value.scalar_type(),
                    [&](auto tag) { run_forward<typename decltype(tag)::type>(inputs, scope, output); });
  return output;
}

// grad_value of the right type, or its accumulators in float32.
Tensor new_value_gradient(const Tensor& value, const MsDeformAttnShape& s, bool deterministic) {
  const std::vector<int64_t> sizes{s.batch, s.rows, s.heads, s.channels};
  if (deterministic) return empty_of(value, sizes);
  const bool is_double = value.scalar_type() == ScalarType::Double;
  return zeros_of(value, sizes, is_double ? ScalarType::Double : ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output,                       // [B, Q, M * D]
    const Tensor& value,                             // [B, S, M, D]
    const Tensor& spatial_shapes,                    // [L, 2]
    const std::optional<Tensor>& level_start_index,  // [L]
    const Tensor& sampling_locations,                // [B, Q, M, L, P, 2]
    const Tensor& attention_weights,                 // [B, Q, M, L, P]
    bool need_value, bool need_locations, bool need_weights, bool deterministic) {
  Inputs inputs(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const CudaScope scope(value);
  const MsDeformAttnShape& s = inputs.shape;
  check_ms_deform_attn_grad(grad_output, value, s);
  const std::vector<int64_t> point_sizes{s.batch, s.queries, s.heads, s.levels, s.points};
  std::vector<int64_t> location_sizes = point_sizes;
  location_sizes.push_back(2);
  Tensor grad_value = empty_of(value, {0}), grad_locations = empty_of(sampling_locations, {0}),
         grad_weights = empty_of(attention_weights, {0});
  if (inputs.is_empty()) {
    if (need_value) grad_value = zeros_of(value, {s.batch, s.rows, s.heads, s.channels});
    if (need_locations) grad_locations = zeros_of(sampling_locations, location_sizes);
    if (need_weights) grad_weights = zeros_of(attention_weights, point_sizes);
    return {grad_value, grad_locations, grad_weights};
  }
  if (need_value) grad_value = new_value_gradient(value, s, deterministic);
  if (need_locations) grad_locations = empty_of(sampling_locations, location_sizes);
  if (need_weights) grad_weights = empty_of(attention_weights, point_sizes);
  inputs.make_level_table(scope);
  const Tensor gradient = as_contiguous(grad_output);
  dispatch_floating("ms_deform_attn_backward", "value", value.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (need_value && deterministic) run_value_gradient<T>(inputs, scope, gradient, grad_value);
    run_backward<T>(inputs, scope, gradient,
                    {need_value && !deterministic ? &grad_value : nullptr,
                     need_locations ? &grad_locations : nullptr, need_weights ? &grad_weights : nullptr});
  });
  if (need_value && grad_value.scalar_type() != value.scalar_type()) {
    grad_value = torch::stable::to(grad_value, value.scalar_type());
  }
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace effops::sampling

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&effops::sampling::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&effops::sampling::ms_deform_attn_backward));
}
