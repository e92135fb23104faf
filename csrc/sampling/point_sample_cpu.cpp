// point_sample on the CPU: checks, points, slices. The kernels are in point_sample_cpu_kernel.cpp.
#include "bilinear_math.h"
#include "point_sample.h"
#include "point_sample_cpu_kernel.h"
#include "pyramid_cpu.h"

namespace effops::sampling {
namespace {

constexpr int64_t kBlock = 512;  // points that are located at a time
constexpr int64_t kReadsPerPoint = 4;

// Sorts the points by the image of the map that they read; ids out of range are an error.
Buckets sort_points(const PointSampleShape& shape, const Tensor& batch, const Tensor& level) {
  const Tensor batches = as_contiguous(batch), levels = as_contiguous(level);
  const int64_t* b = batches.const_data_ptr<int64_t>();
  const int64_t* l = levels.const_data_ptr<int64_t>();
  const PyramidShape& p = shape.pyramid;
  return sort_by_image(shape.points, p.levels * p.batch, [&](int64_t n) {
    if (b[n] < 0 || b[n] >= p.batch) fail("point_sample: expected batch in [0, ", p.batch, "), got ", b[n]);
    if (l[n] < 0 || l[n] >= p.levels) fail("point_sample: expected level in [0, ", p.levels, "), got ", l[n]);
    return l[n] * p.batch + b[n];
  });
}

template <typename A>
A pixel_coordinate(A unit, int64_t side) {
  return unit * static_cast<A>(side) - A(0.5);
}

template <typename A>
int32_t floor_to_int(A x) {  // of an active point
  const int32_t truncated = static_cast<int32_t>(x);
  return truncated - (static_cast<A>(truncated) > x ? 1 : 0);
}

template <typename A>
LocatedPoint<A> locate(int64_t row, A x, A y, int32_t height, int32_t width) {
  LocatedPoint<A> point{row, 0, 0, 0, {}};
  if (!is_active(x, y, height, width)) return point;
  const Corners<A> corners = corners_at(x, y, height, width);
  corner_weights(corners, point.weight);
  point.x0 = floor_to_int(x);
  point.y0 = floor_to_int(y);
  for (int k = 0; k < 4; ++k) point.inside |= static_cast<uint32_t>(corners.valid[k]) << k;
  return point;
}

// Calls f(coordinates in their own type).
template <typename T, typename F>
void with_coordinates(const Tensor& xy, const F& f) {
  if (xy.scalar_type() == ScalarType::Float) {
    f(static_cast<const float*>(xy.const_data_ptr()));
  } else {
    f(static_cast<const T*>(xy.const_data_ptr()));
  }
}

// The points in the order of their images, located when they are needed: there may be millions.
template <typename T>
struct Points {
  using A = accumulator_t<T>;
  const std::vector<Tensor>& pyramid;
  Buckets buckets;
  Tensor xy;  // [N, 2], contiguous

  // Calls f(points, first place, count) for blocks of the places [begin, end), all on one map.
  template <typename F>
  void for_blocks(int64_t level, int64_t begin, int64_t end, const F& f) const {
    const auto height = static_cast<int32_t>(pyramid[level].size(2));
    const auto width = static_cast<int32_t>(pyramid[level].size(3));
    LocatedPoint<A> block[kBlock];
    with_coordinates<T>(xy, [&](const auto* coordinates) {
      for (int64_t first = begin; first < end; first += kBlock) {
        const int64_t count = std::min(kBlock, end - first);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = buckets.item(first + i);
          const A x = pixel_coordinate<A>(static_cast<A>(widen(coordinates[2 * row])), width);
          const A y = pixel_coordinate<A>(static_cast<A>(widen(coordinates[2 * row + 1])), height);
          block[i] = locate(row, x, y, height, width);
        }
        f(static_cast<const LocatedPoint<A>*>(block), first, count);
      }
    });
  }

  PyramidRunner runner() const {
    return {pyramid, buckets, StridedChannels::kOneByOne,
            [](int64_t begin, int64_t end) { return kReadsPerPoint * (end - begin); }};
  }
};

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
    const Points<T> points{pyramid, std::move(buckets), as_contiguous(xy)};
    const auto forward =
        point_sample_kernels().forward[static_cast<int>(float_type_of(output.scalar_type()))];
    points.runner().read(kBlock, [&](const SliceUnit& unit, int64_t begin, int64_t end) {
      points.for_blocks(unit.level, begin, end, [&](const auto* block, int64_t, int64_t count) {
        forward(unit.slice, block, count, {out, unit.first_channel, channels});
      });
    });
  });
  return output;
}

// grad_xy[n] = (W, H) * slopes of <g, v>, from the dot products of g with the corners, of which there is
// one part per slice of channels, `part` elements apart.
template <typename T, typename Coordinate>
void finish_points(const Points<T>& points, const LocatedPoint<accumulator_t<T>>* block, int64_t level,
                   int64_t count, const accumulator_t<T>* dots, int64_t slices, int64_t part,
                   const Coordinate* xy, Coordinate* grad_xy) {
  using A = accumulator_t<T>;
  using C = accumulator_t<Coordinate>;
  const int64_t height = points.pyramid[level].size(2), width = points.pyramid[level].size(3);
  for (int64_t i = 0; i < count; ++i) {
    const LocatedPoint<A>& point = block[i];
    A values[4] = {}, dx = 0, dy = 0;
    for (int64_t s = 0; s < slices; ++s) {
      for (int k = 0; k < 4; ++k) values[k] += dots[s * part + 4 * i + k];
    }
    if (point.inside != 0) {
      const A x = pixel_coordinate<A>(static_cast<A>(widen(xy[2 * point.row])), width);
      const A y = pixel_coordinate<A>(static_cast<A>(widen(xy[2 * point.row + 1])), height);
      Corners<A> corners{};
      corners.fx = x - static_cast<A>(point.x0);
      corners.fy = y - static_cast<A>(point.y0);
      corner_slopes(corners, values, dx, dy);
    }
    grad_xy[2 * point.row] = narrow<Coordinate>(static_cast<C>(static_cast<A>(width) * dx));
    grad_xy[2 * point.row + 1] = narrow<Coordinate>(static_cast<C>(static_cast<A>(height) * dy));
  }
}

template <typename T>
void run_scatter(const Points<T>& points, const Tensor& grad_output,  // [N, C]
                 const std::vector<Tensor>& grad_pyramid) {
  const auto scatter =
      point_sample_kernels().scatter[static_cast<int>(float_type_of(grad_output.scalar_type()))];
  void* grad = const_cast<void*>(grad_output.const_data_ptr());
  points.runner().template sum<T>(grad_pyramid, [&](const SliceUnit& unit, const SumSlice& sums) {
    points.for_blocks(unit.level, unit.begin, unit.end, [&](const auto* block, int64_t, int64_t count) {
      scatter(sums, block, count, {grad, unit.first_channel, grad_output.size(1)});
    });
  });
}

template <typename T>
void run_points(const Points<T>& points, const Tensor& grad_output,  // [N, C]
                const Tensor& grad_xy) {                             // [N, 2]
  using A = accumulator_t<T>;
  const auto dots = point_sample_kernels().dots[static_cast<int>(float_type_of(grad_output.scalar_type()))];
  void* grad = const_cast<void*>(grad_output.const_data_ptr());
  const PyramidRunner runner = points.runner();
  const int64_t slices = runner.slices(), part = 4 * grad_output.size(0);
  std::vector<A> parts(slices > 1 ? slices * part : 0, A(0));
  const auto finish = [&](const auto* block, int64_t level, int64_t count, const A* products) {
    with_coordinates<T>(points.xy, [&](const auto* xy) {
      using Coordinate = std::remove_const_t<std::remove_pointer_t<decltype(xy)>>;
      finish_points<T, Coordinate>(points, block, level, count, products, slices, part, xy,
                                   static_cast<Coordinate*>(grad_xy.mutable_data_ptr()));
    });
  };
  runner.read(kBlock, [&](const SliceUnit& unit, int64_t begin, int64_t end) {
    points.for_blocks(unit.level, begin, end, [&](const auto* block, int64_t first, int64_t count) {
      const PointRows rows{grad, unit.first_channel, grad_output.size(1)};
      if (slices > 1) return dots(unit.slice, block, count, rows, &parts[unit.index * part + 4 * first]);
      A products[4 * kBlock] = {};
      dots(unit.slice, block, count, rows, products);
      finish(block, unit.level, count, products);
    });
  });
  if (slices == 1) return;
  const int64_t batch = points.pyramid[0].size(0),
                images = static_cast<int64_t>(points.buckets.begin.size()) - 1;
  parallel_for(images, 1, [&](int64_t image_begin, int64_t image_end) {
    for (int64_t m = image_begin; m < image_end; ++m) {
      const int64_t begin = points.buckets.begin[m], end = points.buckets.begin[m + 1];
      points.for_blocks(m / batch, begin, end, [&](const auto* block, int64_t first, int64_t count) {
        finish(block, m / batch, count, &parts[4 * first]);
      });
    }
  });
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
      const Points<T> points{pyramid, std::move(buckets), as_contiguous(xy)};
      const Tensor gradient = as_contiguous(grad_output);
      if (need_pyramid) run_scatter(points, gradient, grad_pyramid);
      if (need_xy) run_points(points, gradient, grad_xy);
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
