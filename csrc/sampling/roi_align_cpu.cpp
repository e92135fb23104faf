// roi_align on the CPU: checks, plans, slices. The kernels are in roi_align_cpu_kernel.cpp.
#include "pyramid_cpu.h"
#include "roi_align.h"
#include "roi_align_cpu_kernel.h"
#include "roi_align_plan_cpu.h"

namespace effops::sampling {
namespace {

constexpr int64_t kRoisPerPlanTask = 16;

// Calls f(read), where read(i) is element i of the boxes as an accumulator.
template <typename T, typename F>
void with_boxes(const Tensor& rois, const F& f) {
  using A = accumulator_t<T>;
  if (rois.scalar_type() == ScalarType::Float) {
    f([data = static_cast<const float*>(rois.const_data_ptr())](int64_t i) {
      return static_cast<A>(data[i]);
    });
  } else {
    f([data = static_cast<const T*>(rois.const_data_ptr())](int64_t i) { return widen(data[i]); });
  }
}

// Sorts the RoIs by the image of the map that they read; ids out of range are an error.
template <typename T>
Buckets sort_rois(const RoiAlignInputs& problem) {
  const PyramidShape& p = problem.shape.pyramid;
  const int64_t* level = problem.level.const_data_ptr<int64_t>();
  Buckets buckets;
  with_boxes<T>(problem.rois, [&](const auto& read) {
    buckets = sort_by_image(problem.shape.rois, p.levels * p.batch, [&](int64_t r) {
      const auto value = read(5 * r);
      const int64_t image = roi_image(value, p.batch);
      if (image < 0) fail("roi_align: expected rois[:, 0] in [0, ", p.batch, "), got ", value);
      if (level[r] < 0 || level[r] >= p.levels) {
        fail("roi_align: expected level in [0, ", p.levels, "), got ", level[r]);
      }
      return level[r] * p.batch + image;
    });
  });
  return buckets;
}

int64_t max_side(const std::vector<Tensor>& pyramid) {
  int64_t side = 0;
  for (const Tensor& map : pyramid) side = std::max({side, map.size(2), map.size(3)});
  return side;
}

// The sums of all RoIs, in the order of Buckets.
template <typename T>
std::vector<RoiPlan<accumulator_t<T>>> plan_rois(const RoiAlignInputs& problem, const Buckets& buckets,
                                                 bool transposed) {
  using A = accumulator_t<T>;
  const RoiSettings& s = problem.settings;
  const int64_t* levels = problem.level.const_data_ptr<int64_t>();
  std::vector<RoiPlan<A>> plans(problem.shape.rois);
  const int64_t side = max_side(problem.pyramid);
  with_boxes<T>(problem.rois, [&](const auto& read) {
    parallel_for(static_cast<int64_t>(plans.size()), kRoisPerPlanTask, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> place_of_pixel(transposed ? side : 0, -1);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = buckets.item(i), level = levels[r];
        const A stride = static_cast<A>(problem.strides[level]);
        const Tensor& map = problem.pyramid[level];
        const auto plan = [&](int64_t first, int32_t bins, int64_t map_side) {
          const RoiAxis<A> axis = roi_axis(read(5 * r + first), read(5 * r + first + 2), stride, bins,
                                           static_cast<int32_t>(map_side), s.sampling_ratio, s.aligned);
          const AxisPlan<A> sums = sums_of_bins(axis, bins);
          return transposed ? sums_of_pixels(sums, place_of_pixel) : sums;
        };
        plans[i] = {plan(2, s.height, map.size(2)), plan(1, s.width, map.size(3))};
      }
    });
  });
  return plans;
}

// Multiply-adds per channel: rows are summed along x once, then each is added to the bins that have it.
template <typename A>
int64_t count_reads(const std::vector<RoiPlan<A>>& plans, int64_t begin, int64_t end, int64_t width) {
  int64_t reads = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y_terms = plans[i].y.begin.back(), x_terms = plans[i].x.begin.back();
    reads += y_terms * (x_terms + width);
  }
  return reads;
}

template <typename A>
int64_t max_columns(const std::vector<RoiPlan<A>>& plans) {
  int64_t columns = 0;
  for (const RoiPlan<A>& plan : plans) columns = std::max<int64_t>(columns, plan.x.begin.size() - 1);
  return columns;
}

Tensor roi_align(const std::vector<Tensor>& pyramid,  // L x [B, C, H_l, W_l]
                 const Tensor& rois,                  // [R, 5]
                 const Tensor& level,                 // [R]
                 int64_t output_height, int64_t output_width, int64_t sampling_ratio, bool aligned,
                 const std::vector<double>& strides) {
  const RoiAlignInputs problem(
      pyramid, rois, level, make_roi_settings(output_height, output_width, sampling_ratio, aligned), strides);
  const int64_t channels = problem.shape.pyramid.channels, bins = output_height * output_width;
  Tensor output = empty_of(pyramid[0], {problem.shape.rois, channels, output_height, output_width});
  dispatch_floating("roi_align", "pyramid", pyramid[0].scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Buckets buckets = sort_rois<T>(problem);
    if (problem.is_empty()) return;
    const auto plans = plan_rois<T>(problem, buckets, false);
    const auto forward =
        roi_align_kernels().forward[static_cast<int>(float_type_of(pyramid[0].scalar_type()))];
    const int64_t scratch_bytes = roi_align_kernels().scratch_bytes(bins, output_width, max_side(pyramid));
    T* out = static_cast<T*>(output.mutable_data_ptr());
    const PyramidRunner runner(pyramid, buckets, StridedChannels::kPacks, [&](int64_t begin, int64_t end) {
      return count_reads(plans, begin, end, output_width);
    });
    runner.read(1, [&](const SliceUnit& unit, int64_t begin, int64_t end) {
      const Scratch scratch(scratch_bytes);
      for_channel_groups(unit, sizeof(T), [&](const MapSlice& slice, int64_t channel) {
        for (int64_t i = begin; i < end; ++i) {
          T* target = out + (buckets.item(i) * channels + channel) * bins;
          forward(slice, plans[i].sums(problem.settings), target, scratch.at(0));
        }
      });
    });
  });
  return output;
}

std::vector<Tensor> roi_align_backward(const Tensor& grad_output,           // [R, C, h, w]
                                       const std::vector<Tensor>& pyramid,  // L x [B, C, H_l, W_l]
                                       const Tensor& rois,                  // [R, 5]
                                       const Tensor& level,                 // [R]
                                       int64_t output_height, int64_t output_width, int64_t sampling_ratio,
                                       bool aligned, const std::vector<double>& strides,
                                       bool /*deterministic: always*/) {
  const RoiAlignInputs problem(
      pyramid, rois, level, make_roi_settings(output_height, output_width, sampling_ratio, aligned), strides);
  check_roi_align_grad(grad_output, pyramid[0], problem.shape, problem.settings);
  const int64_t channels = problem.shape.pyramid.channels, bins = output_height * output_width;
  const std::vector<Tensor> gradients = new_pyramid_gradients(pyramid, true);
  dispatch_floating("roi_align_backward", "pyramid", pyramid[0].scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Buckets buckets = sort_rois<T>(problem);
    if (problem.is_empty()) return;
    const auto plans = plan_rois<T>(problem, buckets, true);
    const auto scatter =
        roi_align_kernels().scatter[static_cast<int>(float_type_of(pyramid[0].scalar_type()))];
    const int64_t scratch_bytes = roi_align_kernels().scratch_bytes(bins, max_columns(plans), 0);
    const Tensor contiguous = as_contiguous(grad_output);
    const T* grad = static_cast<const T*>(contiguous.const_data_ptr());
    const PyramidRunner runner(pyramid, buckets, StridedChannels::kPacks, [&](int64_t begin, int64_t end) {
      return count_reads(plans, begin, end, output_width);
    });
    runner.template sum<T>(gradients, [&](const SliceUnit& unit, const SumSlice& sums) {
      const Scratch scratch(scratch_bytes);
      for (int64_t i = unit.begin; i < unit.end; ++i) {
        const T* source = grad + (buckets.item(i) * channels + unit.first_channel) * bins;
        scatter(sums, plans[i].sums(problem.settings), source, scratch.at(0));
      }
    });
  });
  return gradients;
}

}  // namespace
}  // namespace effops::sampling

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&effops::sampling::roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&effops::sampling::roi_align_backward));
}
