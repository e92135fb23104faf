// Multi-scale deformable attention on the CPU.
//
//   out[b, q, m] = sum over l, p of weights[b, q, m, l, p] * bilinear(value of level l, locations[...])
//   grad_weights = <g, v(x, y)>,  grad_locations = weights * size * <g, dv/d(x, y)>,
//   grad_value[corner] += weights * corner_weight * g
//
// Parallelism: the caller splits (image, head, queries) forward and (image, head, level) backward; lanes
// are points while addresses are computed (point_tile_cpu.h) and channels while values are summed.
// Bytes: each point reads 4 rows of D channels; backward also reads, adds to and writes 4 rows of
// accumulators. Bound by second- and third-level cache bandwidth: rows of one image and head are packed
// next to each other, because heads lie M * D apart in `value` and would use 1 / M of the cache sets.
// Limits: H * W < 2^31 per level (2^63 for float64), sides < 2^24.
#include "lanes_cpu.h"
#include "point_tile_cpu.h"

namespace effops::sampling::EFFOPS_ISA {
namespace {

inline int64_t scratch_bytes(const MsDeformAttnShape& shape) {
  return tile_capacity(shape) * kTileArrays * int64_t{sizeof(double)};
}

template <typename T>
constexpr int lanes_of() {
  return Vec<accumulator_t<T>>::lanes;
}

// ---------------------------------------------------------------------------------------- pack, unpack

template <typename T>
void pack(const StridedRows& source, int64_t begin, int64_t end, int64_t channels, int64_t padded,
          void* target) {
  for (int64_t row = begin; row < end; ++row) {
    const T* from = static_cast<const T*>(source.data) + row * source.row_stride;
    T* to = static_cast<T*>(target) + row * padded;
    prefetch(from, kPrefetchDistance * source.row_stride);
    if (source.channel_stride == 1) {
      for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
    } else {
      for (int64_t c = 0; c < channels; ++c) to[c] = from[c * source.channel_stride];
    }
    for (int64_t c = channels; c < padded; ++c) to[c] = T{};
  }
}

template <typename T>
void unpack(const void* source, int64_t begin, int64_t end, int64_t channels, int64_t padded,
            int64_t row_stride, void* target) {
  for (int64_t row = begin; row < end; ++row) {
    const auto* from = static_cast<const accumulator_t<T>*>(source) + row * padded;
    T* to = static_cast<T*>(target) + row * row_stride;
    for (int64_t c = 0; c < channels; ++c) to[c] = narrow<T>(from[c]);
  }
}

// ---------------------------------------------------------------------------------------- forward

// Sums all points of one query over N registers of channels, starting at channel `channel`.
template <typename T, int N>
EFFOPS_INLINE void sum_points(const PointTile<accumulator_t<T>>& tile, const PointInputs& inputs,
                              const ValueSlice& value, int64_t first, int64_t channel, T* output,
                              int64_t count) {
  using Acc = accumulator_t<T>;
  using V = typename Vec<Acc>::type;
  constexpr int lanes = Vec<Acc>::lanes;
  V upper[N] = {}, lower[N] = {};  // two chains of additions hide the latency of one
  int64_t i = first;
  for (int64_t l = 0; l < inputs.shape.levels; ++l) {
    const T* rows = static_cast<const T*>(value.rows) + inputs.levels[l].start * value.row_stride + channel;
    for (const int64_t end = i + inputs.shape.points; i < end; ++i) {
      if (tile.row[0][i] < 0) continue;
      const T* corner[4];
      V weight[4];
      for (int k = 0; k < 4; ++k) {
        corner[k] = rows + tile.row[k][i] * value.row_stride;
        weight[k] = broadcast(tile.weight[k][i]);
      }
      for (int n = 0; n < N; ++n) {
        upper[n] += weight[0] * load_wide(corner[0] + n * lanes);
        lower[n] += weight[2] * load_wide(corner[2] + n * lanes);
        upper[n] += weight[1] * load_wide(corner[1] + n * lanes);
        lower[n] += weight[3] * load_wide(corner[3] + n * lanes);
      }
    }
  }
  Acc sums[N * lanes];
  for (int n = 0; n < N; ++n) store(sums + n * lanes, upper[n] + lower[n]);
  if (count >= N * lanes) {
    for (int c = 0; c < N * lanes; ++c) output[c] = narrow<T>(sums[c]);
  } else {
    for (int64_t c = 0; c < count; ++c) output[c] = narrow<T>(sums[c]);
  }
}

template <typename T>
void forward(const PointInputs& inputs, const ValueSlice& value, const QueryRange& range, void* output,
             void* scratch) {
  using Acc = accumulator_t<T>;
  constexpr int lanes = lanes_of<T>();
  const MsDeformAttnShape& s = inputs.shape;
  PointTile<Acc> tile = make_tile<Acc>(s, scratch);
  const auto [per_query, step] = prepare_tiles(tile, inputs, range);
  for (int64_t begin = range.begin; begin < range.end; begin += step) {
    const int64_t queries = begin + step < range.end ? step : range.end - begin;
    read_points(tile, inputs, range, begin, queries);
    locate_corners(tile, queries * per_query);
    for (int64_t q = 0; q < queries; ++q) {
      T* out = static_cast<T*>(output) +
               ((range.image * s.queries + begin + q) * s.heads + range.head) * s.channels;
      for_registers<lanes>(value.padded, [&](auto registers, int64_t channel) {
        constexpr int n = decltype(registers)::count;
        sum_points<T, n>(tile, inputs, value, q * per_query, channel, out + channel, s.channels - channel);
      });
    }
  }
}

// ---------------------------------------------------------------------------------------- backward

// What a backward task computes for the points of one query.
struct Needs {
  bool rows, dots;
};

// Asks for the rows of point i. Worth it in backward for rows in place, which lie far apart and mostly miss
// (1.1 to 1.3 times faster); not for packed rows, and not in forward, where the next reads need not wait.
template <typename T>
EFFOPS_INLINE void prefetch_rows(const PointTile<accumulator_t<T>>& tile, int64_t i, const T* rows,
                                 int64_t row_stride) {
  // Unsigned: past the last query the tile holds anything.
  const uint64_t stride = static_cast<uint64_t>(row_stride);
  for (int k = 0; k < 4; ++k)
    prefetch(rows, static_cast<int64_t>(static_cast<uint64_t>(tile.row[k][i]) * stride));
}

// Adds N registers of channels of one query to the dot products of its points and to the rows' gradients.
template <typename T, int N>
EFFOPS_INLINE void scatter_points(PointTile<accumulator_t<T>>& tile, const PointInputs& inputs,
                                  const ValueSlice& value, const PointGradients& gradients, Needs needs,
                                  const QueryRange& range, int64_t first, int64_t channel, const T* grad) {
  using Acc = accumulator_t<T>;
  using V = typename Vec<Acc>::type;
  constexpr int lanes = Vec<Acc>::lanes;
  const bool scattered = value.row_stride != value.padded;
  const int64_t per_query = (range.level_end - range.level_begin) * inputs.shape.points;
  V g[N];
  for (int n = 0; n < N; ++n) g[n] = load_wide(grad + channel + n * lanes);
  int64_t i = first;
  for (int64_t l = range.level_begin; l < range.level_end; ++l) {
    const int64_t start = inputs.levels[l].start;
    const T* rows = static_cast<const T*>(value.rows) + start * value.row_stride + channel;
    Acc* sums = static_cast<Acc*>(gradients.grad_rows) + start * gradients.row_stride + channel;
    for (const int64_t end = i + inputs.shape.points; i < end; ++i) {
      if (scattered) {
        if (needs.dots) prefetch_rows<T>(tile, i + per_query, rows, value.row_stride);
        if (needs.rows) prefetch_rows<Acc>(tile, i + per_query, sums, gradients.row_stride);
      }
      if (tile.row[0][i] < 0) continue;
      if (needs.dots) {
        V dot[4] = {};
        for (int k = 0; k < 4; ++k) {
          const T* corner = rows + tile.row[k][i] * value.row_stride;
          for (int n = 0; n < N; ++n) dot[k] += g[n] * load_wide(corner + n * lanes);
        }
        add_sums(dot[0], dot[1], dot[2], dot[3], tile.dots + 4 * i);
      }
      if (needs.rows) {
        for (int k = 0; k < 4; ++k) {
          Acc* row = sums + tile.row[k][i] * gradients.row_stride;
          const V weight = broadcast(tile.weight[k][i]);
          for (int n = 0; n < N; ++n) store(row + n * lanes, load<V>(row + n * lanes) + weight * g[n]);
        }
      }
    }
  }
}

// Turns the dot products of the tile's points into the gradients of weight, x and y (left in
// tile.attention, x and y, whose inputs are no longer needed).
template <typename Acc>
void finish_points(PointTile<Acc>& tile, int64_t count) {
  using V = typename Vec<Acc>::type;
  for (int64_t i = 0; i < count; i += Vec<Acc>::lanes) {
    const PointVector<Acc> p = locate(tile, i);
    V v[4];
    split_quads(tile.dots + 4 * i, v);
    v[0] = (p.top & p.left) ? v[0] : V{};
    v[1] = (p.top & p.right) ? v[1] : V{};
    v[2] = (p.bottom & p.left) ? v[2] : V{};
    v[3] = (p.bottom & p.right) ? v[3] : V{};
    const V top = p.left_weight * v[0] + p.right_weight * v[1];
    const V bottom = p.left_weight * v[2] + p.right_weight * v[3];
    const V dx = p.top_weight * (v[1] - v[0]) + p.bottom_weight * (v[3] - v[2]);
    const V dy = p.left_weight * (v[2] - v[0]) + p.right_weight * (v[3] - v[1]);
    const V grad_weight = p.top_weight * top + p.bottom_weight * bottom;
    const V grad_x = p.attention * load<V>(tile.width + i) * dx;
    const V grad_y = p.attention * load<V>(tile.height + i) * dy;
    store(tile.attention + i, p.active ? grad_weight : V{});
    store(tile.x + i, p.active ? grad_x : V{});
    store(tile.y + i, p.active ? grad_y : V{});
  }
}

template <typename T, typename Acc>
inline void write_query(const PointTile<Acc>& tile, int64_t from, int64_t count, T* pairs, T* weights) {
  for (int64_t i = 0; pairs != nullptr && i < count; ++i) {
    pairs[2 * i] = narrow<T>(static_cast<accumulator_t<T>>(tile.x[from + i]));
    pairs[2 * i + 1] = narrow<T>(static_cast<accumulator_t<T>>(tile.y[from + i]));
  }
  for (int64_t i = 0; weights != nullptr && i < count; ++i) {
    weights[i] = narrow<T>(static_cast<accumulator_t<T>>(tile.attention[from + i]));
  }
}

template <typename Acc>
void write_point_gradients(const PointTile<Acc>& tile, const PointInputs& inputs,
                           const PointGradients& gradients, const QueryRange& range, int64_t begin,
                           int64_t queries) {
  const int64_t per_query = (range.level_end - range.level_begin) * inputs.shape.points;
  for (int64_t q = 0; q < queries; ++q) {
    const int64_t target = first_point(inputs.shape, range, begin + q), from = q * per_query;
    if (gradients.grad_locations != nullptr) {
      with_type(gradients.grad_locations, inputs.location_type, 2 * target, [&](const auto* p) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
        write_query<T>(tile, from, per_query, const_cast<T*>(p), static_cast<T*>(nullptr));
      });
    }
    if (gradients.grad_weights != nullptr) {
      with_type(gradients.grad_weights, inputs.weight_type, target, [&](const auto* p) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
        write_query<T>(tile, from, per_query, static_cast<T*>(nullptr), const_cast<T*>(p));
      });
    }
  }
}

template <typename T>
void backward(const PointInputs& inputs, const ValueSlice& value, const QueryRange& range,
              const PointGradients& gradients, void* scratch) {
  using Acc = accumulator_t<T>;
  constexpr int lanes = lanes_of<T>();
  const MsDeformAttnShape& s = inputs.shape;
  PointTile<Acc> tile = make_tile<Acc>(s, scratch);
  const auto [per_query, step] = prepare_tiles(tile, inputs, range);
  const Needs needs{gradients.grad_rows != nullptr,
                    gradients.grad_locations != nullptr || gradients.grad_weights != nullptr};
  for (int64_t begin = range.begin; begin < range.end; begin += step) {
    const int64_t queries = begin + step < range.end ? step : range.end - begin;
    read_points(tile, inputs, range, begin, queries);
    locate_corners(tile, queries * per_query);
    if (needs.dots) memset(tile.dots, 0, 4 * queries * per_query * sizeof(Acc));
    for (int64_t q = 0; q < queries; ++q) {
      const T* grad = static_cast<const T*>(gradients.grad_output) + (begin + q) * value.padded;
      for_registers<lanes>(value.padded, [&](auto registers, int64_t channel) {
        constexpr int n = decltype(registers)::count;
        scatter_points<T, n>(tile, inputs, value, gradients, needs, range, q * per_query, channel, grad);
      });
    }
    if (needs.dots) {
      finish_points(tile, queries * per_query);
      write_point_gradients(tile, inputs, gradients, range, begin, queries);
    }
  }
}

}  // namespace

extern const MsDeformAttnKernels ms_deform_attn_kernels = {
    Vec<float>::lanes,
    &scratch_bytes,
    {&pack<float>, &pack<double>, &pack<bf16>, &pack<f16>},
    {&unpack<float>, &unpack<double>, &unpack<bf16>, &unpack<f16>},
    {&forward<float>, &forward<double>, &forward<bf16>, &forward<f16>},
    {&backward<float>, &backward<double>, &backward<bf16>, &backward<f16>},
};

}  // namespace effops::sampling::EFFOPS_ISA
