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
// are issued before the first use. Inactive points are not read: 0 * NaN is not 0.
template <int kPoints, typename T, int kVector, bool kWide, typename A>
EFFOPS_DEVICE void add_points(const SharedPoint<A, kWide>& own, int source, const T* value,
                              uint64_t row_stride, bool has_channels, A (&sums)[kVector]) {
  SharedPoint<A, kWide> points[kPoints];
  Pack<T, kVector> corners[kPoints][4];
#pragma unroll
  for (int u = 0; u < kPoints; ++u) points[u] = own.from_lane(source + u);
#pragma unroll
  for (int u = 0; u < kPoints; ++u) {
    const bool wanted = points[u].rows.active() && has_channels;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      corners[u][k] = load_pack_if<kVector>(wanted, value + points[u].rows.row(k) * row_stride);
    }
  }
#pragma unroll
  for (int u = 0; u < kPoints; ++u) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        sums[c] += points[u].weight[k] * widen(corners[u][k].data[c]);
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
// first-level cache: bound by that cache. bfloat16: 31 us and 49 us.
// Limits: L P < 2^31; with kVector > 1 those of fits_vector_kernels and 16-byte aligned arrays.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks) ms_deform_attn_forward_kernel(ForwardArguments<T> arguments) {
  constexpr bool kWide = kVector == 1;
  using A = accumulator_t<T>;
  EFFOPS_DYNAMIC_SHARED(Level, levels);
  fill_levels(arguments.points.pyramid, levels);
  const Tiling& tiling = arguments.tiling;
  const int lanes = 1 << tiling.lanes_log2;
  const int total_points = arguments.points.total_points;
  const auto row_stride = static_cast<place_index_t<kWide>>(tiling.heads * tiling.channels);
  for (int64_t work = blockIdx.x; work < tiling.works; work += gridDim.x) {
    const Place<place_index_t<kWide>> place(tiling, work);
    const int64_t query_index = place.query_index(tiling);
    const bool has_query = place.query < tiling.queries;
    for (int64_t channel = place.group_lane * kVector; channel - place.group_lane * kVector < tiling.channels;
         channel += lanes * kVector) {
      const T* value = arguments.value + channel + static_cast<int64_t>(place.head) * tiling.channels +
                       static_cast<int64_t>(place.image) * arguments.points.pyramid.rows * row_stride;
      const bool has_channels = channel < tiling.channels;
      A sums[kVector] = {};
      for (int32_t first = 0; first < total_points; first += lanes) {
        SharedPoint<A, kWide> own;
        PointDetails<A> details;
        const int32_t index = first + place.group_lane;
        locate_point(arguments.points, levels, query_index * total_points, index,
                     has_query && index < total_points, own, details);
        const int count = total_points - first < lanes ? total_points - first : lanes;
        for (int j = 0; j < count; j += 2) {
          add_points<2>(own, place.first_lane + j, value, row_stride, has_channels, sums);
        }
      }
      if (has_query && has_channels) {
        Pack<T, kVector> result;
#pragma unroll
        for (int c = 0; c < kVector; ++c) result.data[c] = narrow<T>(sums[c]);
        store_pack_once(arguments.output + query_index * tiling.channels + channel, result);
      }
    }
  }
}

}  // namespace effops::sampling
