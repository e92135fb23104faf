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
    return {shape,
            levels.data(),
            locations.const_data_ptr(),
            weights.const_data_ptr(),
            float_type_of(locations.scalar_type()),
            float_type_of(weights.scalar_type())};
  }

  // Packing a row costs about as much as three points lose by reading it in place (measured on Zen 4).
  bool reads_in_place() const {
    return points_per_slice() < 2 * shape.rows && padded == shape.channels && value.stride(3) == 1;
  }

  // Slices packed at a time: one per thread keeps the packed rows in the caches.
  int64_t slices_per_group() const { return reads_in_place() ? slices() : std::min(slices(), num_threads()); }

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

// Runs f(slice, first row, last row) for blocks of rows of `count` slices, on all threads.
template <typename F>
void for_row_blocks(int64_t count, int64_t rows, const F& f) {
  const int64_t blocks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(count * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % blocks * kRowsPerTask;
      f(task / blocks, row, std::min(row + kRowsPerTask, rows));
    }
  });
}

// The (image, head) slices of a tensor [B, rows, M, D], a few at a time: packed into rows that lie next to
// each other, padded to whole registers, or read in place.
class PackedSlices {
 public:
  PackedSlices(const Problem& problem, const Tensor& tensor, bool in_place, int64_t per_group)
      : problem_(problem),
        tensor_(tensor),
        rows_(tensor.size(1)),
        in_place_(in_place),
        buffer_(in_place ? 0 : per_group * slice_bytes()) {}

  void load(int64_t first, int64_t count) {
    first_ = first;
    if (in_place_) return;
    const auto pack = ms_deform_attn_kernels().pack[static_cast<int>(problem_.type)];
    for_row_blocks(count, rows_, [&](int64_t slice, int64_t begin, int64_t end) {
      pack(source(first_ + slice), begin, end, problem_.shape.channels, problem_.padded,
           buffer_.at(slice * slice_bytes()));
    });
  }

  ValueSlice slice(int64_t index) const {
    if (in_place_) return {source(index).data, tensor_.stride(1), problem_.padded};
    return {buffer_.at((index - first_) * slice_bytes()), problem_.padded, problem_.padded};
  }

 private:
  StridedRows source(int64_t slice) const {
    const int64_t heads = problem_.shape.heads;
    const int64_t offset = slice / heads * tensor_.stride(0) + slice % heads * tensor_.stride(2);
    return {static_cast<const char*>(tensor_.const_data_ptr()) + offset * problem_.type_size,
            tensor_.stride(1), tensor_.stride(3)};
  }
  int64_t slice_bytes() const { return rows_ * problem_.padded * problem_.type_size; }

  const Problem& problem_;
  const Tensor& tensor_;
  int64_t rows_;
  bool in_place_;
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
  const int64_t per_group = problem.slices_per_group();
  PackedSlices slices(problem, problem.value, problem.reads_in_place(), per_group);
  for (int64_t first = 0; first < problem.slices(); first += per_group) {
    const int64_t count = std::min(per_group, problem.slices() - first);
    slices.load(first, count);
    parallel_for(count * blocks, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(scratch_bytes);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slice = first + task / blocks, query = task % blocks * kQueriesPerTask;
        const QueryRange range{
            slice / s.heads, slice % s.heads, query, std::min(query + kQueriesPerTask, s.queries), 0,
            s.levels};
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
  GradientSlices(const Problem& problem, const Tensor& gradient, int64_t per_group)
      : problem_(problem),
        target_(static_cast<char*>(gradient.mutable_data_ptr())),
        in_place_(problem.reads_in_place() && problem.padded == problem.shape.channels && is_accumulator()),
        buffer_(in_place_ ? 0 : per_group * slice_bytes()) {
    if (in_place_) memset(target_, 0, gradient.numel() * problem.type_size);
  }

  void clear(int64_t first, int64_t count) {
    first_ = first;
    if (in_place_) return;
    for_row_blocks(count, problem_.shape.rows, [&](int64_t slice, int64_t begin, int64_t end) {
      const int64_t row_bytes = problem_.padded * accumulator_size();
      memset(buffer_.at(slice * slice_bytes() + begin * row_bytes), 0, (end - begin) * row_bytes);
    });
  }

  void finish(int64_t count) {
    if (in_place_) return;
    const auto unpack = ms_deform_attn_kernels().unpack[static_cast<int>(problem_.type)];
    for_row_blocks(count, problem_.shape.rows, [&](int64_t slice, int64_t begin, int64_t end) {
      unpack(buffer_.at(slice * slice_bytes()), begin, end, problem_.shape.channels, problem_.padded,
             target_stride(), target_ + target_offset(first_ + slice));
    });
  }

  void* rows(int64_t index) const {
    return in_place_ ? target_ + target_offset(index) : buffer_.at((index - first_) * slice_bytes());
  }
  int64_t row_stride() const { return in_place_ ? target_stride() : problem_.padded; }

 private:
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

// Backward tasks are (image, head), or (image, head, level) when that leaves threads idle and no levels
// share rows. Each owns the rows and the points that it writes and visits the queries in order: no atomics
// are needed, and the sums do not depend on the threads.
void run_backward(const Problem& problem, const Tensor& grad_output,  // [B, Q, M, D]
                  const Tensor* grad_value, const Tensor* grad_locations, const Tensor* grad_weights) {
  const MsDeformAttnShape& s = problem.shape;
  const MsDeformAttnKernels& kernels = ms_deform_attn_kernels();
  const auto backward = kernels.backward[static_cast<int>(problem.type)];
  const PointInputs inputs = problem.inputs();
  const int64_t scratch_bytes = kernels.scratch_bytes(s);
  const bool levels_are_apart = grad_value == nullptr || !problem.has_overlapping_levels();
  const int64_t per_group = problem.slices_per_group();
  PackedSlices slices(problem, problem.value, problem.reads_in_place(), per_group);
  PackedSlices grads(problem, grad_output, false, per_group);
  std::optional<GradientSlices> sums;
  if (grad_value) sums.emplace(problem, *grad_value, per_group);

  for (int64_t first = 0; first < problem.slices(); first += per_group) {
    const int64_t count = std::min(per_group, problem.slices() - first);
    slices.load(first, count);
    grads.load(first, count);
    if (sums) sums->clear(first, count);
    const int64_t parts = count < num_threads() && levels_are_apart ? s.levels : 1;
    parallel_for(count * parts, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(scratch_bytes);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slice = first + task / parts, part = task % parts;
        const QueryRange range{slice / s.heads, slice % s.heads,         0,
                               s.queries,       part * s.levels / parts, (part + 1) * s.levels / parts};
        const PointGradients gradients{grads.slice(slice).rows, sums ? sums->rows(slice) : nullptr,
                                       sums ? sums->row_stride() : 0,
                                       grad_locations ? grad_locations->mutable_data_ptr() : nullptr,
                                       grad_weights ? grad_weights->mutable_data_ptr() : nullptr};
        backward(inputs, slices.slice(slice), range, gradients, scratch.at(0));
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
  Tensor grad_locations =
      gradient(sampling_locations, need_locations, {s.batch, s.queries, s.heads, s.levels, s.points, 2});
  Tensor grad_weights =
      gradient(attention_weights, need_weights, {s.batch, s.queries, s.heads, s.levels, s.points});
  if (!empty && (need_value || need_locations || need_weights)) {
    const Tensor per_head = torch::stable::reshape(grad_output, {s.batch, s.queries, s.heads, s.channels});
    run_backward(problem, per_head, need_value ? &grad_value : nullptr,
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
