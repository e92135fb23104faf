// Forward kernel of ms_deform_attn. No torch, no launches.
#pragma once

#include "ms_deform_attn_kernels.cuh"

namespace effops::sampling {

template <typename T>
struct ForwardArguments {
  PointArguments<T> points;
  Tiling tiling;
  const T* value;  // [B, S, M, D]
  T* output;       // [B, Q, M * D]
};

// sums += the values at `kPoints` points, received from the lanes `source`, `source + 1`, ... All loads
// are issued before the first use. Inactive points are skipped, not weighted by 0: 0 * NaN is NaN.
template <int kPoints, typename T, int kVector, typename A>
EFFOPS_DEVICE void add_points(const SharedPoint<A>& own, int source, const T* value, uint32_t row_bytes,
                              bool has_channels, A (&sums)[kVector]) {
  SharedPoint<A> points[kPoints];
  Pack<T, kVector> corners[kPoints][4];
  bool wanted[kPoints];
#pragma unroll
  for (int u = 0; u < kPoints; ++u) {
    points[u] = own.from_lane(source + u);
    wanted[u] = points[u].rows.active() && has_channels;
  }
#pragma unroll
  for (int u = 0; u < kPoints; ++u) {
    if (wanted[u]) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        corners[u][k] = load_pack<kVector>(row_address(value, points[u].rows.row(k), row_bytes));
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kPoints; ++u) {
    if (wanted[u]) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        A corner[kVector];
        widen_pack(corners[u][k], corner);
#pragma unroll
        for (int c = 0; c < kVector; ++c) sums[c] += points[u].weight[k] * corner[c];
      }
    }
  }
}

// output[b, q, m, :] = sum over levels and points of attention * bilinear(value[b, level, m, :], location).
//
// Parallelism: see the head of ms_deform_attn_kernels.cuh; more channels than 32 * kVector take several
// turns, which locate the points again. Two points, eight loads, in flight per lane.
// Bytes: B S M D e_value + B Q M (L P (2 e_location + e_weight) + D e_value) compulsory, 4 B Q M L P D
// e_value through the first-level cache. Example: B = 2, Q = S = 22223, M = 8, D = 32, L = P = 4 on an
// H100 (132 SM at 1.755 GHz): 159 MB and 2.91 GB in float32, 48 us of device memory and 98 us of
// first-level cache, and about 53 instructions per point and warp, 100 us of issue slots: bound by that
// cache and by issue. bfloat16: 31 us, 49 us and 100 us (112 instructions, but twice the queries per warp).
// Limits: fits_kernels; with kVector > 1 also D % kVector == 0, 16-byte aligned arrays and a grid of
// tiling.works blocks.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    ms_deform_attn_forward_kernel(ForwardArguments<T> arguments) {
  using A = accumulator_t<T>;
  EFFOPS_DYNAMIC_SHARED(Level, levels);
  fill_levels(arguments.points.pyramid, levels);
  const Tiling& tiling = arguments.tiling;
  const int lanes = 1 << tiling.lanes_log2, total_points = arguments.points.total_points;
  const int64_t row_elements = tiling.heads * tiling.channels;
  int64_t work = blockIdx.x;
  do {
    const Place<work_index_t<kVector>> place(tiling, static_cast<work_index_t<kVector>>(work));
    const bool has_query = place.query < tiling.queries;
    const T* image = arguments.value + place.image * arguments.points.pyramid.rows * row_elements;
    for (int32_t turn = 0; turn < tiling.channels; turn += lanes * kVector) {
      const int32_t channel = turn + place.group_lane * kVector;
      const bool has_channels = channel < tiling.channels;
      const T* value = image + place.head * tiling.channels + channel;
      A sums[kVector] = {};
      for (int32_t first = 0; first < total_points; first += lanes) {
        SharedPoint<A> own;
        PointDetails<A> details;
        const int32_t index = first + place.group_lane;
        locate_point(arguments.points, levels, place.query_row * total_points, index,
                     has_query && index < total_points, own, details);
        share_border_weights(own.rows.two_columns(), own.rows.two_rows(), own.weight);
        const int end = place.first_lane + (total_points - first < lanes ? total_points - first : lanes);
        for (int source = place.first_lane; source < end; source += 2) {
          add_points<2>(own, source, value, tiling.row_bytes, has_channels, sums);
        }
      }
      if (has_query && has_channels) {
        Pack<T, kVector> result;
#pragma unroll
        for (int c = 0; c < kVector; ++c) result.data[c] = narrow<T>(sums[c]);
        store_pack_once(arguments.output + place.query_row * tiling.channels + channel, result);
      }
    }
    work += gridDim.x;
  } while (kVector == 1 && work < tiling.works);
}

}  // namespace effops::sampling
