// Backward kernel of ms_deform_attn. No torch, no launches.
#pragma once

#include "ms_deform_attn_kernels.cuh"

namespace effops::sampling {

template <typename T>
struct BackwardArguments {
  PointArguments<T> points;
  Tiling tiling;
  const T* value;                // [B, S, M, D]
  const T* grad_output;          // [B, Q, M * D]
  accumulator_t<T>* grad_value;  // [B, S, M, D], zeros at the start
  void* grad_locations;          // in the type of locations, or null: not needed
  void* grad_weights;            // in the type of weights, or null: not needed
};

// What a lane knows about its query and channels.
template <typename T>
struct LaneView {
  const T* value;                // row 0 of the lane's image and head, first channel of the group
  accumulator_t<T>* grad_value;  // the same element
  const T* grad_output;          // first channel of the query and head
  uint32_t row_bytes;            // of value
  int32_t channels;
  int group_lane, lanes;
  bool has_query;
};

template <typename T, int kVector>
EFFOPS_DEVICE void load_gradient(const LaneView<T>& view, int32_t channel,
                                 accumulator_t<T> (&gradient)[kVector]) {
  Pack<T, kVector> pack{};
  if (view.has_query && channel < view.channels) pack = load_pack<kVector>(view.grad_output + channel);
  widen_pack(pack, gradient);
}

// Two points, one pack of channels: adds to dots[u][k] the product of the gradient with corner k of point
// u, and adds the corners' gradients to grad_value. Corners outside the level and inactive points take no
// part: 0 * Inf is not 0.
template <typename T, int kVector, bool kNeedValue, bool kNeedPoints, typename A = accumulator_t<T>>
EFFOPS_DEVICE void handle_two_points(const SharedPoint<A> (&points)[2], const LaneView<T>& view,
                                     int32_t channel, const A (&gradient)[kVector], A (&dots)[2][4]) {
  const bool has_channels = channel < view.channels;
  Pack<T, kVector> corners[2][4];
  if constexpr (kNeedPoints) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if (!points[u].rows.active() || !has_channels) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        corners[u][k] =
            load_pack<kVector>(row_address(view.value + channel, points[u].rows.row(k), view.row_bytes));
      }
    }
  }
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    if (!points[u].rows.active() || !has_channels) continue;
    bool valid[4];
    points[u].rows.valid_corners(valid);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (kNeedPoints) {
        A corner[kVector];
        widen_pack(corners[u][k], corner);
#pragma unroll
        for (int c = 0; c < kVector; ++c) dots[u][k] += gradient[c] * corner[c];
      }
      if (kNeedValue && valid[k]) {
        A update[kVector];
#pragma unroll
        for (int c = 0; c < kVector; ++c) update[c] = points[u].weight[k] * gradient[c];
        const uint32_t row_bytes = view.row_bytes / sizeof(T) * sizeof(A);
        add_atomically(row_address(view.grad_value + channel, points[u].rows.row(k), row_bytes), update);
      }
    }
  }
}

// The same over all channels. With kVector > 1 the group covers them at once and the gradient, which all
// points share, is already in registers.
template <typename T, int kVector, bool kNeedValue, bool kNeedPoints, typename A = accumulator_t<T>>
EFFOPS_DEVICE void handle_two_points(const SharedPoint<A>& own, int source, const LaneView<T>& view,
                                     const A (&gradient)[kVector], A (&dots)[2][4]) {
  const SharedPoint<A> points[2] = {own.from_lane(source), own.from_lane(source + 1)};
#pragma unroll
  for (int u = 0; u < 2; ++u) {
#pragma unroll
    for (int k = 0; k < 4; ++k) dots[u][k] = A(0);
  }
  if constexpr (kVector > 1) {
    handle_two_points<T, kVector, kNeedValue, kNeedPoints>(points, view, view.group_lane * kVector, gradient,
                                                           dots);
  } else {
    for (int32_t channel = view.group_lane; channel < view.channels; channel += view.lanes) {
      A loaded[1];
      load_gradient(view, channel, loaded);
      handle_two_points<T, 1, kNeedValue, kNeedPoints>(points, view, channel, loaded, dots);
    }
  }
}

// Four points from lane `source` on. Lane i of the group ends with the sums over the group of the four
// corner products of point i % 4: the first two steps of the reduction transpose, so that each exchange
// serves two points.
template <typename T, int kVector, bool kNeedValue, bool kNeedPoints, typename A = accumulator_t<T>>
EFFOPS_DEVICE void handle_four_points(const SharedPoint<A>& own, int source, const LaneView<T>& view,
                                      const A (&gradient)[kVector], A (&sums)[4]) {
  A dots[2][4], pairs[2][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    handle_two_points<T, kVector, kNeedValue, kNeedPoints>(own, source + 2 * half, view, gradient, dots);
    if constexpr (kNeedPoints) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        pairs[half][k] = transpose_add(dots[0][k], dots[1][k], 1, view.group_lane);
      }
    }
  }
  if constexpr (kNeedPoints) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sums[k] = transpose_add(pairs[0][k], pairs[1][k], 2, view.group_lane);
      for (int offset = 4; offset < view.lanes; offset *= 2) {
        sums[k] += __shfl_xor_sync(kFullWarp, sums[k], offset);
      }
    }
  }
}

template <typename T>
EFFOPS_DEVICE void store_scalar(void* data, bool as_value, int64_t index, accumulator_t<T> value) {
  if (as_value) {
    store_pack_once(static_cast<T*>(data) + index, Pack<T, 1>{{narrow<T>(value)}});
  } else {
    store_pack_once(static_cast<float*>(data) + index, Pack<float, 1>{{static_cast<float>(value)}});
  }
}

// Gradients of a point from dots[k] = <grad_output, value at corner k>: that of the weight is the
// interpolation of the dots, that of the location attention times their slope, in level widths.
template <typename T, typename A = accumulator_t<T>>
EFFOPS_DEVICE void store_point_gradients(const BackwardArguments<T>& arguments, int64_t point_index,
                                         const CornerRows& rows, const PointDetails<A>& details,
                                         const A (&dots)[4]) {
  Corners<A> corners;
  corners.fx = details.fx;
  corners.fy = details.fy;
  rows.valid_corners(corners.valid);
  A weight[4], inside[4], grad_weight = A(0), slope_x, slope_y;
  corner_weights(corners, weight);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    inside[k] = corners.valid[k] ? dots[k] : A(0);
    grad_weight += weight[k] * inside[k];
  }
  corner_slopes(corners, inside, slope_x, slope_y);
  const bool active = rows.active();
  const PointArguments<T>& points = arguments.points;
  if (arguments.grad_weights) {
    store_scalar<T>(arguments.grad_weights, points.weights_as_value, point_index,
                    active ? grad_weight : A(0));
  }
  if (arguments.grad_locations) {
    const A grad_x = active ? details.width * details.attention * slope_x : A(0);
    const A grad_y = active ? details.height * details.attention * slope_y : A(0);
    if (points.locations_as_value) {
      store_pack_once(static_cast<T*>(arguments.grad_locations) + 2 * point_index,
                      Pack<T, 2>{{narrow<T>(grad_x), narrow<T>(grad_y)}});
    } else {
      store_pack_once(static_cast<float*>(arguments.grad_locations) + 2 * point_index,
                      Pack<float, 2>{{static_cast<float>(grad_x), static_cast<float>(grad_y)}});
    }
  }
}

// With g = grad_output[b, q, m, :] and corner k of a point at row r_k with weight w_k:
//   grad_value[b, r_k, m, :] += attention * w_k * g
//   d_k = <g, value[b, r_k, m, :]>,  grad_weight = sum_k w_k d_k
//   grad_x = width * attention * d(sum_k w_k d_k)/dx, grad_y likewise
// Every element of grad_locations and grad_weights is written. kNeedPoints: at least one of the two.
//
// Parallelism: as forward, with groups of at least 4 lanes; the products of 4 points are reduced over the
// group together (4 exchanges per point for 8 lanes, 12 for a plain butterfly), and land in the lane that
// located the point. grad_value is added atomically: vectors of 4 floats from sm_90 on.
// Bytes: forward's, and grad_output, grad_locations, grad_weights; 4 B Q M L P D e_accumulator of atomic
// additions in the second-level cache. Example (see forward), float32: 250 MB compulsory = 75 us, gather
// 98 us, 182 M additions of 16 bytes (2.91 GB). Expected to be bound by these additions; not measured.
// Limits: those of forward, with kVector > 1 also D <= 32 * kVector. The order of the atomic additions,
// and with it the last bits of grad_value, change from run to run.
template <typename T, int kVector, bool kNeedValue, bool kNeedPoints>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    ms_deform_attn_backward_kernel(BackwardArguments<T> arguments) {
  using A = accumulator_t<T>;
  EFFOPS_DYNAMIC_SHARED(Level, levels);
  fill_levels(arguments.points.pyramid, levels);
  const Tiling& tiling = arguments.tiling;
  const int lanes = 1 << tiling.lanes_log2, total_points = arguments.points.total_points;
  int64_t work = blockIdx.x;
  do {
    const Place<work_index_t<kVector>> place(tiling, static_cast<work_index_t<kVector>>(work));
    const bool has_query = place.query < tiling.queries;
    const int64_t slice = (place.image * arguments.points.pyramid.rows * tiling.heads + place.head) *
                          tiling.channels;
    const LaneView<T> view{arguments.value + slice,
                           kNeedValue ? arguments.grad_value + slice : nullptr,
                           arguments.grad_output + place.query_row * tiling.channels,
                           tiling.row_bytes,
                           tiling.channels,
                           place.group_lane,
                           lanes,
                           has_query};
    A gradient[kVector] = {};
    if constexpr (kVector > 1) load_gradient(view, place.group_lane * kVector, gradient);
    for (int32_t first = 0; first < total_points; first += lanes) {
      SharedPoint<A> own;
      PointDetails<A> details;
      const int32_t index = first + place.group_lane;
      const bool exists = has_query && index < total_points;
      locate_point(arguments.points, levels, place.query_row * total_points, index, exists, own, details);
      const int count = total_points - first < lanes ? total_points - first : lanes;
      A own_dots[4] = {};
      for (int j = 0; j < count; j += 4) {
        A sums[4] = {};
        handle_four_points<T, kVector, kNeedValue, kNeedPoints>(own, place.first_lane + j, view, gradient,
                                                                sums);
        if (place.group_lane >> 2 == j >> 2) {
#pragma unroll
          for (int k = 0; k < 4; ++k) own_dots[k] = sums[k];
        }
      }
      if (kNeedPoints && exists) {
        store_point_gradients(arguments, place.query_row * total_points + index, own.rows, details, own_dots);
      }
    }
    work += gridDim.x;
  } while (kVector == 1 && work < tiling.works);
}

}  // namespace effops::sampling
