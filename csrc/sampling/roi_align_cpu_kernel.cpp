// RoIAlign on the CPU.
//
//   out[i, j] = sum over y of wy[i, y] * sum over x of wx[j, x] * map[y, x]
//   grad_map[y, x] += sum over i of wy[i, y] * sum over j of wx[j, x] * g[i, j]
//
// The average over the samples of a bin, and the interpolation of a sample, are products of an x and a y
// part: the weights of all samples of a bin are added up beforehand (roi_align_plan_cpu.h), so that a pixel
// is read once per bin, and rows are summed along x once for all bins that share them.
//
// Parallelism: the caller splits (slice of channels, RoIs) forward, (slice, rows) backward. Lanes are
// channels of packed maps. Of others forward packs the rows that it reads; few channels, and backward for few
// RoIs, are taken one by one.
// Bytes: forward reads the pixels of the box, backward reads and writes them. For 7 x 7 bins with 2 x 2
// samples each, 2 pixels wide: 15 x 15 pixels, 315 + 147 multiply-adds per channel (plain: 784).
#include "roi_align_cpu_kernel.h"
#include "lanes_cpu.h"
#include "transpose_cpu.h"

namespace effops::sampling::EFFOPS_ISA {
namespace {

constexpr int kKeptRows = 4;  // summed rows that are kept: neighbouring bins share at most a few
constexpr int kMaxWidth = kMaxRegisters * Vec<float>::lanes;

inline int64_t scratch_bytes(int64_t bins, int64_t columns, int64_t side) {
  // The same for double: half as many lanes, twice as wide.
  return (bins + kKeptRows * columns + side) * kMaxWidth * int64_t{sizeof(float)};
}

// Where rows of pixels are read from.
template <typename T>
struct SourceRows {
  const T* data;
  int64_t row_stride, pixel_stride;
  // Where the channels lie apart, `row` gets one row of them, packed: pixels `first` to `last`.
  int64_t channel_stride, channels;
  T* row;
  int64_t first, last;
};

template <typename S>
struct Grid {
  S* data;
  int64_t row_stride, pixel_stride;
};

// The pixels that the sums read.
inline void find_columns(const AxisSums& x, int64_t& first, int64_t& last) {
  first = last = x.begin[x.count] > 0 ? x.source[0] : 0;
  for (int64_t k = 0; k < x.begin[x.count]; ++k) {
    first = x.source[k] < first ? x.source[k] : first;
    last = x.source[k] > last ? x.source[k] : last;
  }
}

// Packs row `y` of a source that is not packed. All pixels in between, or only those that are read.
template <typename T, int kWidth>
EFFOPS_INLINE void pack_row(const SourceRows<T>& source, const AxisSums& x, int32_t y) {
  const T* from = source.data + y * source.row_stride;
  const int64_t columns = source.last - source.first + 1, terms = x.begin[x.count];
  if (columns <= 2 * terms) {
    pack_rows(from + source.first * source.pixel_stride, source.pixel_stride, source.channel_stride, columns,
              source.channels, kWidth, source.row);
    return;
  }
  for (int64_t k = 0; k < terms; ++k) {
    pack_rows(from + x.source[k] * source.pixel_stride, source.pixel_stride, source.channel_stride, 1,
              source.channels, kWidth, source.row + (x.source[k] - source.first) * kWidth);
  }
}

// sums[t] = sum of weight * row[source], N registers each.
template <typename Lanes, int N, typename T = typename Lanes::Storage>
EFFOPS_INLINE void sum_along_x(const AxisSums& x, const T* row, int64_t pixel_stride,
                               typename Lanes::A* sums) {
  using V = typename Lanes::V;
  const auto* weights = static_cast<const typename Lanes::A*>(x.weight);
  for (int64_t t = 0; t < x.count; ++t) {
    V total[N] = {};
    for (int64_t k = x.begin[t]; k < x.begin[t + 1]; ++k) {
      const V weight = Lanes::all(weights[k]);
      const T* pixel = row + x.source[k] * pixel_stride;
      for (int n = 0; n < N; ++n) total[n] += weight * Lanes::load_storage(pixel + n * Lanes::lanes);
    }
    for (int n = 0; n < N; ++n) Lanes::store_sums(sums + (t * N + n) * Lanes::lanes, total[n]);
  }
}

// target += weight * row, or target = weight * row. kScatter: the columns are pixels of a map.
template <typename Lanes, int N, bool kScatter>
EFFOPS_INLINE void add_row(const AxisSums& x, typename Lanes::A weight, const typename Lanes::A* row,
                           typename Lanes::A* target, int64_t pixel_stride, bool assign) {
  const auto w = Lanes::all(weight);
  for (int64_t t = 0; t < x.count; ++t) {
    auto* to = target + (kScatter ? x.target[t] : t) * pixel_stride;
    for (int n = 0; n < N; ++n) {
      const auto product = w * Lanes::load_sums(row + (t * N + n) * Lanes::lanes);
      auto* place = to + n * Lanes::lanes;
      Lanes::store_sums(place, assign ? product : Lanes::load_sums(place) + product);
    }
  }
}

// All sums of a RoI for N registers of channels. `rows`: memory for kKeptRows rows of sums.
template <typename Lanes, int N, bool kScatter, typename T = typename Lanes::Storage>
EFFOPS_INLINE void sum_roi(const RoiSums& sums, const SourceRows<T>& source, int64_t row_begin,
                           int64_t row_end, const Grid<typename Lanes::A>& target, typename Lanes::A* rows) {
  using A = typename Lanes::A;
  const AxisSums& y = sums.y;
  const auto* weights = static_cast<const A*>(y.weight);
  const int64_t row_size = sums.x.count * N * Lanes::lanes;
  int32_t kept[kKeptRows];
  for (int32_t& row : kept) row = -1;
  for (int64_t t = 0; t < y.count; ++t) {
    const int64_t target_row = kScatter ? y.target[t] : t;
    if (kScatter && (target_row < row_begin || target_row >= row_end)) continue;
    A* to = target.data + (target_row - row_begin) * target.row_stride;
    if (!kScatter && y.begin[t] == y.begin[t + 1]) memset(to, 0, row_size * sizeof(A));
    for (int64_t k = y.begin[t]; k < y.begin[t + 1]; ++k) {
      const int32_t row = y.source[k];
      A* summed = rows + row % kKeptRows * row_size;
      if (kept[row % kKeptRows] != row) {
        if (source.row != nullptr) {
          constexpr int width = N * Lanes::lanes;
          pack_row<T, width>(source, sums.x, row);
          sum_along_x<Lanes, N>(sums.x, source.row - source.first * width, width, summed);
        } else {
          sum_along_x<Lanes, N>(sums.x, source.data + row * source.row_stride, source.pixel_stride, summed);
        }
        kept[row % kKeptRows] = row;
      }
      add_row<Lanes, N, kScatter>(sums.x, weights[k], summed, to, target.pixel_stride,
                                  !kScatter && k == y.begin[t]);
    }
  }
}

template <typename Lanes, int N, typename T = typename Lanes::Storage>
EFFOPS_INLINE void forward_channels(const RoiSums& sums, const SourceRows<T>& map, T* output, void* scratch) {
  using A = typename Lanes::A;
  constexpr int width = N * Lanes::lanes;
  const int64_t bins = sums.height * sums.width;
  A* totals = static_cast<A*>(scratch);
  sum_roi<Lanes, N, false>(sums, map, 0, sums.height, {totals, sums.width * width, width},
                           totals + bins * width);
  unpack_rows(totals, width, bins, map.channels < width ? map.channels : width, output, bins);
}

template <typename T>
void forward(const MapSlice& map, const RoiSums& sums, void* output, void* scratch) {
  using A = accumulator_t<T>;
  const T* data = static_cast<const T*>(map.data);
  T* out = static_cast<T*>(output);
  const int64_t bins = sums.height * sums.width;
  SourceRows<T> source{data, map.row_stride, map.pixel_stride, map.channel_stride, 1, nullptr, 0, 0};
  if (map.padded == 0) {
    for (int64_t c = 0; c < map.channels; ++c) {
      source.data = data + c * map.channel_stride;
      forward_channels<ScalarLanes<T>, 1>(sums, source, out + c * bins, scratch);
    }
    return;
  }
  if (map.kernel_packs) {
    source.row = reinterpret_cast<T*>(static_cast<A*>(scratch) +
                                      (bins + kKeptRows * sums.x.count) * kMaxRegisters * Vec<A>::lanes);
    find_columns(sums.x, source.first, source.last);
  }
  using Lanes = VectorLanes<T>;
  for_registers<Lanes::lanes>(map.padded, [&](auto registers, int64_t channel) {
    constexpr int n = decltype(registers)::count, width = n * Lanes::lanes;
    const int64_t left = map.channels - channel;
    source.data = data + channel * map.channel_stride;
    source.channels = left < width ? left : width;
    forward_channels<Lanes, n>(sums, source, out + channel * bins, scratch);
  });
}

template <typename T>
void scatter(const SumSlice& target, const RoiSums& sums, const void* grad_output, void* scratch) {
  using A = accumulator_t<T>;
  const T* grad = static_cast<const T*>(grad_output);
  const int64_t bins = sums.height * sums.width;
  A* pixels = static_cast<A*>(target.data);
  if (target.padded == 0) {
    sum_roi<ScalarLanes<T>, 1, true>(sums, {grad, sums.width, 1, 0, 1, nullptr, 0, 0}, target.row_begin,
                                     target.row_end, {pixels, target.row_stride, target.pixel_stride},
                                     static_cast<A*>(scratch));
    return;
  }
  using Lanes = VectorLanes<T>;
  for_registers<Lanes::lanes>(target.padded, [&](auto registers, int64_t channel) {
    constexpr int n = decltype(registers)::count, width = n * Lanes::lanes;
    const int64_t left = target.channels - channel;
    A* rows = static_cast<A*>(scratch);
    T* packed = reinterpret_cast<T*>(rows + kKeptRows * sums.x.count * width);
    pack_rows(grad + channel * bins, 1, bins, bins, left < width ? left : width, width, packed);
    sum_roi<Lanes, n, true>(sums, {packed, sums.width * width, width, 1, width, nullptr, 0, 0},
                            target.row_begin, target.row_end,
                            {pixels + channel, target.row_stride, target.pixel_stride}, rows);
  });
}

}  // namespace

extern const RoiAlignKernels roi_align_kernels = {
    &scratch_bytes,
    {&forward<float>, &forward<double>, &forward<bf16>, &forward<f16>},
    {&scatter<float>, &scatter<double>, &scatter<bf16>, &scatter<f16>},
};

}  // namespace effops::sampling::EFFOPS_ISA
