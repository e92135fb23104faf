// point_sample on the CPU: checks, points, slices. The kernels are in point_sample_cpu_kernel.cpp.
#include <cmath>

#include "bilinear_math.h"
#include "point_sample.h"
#include "point_sample_cpu_kernel.h"
#include "pyramid_cpu.h"

namespace effops::sampling {
namespace {

constexpr int64_t kPointsPerTask = 512;
constexpr int64_t kReadsPerPoint = 4;

// The places of the points on their maps, in the order of Buckets.
template <typename T>
struct PointList {
  using A = accumulator_t<T>;
  Buckets buckets;
  std::vector<LocatedPoint<A>> points;
};

// Sorts the points by the image of the map that they read; ids out of range are an error.
Buckets sort_points(const PointSampleShape& shape, const Tensor& batch, const Tensor& level) {
  const Tensor batches = as_contiguous(batch), levels = as_contiguous(level);
  const int64_t* b = batches.const_data_ptr<int64_t>();
  const int64_t* l = levels.const_data_ptr<int64_t>();
  const PyramidShape& p = shape.pyramid;
  std::vector<int64_t> images(shape.points);
  for (int64_t n = 0; n < shape.points; ++n) {
    if (b[n] < 0 || b[n] >= p.batch) fail("point_sample: expected batch in [0, ", p.batch, "), got ", b[n]);
    if (l[n] < 0 || l[n] >= p.levels) fail("point_sample: expected level in [0, ", p.levels, "), got ", l[n]);
    images[n] = l[n] * p.batch + b[n];
  }
  return sort_by_image(images, p.levels * p.batch);
}

template <typename A>
LocatedPoint<A> locate(int64_t row, A x, A y, int32_t height, int32_t width) {
  LocatedPoint<A> point{row, 0, 0, 0, {}};
  x = x * static_cast<A>(width) - A(0.5);
  y = y * static_cast<A>(height) - A(0.5);
  if (!is_active(x, y, height, width)) return point;
  const Corners<A> corners = corners_at(x, y, height, width);
  corner_weights(corners, point.weight);
  point.x0 = static_cast<int32_t>(std::floor(x));
  point.y0 = static_cast<int32_t>(std::floor(y));
  for (int k = 0; k < 4; ++k) point.inside |= static_cast<uint32_t>(corners.valid[k]) << k;
  return point;
}

// Calls f(tensor's data as its own type).
template <typename T, typename F>
void with_coordinates(const Tensor& xy, const F& f) {
  if (xy.scalar_type() == ScalarType::Float) {
    f(static_cast<const float*>(xy.const_data_ptr()));
  } else {
    f(static_cast<const T*>(xy.const_data_ptr()));
  }
}

template <typename T>
PointList<T> locate_points(const std::vector<Tensor>& pyramid, Buckets buckets, const Tensor& xy) {  // [N, 2]
  using A = accumulator_t<T>;
  PointList<T> list{std::move(buckets), {}};
  const int64_t batch = pyramid[0].size(0);
  list.points.resize(list.buckets.order.size());
  with_coordinates<T>(xy, [&](const auto* coordinates) {
    for (size_t m = 0; m + 1 < list.buckets.begin.size(); ++m) {
      const int64_t first = list.buckets.begin[m], count = list.buckets.begin[m + 1] - first;
      if (count == 0) continue;
      const Tensor& map = pyramid[static_cast<int64_t>(m) / batch];
      const auto height = static_cast<int32_t>(map.size(2)), width = static_cast<int32_t>(map.size(3));
      parallel_for(count, 8 * kPointsPerTask, [&](int64_t begin, int64_t end) {
        for (int64_t i = first + begin; i < first + end; ++i) {
          const int64_t row = list.buckets.order[i];
          list.points[i] = locate(row, static_cast<A>(widen(coordinates[2 * row])),
                                  static_cast<A>(widen(coordinates[2 * row + 1])), height, width);
        }
      });
    }
  });
  return list;
}

PyramidRunner make_runner(const std::vector<Tensor>& pyramid, const Buckets& buckets) {
  return {pyramid, buckets, [](int64_t begin, int64_t end) { return kReadsPerPoint * (end - begin); }};
}

Tensor point_sample(const std::vector<Tensor>& pyramid,  // L x [B, C, H_l, W_l]
                    const Tensor& batch,                 // [N]
                    const Tensor& level,                 // [N]
                    const Tensor& xy) {                  // [N, 2]
  const PointSampleShape shape = check_point_sample(pyramid, batch, level, xy);
  Buckets buckets = sort_points(shape, batch, level);
  const int64_t channels = shape.pyramid.channels;
  Tensor output = empty_of(pyramid[0], {shape.points, channels});
  if (shape.points == 0 || channels == 0) return output;
  void* out = output.mutable_data_ptr();
  dispatch_floating("point_sample", "pyramid", pyramid[0].scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const PointList<T> list = locate_points<T>(pyramid, std::move(buckets), as_contiguous(xy));
    const auto forward = point_sample_kernels().forward[static_cast<int>(float_type_of(output.scalar_type()))];
    make_runner(pyramid, list.buckets)
        .read(kPointsPerTask, [&](const SliceUnit& unit, int64_t begin, int64_t end) {
          forward(unit.slice, &list.points[begin], end - begin, {out, unit.first_channel, channels});
        });
  });
  return output;
}

// grad_xy[n] = (W, H) * slopes of <g, v>, from the dot products of g with the corners, which lie in one
// part per slice of channels.
template <typename T, typename Coordinate>
void finish_points(const std::vector<Tensor>& pyramid, const PointList<T>& list, int64_t slices,
                   const accumulator_t<T>* dots, const Coordinate* xy, Coordinate* grad_xy) {
  using A = accumulator_t<T>;
  const int64_t total = static_cast<int64_t>(list.points.size()), batch = pyramid[0].size(0);
  for (size_t m = 0; m + 1 < list.buckets.begin.size(); ++m) {
    const int64_t first = list.buckets.begin[m], count = list.buckets.begin[m + 1] - first;
    if (count == 0) continue;
    const Tensor& map = pyramid[static_cast<int64_t>(m) / batch];
    const A height = static_cast<A>(map.size(2)), width = static_cast<A>(map.size(3));
    parallel_for(count, 8 * kPointsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = first + begin; i < first + end; ++i) {
        const LocatedPoint<A>& point = list.points[i];
        A values[4] = {}, dx = 0, dy = 0;
        for (int64_t s = 0; s < slices; ++s) {
          for (int k = 0; k < 4; ++k) values[k] += dots[4 * (s * total + i) + k];
        }
        if (point.inside != 0) {
          Corners<A> corners{};
          corners.fx = static_cast<A>(widen(xy[2 * point.row])) * width - A(0.5) - static_cast<A>(point.x0);
          corners.fy = static_cast<A>(widen(xy[2 * point.row + 1])) * height - A(0.5) - static_cast<A>(point.y0);
          corner_slopes(corners, values, dx, dy);
        }
        grad_xy[2 * point.row] = narrow<Coordinate>(static_cast<accumulator_t<Coordinate>>(width * dx));
        grad_xy[2 * point.row + 1] = narrow<Coordinate>(static_cast<accumulator_t<Coordinate>>(height * dy));
      }
    });
  }
}

template <typename T>
void run_backward(const std::vector<Tensor>& pyramid, const PointList<T>& list,
                  const Tensor& grad_output,                   // [N, C]
                  const Tensor& xy,                            // [N, 2]
                  const std::vector<Tensor>* grad_pyramid, const Tensor* grad_xy) {
  using A = accumulator_t<T>;
  const PyramidRunner runner = make_runner(pyramid, list.buckets);
  const int type = static_cast<int>(float_type_of(grad_output.scalar_type()));
  const int64_t channels = grad_output.size(1), total = grad_output.size(0);
  void* grad = const_cast<void*>(grad_output.const_data_ptr());
  if (grad_pyramid) {
    const auto scatter = point_sample_kernels().scatter[type];
    runner.template sum<T>(*grad_pyramid, [&](const SliceUnit& unit, const SumSlice& sums) {
      scatter(sums, &list.points[unit.begin], unit.end - unit.begin, {grad, unit.first_channel, channels});
    });
  }
  if (grad_xy) {
    const auto dots = point_sample_kernels().dots[type];
    const int64_t slices = runner.max_slices();
    std::vector<A> products(4 * slices * total, A(0));
    runner.read(kPointsPerTask, [&](const SliceUnit& unit, int64_t begin, int64_t end) {
      dots(unit.slice, &list.points[begin], end - begin, {grad, unit.first_channel, channels},
           &products[4 * (unit.index * total + begin)]);
    });
    with_coordinates<T>(xy, [&](const auto* coordinates) {
      using Coordinate = std::remove_const_t<std::remove_pointer_t<decltype(coordinates)>>;
      finish_points<T, Coordinate>(pyramid, list, slices, products.data(), coordinates,
                                   static_cast<Coordinate*>(grad_xy->mutable_data_ptr()));
    });
  }
}

std::tuple<std::vector<Tensor>, Tensor> point_sample_backward(
    const Tensor& grad_output,           // [N, C]
    const std::vector<Tensor>& pyramid,  // L x [B, C, H_l, W_l]
    const Tensor& batch,                 // [N]
    const Tensor& level,                 // [N]
    const Tensor& xy,                    // [N, 2]
    bool need_pyramid, bool need_xy, bool /*deterministic: always*/) {
  const PointSampleShape shape = check_point_sample(pyramid, batch, level, xy);
  check_point_sample_grad(grad_output, pyramid[0], shape);
  Buckets buckets = sort_points(shape, batch, level);
  const std::vector<Tensor> grad_pyramid = new_pyramid_gradients(pyramid, need_pyramid);
  const Tensor grad_xy = need_xy ? zeros_of(xy, {shape.points, 2}) : empty_of(xy, {0});
  if (shape.points > 0 && shape.pyramid.channels > 0 && (need_pyramid || need_xy)) {
    dispatch_floating("point_sample_backward", "pyramid", pyramid[0].scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const Tensor coordinates = as_contiguous(xy);
      const PointList<T> list = locate_points<T>(pyramid, std::move(buckets), coordinates);
      run_backward(pyramid, list, as_contiguous(grad_output), coordinates,
                   need_pyramid ? &grad_pyramid : nullptr, need_xy ? &grad_xy : nullptr);
    });
  }
  return {grad_pyramid, grad_xy};
}

}  // namespace
}  // namespace effops::sampling

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("point_sample", TORCH_BOX(&effops::sampling::point_sample));
  m.impl("point_sample_backward", TORCH_BOX(&effops::sampling::point_sample_backward));
}
