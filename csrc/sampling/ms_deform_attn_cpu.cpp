// ms_deform_attn on the CPU: checks, layout, threads. The kernels are in ms_deform_attn_cpu_kernel.cpp.
#include <algorithm>

#include "../common/dtype_switch.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "ms_deform_attn.h"
#include "ms_deform_attn_cpu_kernel.h"

namespace effops::sampling {
namespace {

constexpr int64_t kRowsPerTask = 4096;    // of pack and unpack
constexpr int64_t kQueriesPerTask = 512;  // of forward

// Inputs in the layout that the kernels read, and the tensors that keep them alive.
struct Problem {
  MsDeformAttnShape shape;
  Tensor value, locations, weights;
  std::vector<Level> levels;
  FloatType type;
  int64_t padded;    // channels, rounded up to whole registers
  int64_t type_size;

  Problem(const Tensor& value_in, const Tensor& spatial_shapes,
          const std::optional<Tensor>& level_start_index, const Tensor& locations_in,
          const Tensor& weights_in)
      : shape(check_ms_deform_attn(value_in, spatial_shapes, level_start_index, locations_in, weights_in)),
        value(value_in),
        locations(as_contiguous(locations_in)),
        weights(as_contiguous(weights_in)),
        levels(read_levels(spatial_shapes, level_start_index, shape.rows)),
        type(float_type_of(value.scalar_type())) {
    const int64_t lanes = ms_deform_attn_kernels().float_lanes / (type == FloatType::kDouble ? 2 : 1);
    padded = (shape.channels + lanes - 1) / lanes * lanes;
    type_size = static_cast<int64_t>(value.element_size());
    for (const Level& level : levels) {
      if (type != FloatType::kDouble && int64_t{level.height} * level.width > INT32_MAX) {
        fail("ms_deform_attn: expected levels of fewer than 2^31 pixels unless value is float64, got H=",
             level.height, ", W=", level.width);
      }
    }
  }

  int64_t slices() const { return shape.batch * shape.heads; }
  int64_t points_per_slice() const { return shape.queries * shape.levels * shape.points; }
  bool is_empty() const { return slices() == 0 || points_per_slice() == 0 || shape.channels == 0; }

  PointInputs inputs() const {
    return {shape, levels.data(), locations.const_data_ptr(), weights.const_data_ptr(),
            float_type_of(locations.scalar_type()), float_type_of(weights.scalar_type())};
  }

  // Packing all rows costs more than it saves when the points touch only a few of them.
  bool reads_in_place() const {
    return 4 * points_per_slice() < shape.rows && padded == shape.channels && value.stride(3) == 1;
  }

  // The rows of one (image, head), strided as in the user's tensor.
  StridedRows source(int64_t slice) const {
    const int64_t offset = slice / shape.heads * value.stride(0) + slice % shape.heads * value.stride(2);
    return {static_cast<const char*>(value.const_data_ptr()) + offset * type_size, value.stride(1),
            value.stride(3)};
  }

  // Levels that share no row can be scattered to by different threads.
  bool has_overlapping_levels() const {
    std::vector<std::pair<int64_t, int64_t>> spans;
    for (const Level& l : levels) spans.emplace_back(l.start, l.start + int64_t{l.height} * l.width);
    std::sort(spans.begin(), spans.end());
    for (size_t i = 1; i < spans.size(); ++i) {
      if (spans[i].first < spans[i - 1].second) return true;
    }
    return false;
  }
};

// A few (image, head) slices of value at a time, packed by all threads into cache-friendly rows.
class PackedSlices {
 public:
  explicit PackedSlices(const Problem& problem)
      : problem_(problem),
        in_place_(problem.reads_in_place()),
        per_group_(in_place_ ? problem.slices() : std::min(problem.slices(), num_threads())),
        buffer_(in_place_ ? 0 : per_group_ * slice_bytes()) {}

  int64_t per_group() const { return per_group_; }

  void load(int64_t first, int64_t count) {
    first_ = first;
    if (in_place_) return;
    const auto pack = ms_deform_attn_kernels().pack[static_cast<int>(problem_.type)];
    const int64_t rows = problem_.shape.rows, blocks = (rows + kRowsPerTask - 1) / kRowsPerTask;
    parallel_for(count * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slice = task / blocks, row = task % blocks * kRowsPerTask;
        pack(problem_.source(first + slice), row, std::min(row + kRowsPerTask, rows),
             problem_.shape.channels, problem_.padded, buffer_.at(slice * slice_bytes()));
      }
    });
  }

  ValueSlice slice(int64_t index) const {
    if (in_place_) {
      const StridedRows rows = problem_.source(index);
      return {rows.data, rows.row_stride, problem_.padded};
    }
    return {buffer_.at((index - first_) * slice_bytes()), problem_.padded, problem_.padded};
  }

 private:
  int64_t slice_bytes() const { return problem_.shape.rows * problem_.padded * problem_.type_size; }

  const Problem& problem_;
  bool in_place_;
  int64_t per_group_;
  Scratch buffer_;
  int64_t first_ = 0;
};

Tensor ms_deform_attn(const Tensor& value,                             // [B, S, M, D]
                      const Tensor& spatial_shapes,                    // [L, 2]
                      const std::optional<Tensor>& level_start_index,  // [L]
                      const Tensor& sampling_locations,                // [B, Q, M, L, P, 2]
                      const Tensor& attention_weights) {               // [B, Q, M, L, P]
  const Problem problem(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const MsDeformAttnShape& s = problem.shape;
  const std::vector<int64_t> sizes = {s.batch, s.queries, s.heads * s.channels};
  if (problem.is_empty()) return zeros_of(value, sizes);
  Tensor output = empty_of(value, sizes);

  const MsDeformAttnKernels& kernels = ms_deform_attn_kernels();
  const auto forward = kernels.forward[static_cast<int>(problem.type)];
  const PointInputs inputs = problem.inputs();
  void* out = output.mutable_data_ptr();
  const int64_t scratch_bytes = kernels.scratch_bytes(s);
  const int64_t blocks = (s.queries + kQueriesPerTask - 1) / kQueriesPerTask;
  PackedSlices slices(problem);
  for (int64_t first = 0; first < problem.slices(); first += slices.per_group()) {
    const int64_t count = std::min(slices.per_group(), problem.slices() - first);
    slices.load(first, count);
    parallel_for(count * blocks, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(scratch_bytes);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slice = first + task / blocks, query = task % blocks * kQueriesPerTask;
        const QueryRange range{slice / s.heads, slice % s.heads, query,
                               std::min(query + kQueriesPerTask, s.queries), 0, s.levels};
        forward(inputs, slices.slice(slice), range, out, scratch.at(0));
      }
    });
  }
  return output;
}

// Accumulators of grad_value for a few slices at a time. They are the gradient tensor's own memory when it
// has the accumulators' type and whole registers of channels, and are rounded into it otherwise.
class GradientSlices {
 public:
  GradientSlices(const Problem& problem, const Tensor& gradient, int64_t per_group, bool few_points)
      : problem_(problem),
        target_(static_cast<char*>(gradient.mutable_data_ptr())),
        in_place_(few_points && problem.padded == problem.shape.channels && is_accumulator()),
        buffer_(in_place_ ? 0 : per_group * slice_bytes()) {
    if (in_place_) memset(target_, 0, gradient.numel() * problem.type_size);
  }

  void clear(int64_t first, int64_t count) {
    first_ = first;
    if (in_place_) return;
    for_rows(count, [&](int64_t slice, int64_t begin, int64_t end) {
      const int64_t row_bytes = problem_.padded * accumulator_size();
      memset(buffer_.at(slice * slice_bytes() + begin * row_bytes), 0, (end - begin) * row_bytes);
    });
  }

  void finish(int64_t count) {
    if (in_place_) return;
    const auto unpack = ms_deform_attn_kernels().unpack[static_cast<int>(problem_.type)];
    for_rows(count, [&](int64_t slice, int64_t begin, int64_t end) {
      unpack(buffer_.at(slice * slice_bytes()), begin, end, problem_.shape.channels, problem_.padded,
             target_stride(), target_ + target_offset(first_ + slice));
    });
  }

  void* rows(int64_t index) const {
    return in_place_ ? target_ + target_offset(index) : buffer_.at((index - first_) * slice_bytes());
  }
  int64_t row_stride() const { return in_place_ ? target_stride() : problem_.padded; }

 private:
  template <typename F>
  void for_rows(int64_t count, const F& f) const {
    const int64_t rows = problem_.shape.rows, blocks = (rows + kRowsPerTask - 1) / kRowsPerTask;
    parallel_for(count * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task % blocks * kRowsPerTask;
        f(task / blocks, row, std::min(row + kRowsPerTask, rows));
      }
    });
  }

  bool is_accumulator() const { return accumulator_size() == problem_.type_size; }
  int64_t accumulator_size() const { return problem_.type == FloatType::kDouble ? 8 : 4; }
  int64_t slice_bytes() const { return problem_.shape.rows * problem_.padded * accumulator_size(); }
  int64_t target_stride() const { return problem_.shape.heads * problem_.shape.channels; }
  int64_t target_offset(int64_t slice) const {
    const MsDeformAttnShape& s = problem_.shape;
    return (slice / s.heads * s.rows * s.heads + slice % s.heads) * s.channels * problem_.type_size;
  }

  const Problem& problem_;
  char* target_;
  bool in_place_;
  Scratch buffer_;
  int64_t first_ = 0;
};

// Backward tasks are (image, head, level): each owns the rows and the points that it writes, and visits
// the queries in order, so that no atomics are needed and the sums do not depend on the threads.
void run_backward(const Problem& problem, const Tensor& grad_output, const Tensor* grad_value,
                  const Tensor* grad_locations, const Tensor* grad_weights) {
  const MsDeformAttnShape& s = problem.shape;
  const MsDeformAttnKernels& kernels = ms_deform_attn_kernels();
  const auto backward = kernels.backward[static_cast<int>(problem.type)];
  const PointInputs inputs = problem.inputs();
  const int64_t scratch_bytes = kernels.scratch_bytes(s);
  const int64_t parts = grad_value != nullptr && problem.has_overlapping_levels() ? 1 : s.levels;
  PackedSlices slices(problem);
  std::optional<GradientSlices> sums;
  if (grad_value) sums.emplace(problem, *grad_value, slices.per_group(), problem.reads_in_place());
  PointGradients gradients{grad_output.const_data_ptr(), nullptr, 0,
                           grad_locations ? grad_locations->mutable_data_ptr() : nullptr,
                           grad_weights ? grad_weights->mutable_data_ptr() : nullptr};

  for (int64_t first = 0; first < problem.slices(); first += slices.per_group()) {
    const int64_t count = std::min(slices.per_group(), problem.slices() - first);
    slices.load(first, count);
    if (sums) sums->clear(first, count);
    parallel_for(count * parts, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(scratch_bytes);
      PointGradients targets = gradients;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slice = first + task / parts, part = task % parts;
        const QueryRange range{slice / s.heads, slice % s.heads, 0, s.queries,
                               part * s.levels / parts, (part + 1) * s.levels / parts};
        targets.grad_rows = sums ? sums->rows(slice) : nullptr;
        targets.row_stride = sums ? sums->row_stride() : 0;
        backward(inputs, slices.slice(slice), range, targets, scratch.at(0));
      }
    });
    if (sums) sums->finish(count);
  }
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output,                       // [B, Q, M * D]
    const Tensor& value,                             // [B, S, M, D]
    const Tensor& spatial_shapes,                    // [L, 2]
    const std::optional<Tensor>& level_start_index,  // [L]
    const Tensor& sampling_locations,                // [B, Q, M, L, P, 2]
    const Tensor& attention_weights,                 // [B, Q, M, L, P]
    bool need_value, bool need_locations, bool need_weights, bool /*deterministic: always*/) {
  const Problem problem(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const MsDeformAttnShape& s = problem.shape;
  check_ms_deform_attn_grad(grad_output, value, s);
  using Sizes = std::vector<int64_t>;
  const bool empty = problem.is_empty();
  const auto gradient = [&](const Tensor& like, bool needed, const Sizes& sizes) {
    if (!needed) return empty_of(like, {0});
    return empty ? zeros_of(like, sizes) : empty_of(like, sizes);
  };
  Tensor grad_value = gradient(value, need_value, {s.batch, s.rows, s.heads, s.channels});
  Tensor grad_locations = gradient(sampling_locations, need_locations,
                                   {s.batch, s.queries, s.heads, s.levels, s.points, 2});
  Tensor grad_weights =
      gradient(attention_weights, need_weights, {s.batch, s.queries, s.heads, s.levels, s.points});
  if (!empty && (need_value || need_locations || need_weights)) {
    run_backward(problem, as_contiguous(grad_output), need_value ? &grad_value : nullptr,
                 need_locations ? &grad_locations : nullptr, need_weights ? &grad_weights : nullptr);
  }
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace effops::sampling

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&effops::sampling::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&effops::sampling::ms_deform_attn_backward));
}
