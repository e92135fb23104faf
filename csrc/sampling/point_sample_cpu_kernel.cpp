// Bilinear samples of a pyramid on the CPU.
//
//   out[n] = sum over corners k inside the map of w_k * map[y_k, x_k]
//   grad_map[y_k, x_k] += w_k * g[n],  dots[n, k] = <g[n], map[y_k, x_k]>  (slopes give grad_xy)
//
// Parallelism: the caller splits (slice of channels, points) forward and for the dots, (slice, rows) for
// the scatter. Lanes are channels of packed maps; channels of others are taken one by one, and for each of
// them all points of the task, so that the reads stay within one plane.
// Bytes: each point reads 4 rows of C channels. Bound by cache bandwidth, or latency for strided maps.
#include "point_sample_cpu_kernel.h"
#include "lanes_cpu.h"

namespace effops::sampling::EFFOPS_ISA {
namespace {

constexpr uint32_t kAllInside = 15;

template <typename T>
using Point = LocatedPoint<accumulator_t<T>>;

// Calls f(k, element offset) for the corners inside the map.
template <typename P, typename F>
EFFOPS_INLINE void for_corners(const P& point, int64_t row_stride, int64_t pixel_stride, const F& f) {
  const int64_t first = point.y0 * row_stride + point.x0 * pixel_stride;
  for (int k = 0; k < 4; ++k) {
    if (point.inside >> k & 1) f(k, first + (k >> 1) * row_stride + (k & 1) * pixel_stride);
  }
}

// N registers (or one scalar) of channels of one point.
template <typename Lanes, int N, typename P, typename T = typename Lanes::Storage>
EFFOPS_INLINE void sample_point(const P& point, const T* data, int64_t row_stride, int64_t pixel_stride,
                                typename Lanes::V (&sums)[N]) {
  using V = typename Lanes::V;
  const auto add = [&](int k, int64_t offset) {
    const V weight = Lanes::all(point.weight[k]);
    for (int n = 0; n < N; ++n) sums[n] += weight * Lanes::load_storage(data + offset + n * Lanes::lanes);
  };
  if (point.inside == kAllInside) {
    const int64_t first = point.y0 * row_stride + point.x0 * pixel_stride;
    add(0, first);
    add(1, first + pixel_stride);
    add(2, first + row_stride);
    add(3, first + row_stride + pixel_stride);
  } else {
    for_corners(point, row_stride, pixel_stride, add);
  }
}

template <typename T>
void forward(const MapSlice& map, const void* points, int64_t count, const PointRows& output) {
  using A = accumulator_t<T>;
  const auto* first = static_cast<const Point<T>*>(points);
  const T* data = static_cast<const T*>(map.data);
  T* out = static_cast<T*>(output.data) + output.first_channel;
  if (map.padded == 0) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t i = 0; i < count; ++i) {
        A sum[1] = {};
        sample_point<ScalarLanes<T>>(first[i], data + c * map.channel_stride, map.row_stride,
                                     map.pixel_stride, sum);
        out[first[i].row * output.total_channels + c] = narrow<T>(sum[0]);
      }
    }
    return;
  }
  using Lanes = VectorLanes<T>;
  for (int64_t i = 0; i < count; ++i) {
    T* row = out + first[i].row * output.total_channels;
    for_registers<Lanes::lanes>(map.padded, [&](auto registers, int64_t channel) {
      constexpr int n = decltype(registers)::count, width = n * Lanes::lanes;
      typename Lanes::V sums[n] = {};
      sample_point<Lanes>(first[i], data + channel, map.row_stride, map.pixel_stride, sums);
      A results[width];
      for (int r = 0; r < n; ++r) store(results + r * Lanes::lanes, sums[r]);
      const int64_t left = map.channels - channel;
      if (left >= width) {
        for (int c = 0; c < width; ++c) row[channel + c] = narrow<T>(results[c]);
      } else {
        for (int64_t c = 0; c < left; ++c) row[channel + c] = narrow<T>(results[c]);
      }
    });
  }
}

// N registers of a row of `channels` channels, zeros after its end.
template <typename T, int N>
EFFOPS_INLINE void load_row(const T* row, int64_t channels, typename Vec<accumulator_t<T>>::type (&g)[N]) {
  constexpr int lanes = Vec<accumulator_t<T>>::lanes;
  T copy[N * lanes] = {};
  if (channels < N * lanes) {
    for (int64_t c = 0; c < channels; ++c) copy[c] = row[c];
    row = copy;
  }
  for (int n = 0; n < N; ++n) g[n] = load_wide(row + n * lanes);
}

template <typename T>
void dots(const MapSlice& map, const void* points, int64_t count, const PointRows& grad_output, void* dots) {
  using A = accumulator_t<T>;
  const auto* first = static_cast<const Point<T>*>(points);
  const T* data = static_cast<const T*>(map.data);
  const T* grad = static_cast<const T*>(grad_output.data) + grad_output.first_channel;
  A* totals = static_cast<A*>(dots);
  if (map.padded == 0) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t i = 0; i < count; ++i) {
        const A g = widen(grad[first[i].row * grad_output.total_channels + c]);
        for_corners(first[i], map.row_stride, map.pixel_stride, [&](int k, int64_t offset) {
          totals[4 * i + k] += g * widen(data[c * map.channel_stride + offset]);
        });
      }
    }
    return;
  }
  using Lanes = VectorLanes<T>;
  using V = typename Lanes::V;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = grad + first[i].row * grad_output.total_channels;
    V sums[4] = {};
    for_registers<Lanes::lanes>(map.padded, [&](auto registers, int64_t channel) {
      constexpr int n = decltype(registers)::count;
      V g[n];
      load_row<T, n>(row + channel, map.channels - channel, g);
      for_corners(first[i], map.row_stride, map.pixel_stride, [&](int k, int64_t offset) {
        const T* corner = data + channel + offset;
        for (int r = 0; r < n; ++r) sums[k] += g[r] * load_wide(corner + r * Lanes::lanes);
      });
    });
    add_sums(sums[0], sums[1], sums[2], sums[3], totals + 4 * i);
  }
}

// Adds weight * g to the corners of a point that lie in the rows of `sums`.
template <typename Lanes, int N, typename P>
EFFOPS_INLINE void scatter_point(const P& point, const SumSlice& sums, int64_t channel,
                                 const typename Lanes::V (&g)[N]) {
  using A = typename Lanes::A;
  A* data = static_cast<A*>(sums.data) + channel - sums.row_begin * sums.row_stride;
  for_corners(point, sums.row_stride, sums.pixel_stride, [&](int k, int64_t offset) {
    const int64_t y = point.y0 + (k >> 1);
    if (y < sums.row_begin || y >= sums.row_end) return;
    const auto weight = Lanes::all(point.weight[k]);
    for (int n = 0; n < N; ++n) {
      A* target = data + offset + n * Lanes::lanes;
      Lanes::store_sums(target, Lanes::load_sums(target) + weight * g[n]);
    }
  });
}

template <typename T>
void scatter(const SumSlice& sums, const void* points, int64_t count, const PointRows& grad_output) {
  using A = accumulator_t<T>;
  const auto* first = static_cast<const Point<T>*>(points);
  const T* grad = static_cast<const T*>(grad_output.data) + grad_output.first_channel;
  for (int64_t i = 0; i < count; ++i) {
    if (first[i].inside == 0 || first[i].y0 >= sums.row_end || first[i].y0 + 1 < sums.row_begin) continue;
    const T* row = grad + first[i].row * grad_output.total_channels;
    if (sums.padded == 0) {
      const A g[1] = {widen(*row)};
      scatter_point<ScalarLanes<T>>(first[i], sums, 0, g);
      continue;
    }
    using Lanes = VectorLanes<T>;
    for_registers<Lanes::lanes>(sums.padded, [&](auto registers, int64_t channel) {
      constexpr int n = decltype(registers)::count;
      typename Lanes::V g[n];
      load_row<T, n>(row + channel, sums.channels - channel, g);
      scatter_point<Lanes>(first[i], sums, channel, g);
    });
  }
}

}  // namespace

extern const PointSampleKernels point_sample_kernels = {
    {&forward<float>, &forward<double>, &forward<bf16>, &forward<f16>},
    {&dots<float>, &dots<double>, &dots<bf16>, &dots<f16>},
    {&scatter<float>, &scatter<double>, &scatter<bf16>, &scatter<f16>},
};

}  // namespace effops::sampling::EFFOPS_ISA
